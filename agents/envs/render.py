"""What every environment does with the picture of its episode."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from sim.atomic import write_whole


class Pictured:
    """An environment that draws its episode by ``_figure``."""

    render_mode: str | None

    @abstractmethod
    def _figure(self) -> Any:
        """Return a matplotlib figure with an Agg canvas."""

    def render(self) -> Any:
        """Return the picture of the episode so far, uint8[h, w, 3], for ``render_mode="rgb_array"``, else None."""
        if self.render_mode != "rgb_array":
            return None
        figure = self._figure()
        figure.canvas.draw()
        return np.asarray(figure.canvas.buffer_rgba(), dtype=np.uint8)[:, :, :3].copy()

    def write_picture(self, path: Path) -> None:
        """Write the picture of the episode so far as PNG, whole or not at all."""
        write_whole(path, lambda part: self._figure().savefig(part, format="png"))
