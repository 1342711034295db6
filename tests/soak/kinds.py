"""What a kind of hostile input is, and how one input is judged."""

from __future__ import annotations

import random
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sim.errors import RapLabError
from sim.paths import REPOSITORY

LONGEST_MESSAGE = 4000
"""Characters of an error message; more than that is the input again, not a message."""


@dataclass(frozen=True, slots=True)
class Case:
    """One input.

    target: what reads it, such as a trace reader by name.
    content: the bytes. more: further files by suffix. options: arguments of the target.
    """

    target: str
    content: bytes
    more: dict[str, bytes] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


class Kind(Protocol):
    """One kind of input: how to make one, and how to feed it to the project."""

    name: str

    def make(self, rng: random.Random) -> Case:
        """Return a hostile input; equal generators give equal inputs."""
        ...

    def feed(self, case: Case) -> str:
        """Read an input: return ``accepted`` or ``refused``, or raise what the project raised.

        RapLabError counts as refused; any other exception is a fault.
        """
        ...

    def close(self) -> None:
        """End what was started."""
        ...


class FaultError(Exception):
    """A fault that is no exception of the project, such as an answer of status 500. label: its kind."""

    def __init__(self, label: str, detail: str = "") -> None:
        super().__init__(f"{label}: {detail}")
        self.label = label


@dataclass(frozen=True, slots=True)
class Outcome:
    """accepted, refused or fault; ``label`` groups equal faults, ``detail`` is the last line of a traceback."""

    verdict: str
    label: str = ""
    detail: str = ""


def judge(kind: Kind, case: Case) -> Outcome:
    """Feed an input and return what happened."""
    try:
        return Outcome(kind.feed(case))
    except RapLabError as error:
        return refusal(error, case.target)
    except FaultError as error:
        return Outcome("fault", f"{case.target}: {error.label}", str(error)[:500])
    except Exception as error:
        place = innermost(error)
        return Outcome(
            "fault", f"{case.target}: {type(error).__name__} in {place}", f"{type(error).__name__}: {error}"[:500]
        )


def refusal(error: Exception, target: str) -> Outcome:
    """Return the outcome of a refusal: its message must be one line that can be printed."""
    message = str(error)
    if "\n" in message or "\r" in message:
        return Outcome("fault", f"{target}: a message of several lines in {innermost(error)}", repr(message)[:500])
    if len(message) > LONGEST_MESSAGE:
        detail = f"{len(message):,} characters: {message[:200]!r}"
        return Outcome("fault", f"{target}: a message without end in {innermost(error)}", detail)
    return Outcome("refused")


def innermost(error: BaseException) -> str:
    """Return the last function of the project in a traceback, as ``file:function``."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f.filename.startswith(str(REPOSITORY)) and "/tests/" not in f.filename]
    if not ours:
        return "no function of the project"
    return f"{Path(ours[-1].filename).relative_to(REPOSITORY)}:{ours[-1].name}"
