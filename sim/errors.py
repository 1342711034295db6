"""Every error that a user can cause: what was wrong, what is allowed, what to do next."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST_MESSAGE = 1000
"""Characters of an error message. A value of a file that is quoted in it may be much longer."""


def one_line(message: str) -> str:
    """Return a message as one line of at most LONGEST_MESSAGE characters; of a longer one the middle is left out."""
    if len(message.splitlines()) > 1:
        message = " ".join(message.split())
    if len(message) <= LONGEST_MESSAGE:
        return message
    end = LONGEST_MESSAGE // 4
    return f"{message[: LONGEST_MESSAGE - end - 5]} ... {message[-end:]}"


class RapLabError(ValueError):
    """Base of all errors of this project, so that a caller can catch all of them. Its message is one short line."""

    def __init__(self, message: object = "") -> None:
        """Take the message: what was wrong, what is allowed, what to do next."""
        super().__init__(one_line(str(message)))


class TraceError(RapLabError):
    """A trace file or a row of it cannot be used."""


class WorkloadError(RapLabError):
    """A workload step or a generator cannot do what its arguments say."""


class ModelError(RapLabError):
    """A model description is incomplete or of an unsupported family."""


class PlanError(RapLabError):
    """A plan is not legal for the model."""


class BudgetError(RapLabError):
    """The memory budget cannot hold the weights or the request."""


class CalibrationError(RapLabError):
    """A calibration is missing, malformed, or lacks a term that the plan needs."""


class ConfigError(RapLabError):
    """A configuration value is unknown or out of range."""


MOST_NAMES = 100
"""Names that a message lists; a table of plans can have thousands."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return the allowed names as readable text, after the one closest to ``name``.

    Of more than ``MOST_NAMES`` only the closest are listed.

    Example: ``did you mean 'burstgpt'? allowed: azure_code, azure_conv, burstgpt``.
    """
    names = sorted(allowed)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    if len(names) > MOST_NAMES:
        listed = "; ".join(get_close_matches(name, names, n=8, cutoff=0.0))
        return f"{hint}{len(names)} names are allowed; the closest are: {listed}"
    between = "; " if any("," in each for each in names) else ", "
    return f"{hint}allowed: {between.join(names)}"
