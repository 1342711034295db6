"""Commands of the project as the parts about killed runs and full disks start them, and what these commands read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.soak.tiny_checkpoint import overrides, write_checkpoint

SENTENCE = "the keeper counts the ships that pass in the night and writes each of them down "


@dataclass(frozen=True, slots=True)
class Command:
    """One command that writes files.

    module: its module, or MODULE:FUNCTION. arguments: without the folder. folder_key: names the folder, or the file
    in it if it is ``out``.
    """

    module: str
    arguments: tuple[str, ...]
    folder_key: str = "hydra.run.dir"

    def line(self, folder: Path, *more: str) -> list[str]:
        """Return all arguments of a run in a folder."""
        place = folder / "score.json" if self.folder_key == "out" else folder
        return [*self.arguments, *more, f"{self.folder_key}={place}"]


def replay_command(*arguments: str, folder_key: str = "hydra.run.dir") -> Command:
    """Return ``sim.replay``."""
    return Command("sim.replay.__main__", arguments, folder_key)


def real_replay_command(files: Path) -> Command:
    """Return ``hw.replay`` of the tiny random model, which is written into ``files``."""
    small = ("trace.on_rate_rps=8", "plot=true", "hw.text=null", "hw.skip_idle=true", "budget.blocks=96")
    return Command("hw.replay.run", (*small, *overrides(write_checkpoint(files / "checkpoint"))))


def score_command(files: Path, *, tokens: int, sentences: int) -> Command:
    """Return ``hw.score`` of the tiny random model; model and text are written into ``files``."""
    checkpoint, text = write_checkpoint(files / "checkpoint"), files / "text.txt"
    text.write_text(SENTENCE * sentences)
    model = ("kind=gsi", f"model.path={checkpoint}", "model.name=tiny", "model.dtype=float32", "model.device=cpu")
    texts = (f"calibration.path={text}", f"test.path={text}", f"calibration.tokens={tokens}", "calibration.window=64")
    return Command("hw.score.run", (*model, *texts), folder_key="out")
