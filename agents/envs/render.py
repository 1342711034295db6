"""Rendering that all environments share: a matplotlib figure of the episode as an array or a PNG file."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from sim.atomic import write_whole


class RenderMixin:
    """Renders the figure that ``_figure`` returns."""

    render_mode: str | None

    @abstractmethod
    def _figure(self) -> Any:
        """Return a matplotlib figure with an Agg canvas."""

    def render(self) -> Any:
        """Return the episode so far as uint8[h, w, 3] if ``render_mode`` is "rgb_array", else None."""
        if self.render_mode != "rgb_array":
            return None
        figure = self._figure()
        figure.canvas.draw()
        return np.asarray(figure.canvas.buffer_rgba(), dtype=np.uint8)[:, :, :3].copy()

    def save_render(self, path: Path) -> None:
        """Write the episode so far as a PNG; a failed write leaves no partial file."""
        write_whole(path, lambda part: self._figure().savefig(part, format="png"))
