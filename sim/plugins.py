"""Where options come from, and which command they are for.

Installed packages may bring options, such as a policy. A package names its folder of options (``policy/NAME.yaml``,
``trace/NAME.yaml`` ...), which is a package too, as an entry point::

    [project.entry-points."rap_lab.policies"]
    anything = "my_package.options"

Once it is installed, every command and ``build_option`` know its options, after those of conf/.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
import sys
from importlib.metadata import EntryPoint, entry_points
from itertools import islice
from pathlib import Path

ENTRY_POINTS = "rap_lab.policies"


@functools.cache
def plugin_folders() -> tuple[Path, ...]:
    """Return the folders with options that installed packages name, in the order of their names.

    A package that cannot be found or imported is left out; a line on stderr says so.
    """
    found = (_folder(point) for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name))
    return tuple(folder for folder in found if folder is not None)


def _folder(point: EntryPoint) -> Path | None:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a package prints is no result of a command
            spec = importlib.util.find_spec(point.value)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(f"{point.value} is not a package")
    except (Exception, SystemExit) as error:  # a package's own __init__ may raise anything, and other commands go on
        by = f" of {point.dist.name}" if point.dist is not None else ""
        print(
            f"warning: the entry point {point.name} = {point.value}{by} ({ENTRY_POINTS}) is left out "
            f"({type(error).__name__}: {error}); it must name an installed package with GROUP/NAME.yaml",
            file=sys.stderr,
        )
        return None
    return Path(spec.submodule_search_locations[0]).absolute()


def belongs_to(option: Path, module: str) -> bool:
    """Return whether a command can use the file of an option.

    A file in ``experiment/`` may state its command in its second line, ``# python -m MODULE experiment=NAME``; then it
    is of use to that command alone. Any other option is of use to every command that has its group.
    """
    if option.parent.name != "experiment":
        return True
    with contextlib.suppress(OSError, UnicodeDecodeError), option.open(encoding="utf-8") as file:
        if stated := re.search(r"^# python -m ([\w.]+) experiment=", "".join(islice(file, 2)), re.MULTILINE):
            return stated[1] == module
    return True
