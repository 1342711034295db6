"""Keeps the windows that an evaluation has played, so that one that was stopped goes on where it was.

Playing all windows takes hours. Each window that was played is a line of a file in the folder of the results, which is
removed once they are written. The same command goes on with it; a line that a kill cut short is played again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sim.errors import ConfigError
from sim.progress import say
from sim.results.run_folder import write_text

Rows = list[dict[str, Any]]


class Unfinished:
    """The rows of the windows played so far.

    begun: when the evaluation was begun, and each time that it went on (ISO 8601, UTC).
    """

    def __init__(self, path: Path, played: Mapping[str, Any], commit: str) -> None:
        """Read what an earlier start of the same evaluation left.

        Args:
            path: the file; its folder is made if it is missing.
            played: all on which rows depend besides the code, as JSON.
            commit: of the code; with changes that are not committed (``-dirty``), nothing is kept between two starts.
        Raises:
            ConfigError: if the file has windows of another evaluation, which can still go on.
        """
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        code = f"{commit} {now}" if commit.endswith("-dirty") else commit
        self._path = path
        self._key = hashlib.sha256(json.dumps([played, code], sort_keys=True).encode()).hexdigest()
        before = _complete_lines(path)
        ours = [line for line in before if line["key"] == self._key]
        self._rows: dict[int, Rows] = {line["window"]: line["rows"] for line in ours if "window" in line}
        self.begun: list[str] = [*(line["begun"] for line in ours if "begun" in line), now]
        lasting = {line["key"] for line in before if not str(line.get("commit", "-dirty")).endswith("-dirty")}
        others = [line for line in before if line["key"] in lasting - {self._key} and "window" in line]
        if others:
            raise ConfigError(
                f"{path} keeps {len(others)} windows of another evaluation that was stopped; go on with its command, "
                "set out=FOLDER to another folder, or delete this file"
            )
        if self._rows:
            say(f"{len(self._rows)} windows were played before this evaluation was stopped: {path}")
        elif before:
            say(
                f"{path} is of another evaluation, or of code with changes that are not committed; all windows are "
                "played again"
            )
        write_text(path, "".join(json.dumps(line) + "\n" for line in ours))
        self._append({"begun": now, "commit": commit})

    def __contains__(self, window: int) -> bool:
        return window in self._rows

    def rows(self, windows: Iterable[int]) -> Rows:
        """Return the rows of windows in their order."""
        return [row for window in windows for row in self._rows[window]]

    def add(self, window: int, rows: Rows) -> None:
        """Keep the rows of a window."""
        self._rows[window] = rows
        self._append({"window": window, "rows": rows})

    def remove(self) -> None:
        """Remove the file: the results are written."""
        self._path.unlink(missing_ok=True)

    def _append(self, line: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": self._key, **line}) + "\n")


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file that are complete; none if there is no file."""
    if not path.is_file():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "key" in line:
            found.append(line)
    return found
