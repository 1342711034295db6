"""How a command ends when something is wrong: one line that says what and what to do, and an exit status."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import re
import signal
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from hydra.errors import HydraException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from sim.config.streams import forget_stdout
from sim.errors import RapLabError
from sim.paths import CHECKOUT, REPOSITORY

FAILED = 2
"""Exit status of a command that ends with an error."""
INTERRUPTED = 130
"""Exit status after Ctrl-C or SIGTERM; shells have it for Ctrl-C."""
FIXABLE = (
    RapLabError,
    HydraException,
    OmegaConfBaseException,
    YAMLError,
    OSError,
    MemoryError,
    ModuleNotFoundError,
)
"""What a user can mend: a value, a file, a folder, a package."""
SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
RUN_FOLDER = "hydra.run.dir=FOLDER"
"""What sends the files of a run elsewhere."""
SWEEP_FOLDER = "hydra.sweep.dir=FOLDER"
"""What sends the files of a sweep elsewhere."""


@contextmanager
def same_handler_of_sigterm() -> Iterator[None]:
    """Set the handler of SIGTERM again at the end, after a library has set its own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM, by which schedulers of clusters end a job, interrupt what runs as Ctrl-C does.

    Without it the process ends at once: finished requests are not written, and processes that it started stay.
    """
    if threading.current_thread() is not threading.main_thread():  # the only one that may set a handler
        yield
        return
    with same_handler_of_sigterm():
        signal.signal(signal.SIGTERM, _interrupt)
        yield


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Finish something short, such as the writing of results, before Ctrl-C or SIGTERM; a second one does not wait.

    Raises:
        KeyboardInterrupt: at the end, if one of them came; at once for the second one.
    """
    if threading.current_thread() is not threading.main_thread():  # the only one that may set a handler
        yield
        return
    came: list[int] = []

    def hold(number: int, _frame: FrameType | None) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A signal that is ignored, or ends the process at once, keeps doing so.
    answered = {number: handler for number, handler in before.items() if callable(handler)}
    try:
        for number in answered:
            signal.signal(number, hold)
        yield
    finally:
        for number, handler in answered.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


@contextmanager
def errors_in_one_line(where: str = "", elsewhere: str = RUN_FOLDER) -> Iterator[None]:
    """End the process with one line on stderr if an error that the user can mend comes up.

    Args:
        where: what the line begins with.
        elsewhere: as in ``explain``.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough
        forget_stdout()
        raise SystemExit(128 + signal.SIGPIPE) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except FIXABLE as error:
        if full_error() or (isinstance(error, ModuleNotFoundError) and _is_own(error)):
            raise
        fail(where + explain(error, elsewhere))


def full_error() -> bool:
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def _is_own(error: ModuleNotFoundError) -> bool:
    return (error.name or "").partition(".")[0] in ("sim", "hw", "agents", "conf", "tests")


def explain(error: BaseException, elsewhere: str = RUN_FOLDER) -> str:
    """Return an error in one line: what is wrong and what to do.

    Args:
        error: what came up.
        elsewhere: the override that sends the files of the command to another place; empty if it has none.
    """
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        return f"this needs the package {package}, which is not installed: {how_to_install(package)}"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value; set it: {error.full_key}=VALUE"
    if isinstance(error, MemoryError):
        return f"not enough memory{f' ({error})' if str(error) else ''}; use a smaller trace, or fewer workers"
    if isinstance(error, OSError) and error.strerror:
        problem = os.strerror(error.errno) if error.errno else error.strerror  # Arrow's text is longer
        what = f"{error.filename}: {problem}" if error.filename else problem
        if error.errno in SPACE:
            return f"{what}; free some space{f', or write elsewhere with {elsewhere}' if elsewhere else ''}"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
            readable = "name a file that can be read, or a folder that can be written"
            return f"{what}; {readable}{f': {elsewhere}' if elsewhere else ''}"
        return what
    return " ".join(str(error).split()) or type(error).__name__


def how_to_install(package: str) -> str:
    """Return the command that installs a package: with this project's extra that has it, or alone."""
    if extra := extra_of(package):  # of a checkout, because this project may not be published under its name
        return "pip install " + (f"-e '{REPOSITORY}[{extra}]'" if CHECKOUT else f"'rap-lab[{extra}]'")
    return f"pip install {package}"


def extra_of(package: str) -> str | None:
    """Return the extra of this project that installs a package, the command's own if several do; None if none does."""

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    found = [
        extra
        for extra, requirements in _extras().items()
        if plain(package) in {plain(re.split(r"[^\w.-]", text)[0]) for text in requirements}
    ]
    return _command_package() if _command_package() in found else next(iter(found), None)


def _extras() -> dict[str, list[str]]:
    """Return extra -> its requirements: of the checkout, or else of what is installed."""
    if (project := REPOSITORY / "pyproject.toml").is_file():
        content = tomllib.loads(project.read_text(encoding="utf-8"))
        extras: dict[str, list[str]] = content.get("project", {}).get("optional-dependencies", {})
        return extras
    found: dict[str, list[str]] = {}
    for line in importlib.metadata.requires("rap-lab") or []:
        if extra := re.search(r"extra == .(\w+)", line):
            found.setdefault(extra[1], []).append(line)
    return found


def _command_package() -> str:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec.name.partition(".")[0] if spec is not None else ""


def fail(message: str) -> NoReturn:
    """Print what went wrong to stderr and end with exit status 2."""
    with suppress(OSError):
        sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr)
    sys.stderr.flush()
    raise SystemExit(FAILED)
