"""A file of figures next to the quality tables, and the page and picture that are made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sim.cost.quality import QUALITIES
from sim.errors import ConfigError
from sim.json_file import read_json_object
from sim.paths import RESULTS
from sim.results.run_folder import write_text


@dataclass(frozen=True, slots=True)
class Figures:
    """Where a kind of ``hw.score`` keeps its figures, and how it shows them.

    kind: of ``hw.score``; also the folder of the page in docs/results. folder: in conf/quality. page: the page of the
        figures. plot: draws them into a file.
    """

    kind: str
    folder: str
    page: Callable[[Mapping[str, Any]], str]
    plot: Callable[[Path, Mapping[str, Any]], None]

    def path(self, out: str, model: str) -> Path:
        """Return the file of a model's figures; ``out`` names another."""
        return Path(out) if out else QUALITIES / self.folder / f"{model}.json"

    def write_page(self, out: str, model: str) -> None:
        """Write the page and the picture of a file of figures: with ``out`` next to it.

        Raises:
            ConfigError: if there is no such file.
        """
        path = self.path(out, model)
        folder = path.parent if out else RESULTS / self.kind
        figures = read_json_object(path, ConfigError, f"run python -m hw.score kind={self.kind} first, or set out=")
        self.plot(folder / "loss.png", figures)
        write_text(folder / "index.md", self.page(figures))
