"""Command ``python -m sim.fit_trace``: write the tables of the embedded default trace, conf/trace/tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from sim.config import run_command
from sim.results.run_folder import write_text
from sim.traces.fit import FILES, table_text
from sim.traces.generate import TABLES
from sim.traces.readers.azure import read_azure


@dataclass(kw_only=True)
class FitTraceConfig:
    """Where to write. out: a folder; conf/trace/tables when null."""

    out: str | None = None


ConfigStore.instance().store(name="fit_trace_schema", node=FitTraceConfig)


def main() -> None:
    """Run the command."""
    run_command(_fit_trace, "fit_trace")


def _fit_trace(cfg: DictConfig) -> None:
    out = Path(cfg.out) if cfg.out is not None else TABLES
    tables = {name: table_text(name, read_azure(file, name=name)) for name, file in FILES.items()}
    for name, text in tables.items():
        write_text(out / f"{name}.yaml", text)
        print(f"wrote {out / name}.yaml")


if __name__ == "__main__":
    main()
