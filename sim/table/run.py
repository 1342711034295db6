"""``python -m sim.table FOLDER``: one table of the runs in a folder, as ``--multirun`` writes at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from sim.config import run_command
from sim.errors import ConfigError
from sim.table.table import write_table


@dataclass(kw_only=True)
class TableConfig:
    """Which runs, and where to write.

    folders: each gets a table of the runs in it and below.
    out: the folder for table.parquet and table.md, of a single folder; null takes that folder itself.
    """

    folders: list[str] = field(default_factory=list)
    out: str | None = None


ConfigStore.instance().store(name="table_schema", node=TableConfig)


def main() -> None:
    """Run the command."""
    run_command(_tables, "table", positional="folders")


def _tables(cfg: DictConfig) -> None:
    if not cfg.folders:
        raise ConfigError("name a folder with runs, such as that of a sweep: python -m sim.table FOLDER")
    if cfg.out is not None and len(cfg.folders) > 1:
        raise ConfigError(f"out takes the table of one folder, not of {len(cfg.folders)}; leave it out, or name one")
    for name in cfg.folders:
        folder = Path(name)
        if not folder.is_dir():
            raise ConfigError(f"{folder} is not a folder; name one that holds runs, such as that of a sweep")
        write_table(folder, None if cfg.out is None else Path(cfg.out))
