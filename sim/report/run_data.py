"""Reads run folders: everything that a report shows, with a reason for each part that is missing.

The configuration is read as plain text and values. Nothing that it names is built, because it may be a stranger's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import pandas as pd
import yaml

from sim.cost.model_spec import MOST_LAYERS
from sim.cost.plan import Plan
from sim.cost.plan_text import most_layer, plan_from_text
from sim.errors import ConfigError, PlanError
from sim.json_file import read_json_object
from sim.limits import is_whole
from sim.results.metrics import ITERATION_COLUMNS
from sim.types import Floats

MOST_RUNS = 24
"""Runs of one report: more lines in one panel cannot be read."""
AGAIN = "run the command of that folder again"
RECORD_COLUMNS = (
    "arrival_s",
    "prompt_tokens",
    "output_tokens",
    "produced_tokens",
    "admitted_s",
    "first_token_s",
    "finish_s",
    "ttft_s",
    "tpot_s",
    "e2e_s",
    "preemptions",
)
TRANSITION_COLUMNS = ("time_s", "bytes_in", "bytes_freed", "ready_s", "preempted", "recomputed_tokens")
STATISTICS = ("mean", "p50", "p90", "p95", "p99", "max")
DISTRIBUTIONS = ("ttft_s", "tpot_s", "itl_s", "e2e_s", "client_ttft_s", "client_e2e_s")
"""Keys of a summary that hold STATISTICS in seconds."""
FIGURES = (
    "slo_attainment",
    "perplexity_ratio",
    "quality_nll",
    "low_precision_share",
    "preemptions",
    "recomputed_tokens",
    "budget_violation_s",
    "kept_params_share",
    "extrapolated_share",
    "transitions",
    "makespan_s",
    "max_rate_rps",
    "utilization",
)
"""Keys of a summary that hold one number, or null."""
ALWAYS = ("arrival_s", "start_s", "end_s", "time_s", "running", "waiting", "kept_share")
"""Columns without NaN: what they state has always happened."""
LARGEST = 1e18
"""No number of a table is larger: seconds, tokens and bytes of any run are far below, and sums stay finite."""
TARGETS = ("ttft_s", "tpot_s", "e2e_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """The content of ``server.json``: what no table says of the server of a run.

    dense_nll: nats per token of the dense model; None if unknown. first_plan: at 0 s, as ``describe`` writes it.
    budget: (time_s, bytes), one entry per change.
    """

    num_layers: int
    dense_weight_bytes: float
    dense_nll: float | None
    first_plan: str
    budget: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class RunData:
    """One run folder.

    label: names it in the report, differently from the other runs. The frames are those of the folder, or None.
    server: None if the folder has no server.json. config: as in config.yaml; empty if it cannot be read.
    """

    label: str
    folder: Path
    summary: Mapping[str, Any]
    records: pd.DataFrame
    iterations: pd.DataFrame | None
    transitions: pd.DataFrame | None
    kept_share: pd.DataFrame | None
    server: Server | None
    config: Mapping[str, Any]
    config_text: str
    provenance: Mapping[str, Any]
    hardware: Mapping[str, Any] | None

    def column(self, name: str) -> Floats:
        """Return a column of the records as float64[n]."""
        return self.records[name].to_numpy(dtype=np.float64)

    @cached_property
    def end_s(self) -> float:
        """When the last iteration ended, or the last thing that the records know of happened; seconds."""
        ends = [self.column(name) for name in ("arrival_s", "first_token_s", "finish_s")]
        if self.iterations is not None:
            ends.append(self.iterations["end_s"].to_numpy(dtype=np.float64))
        values = np.concatenate(ends)
        values = values[np.isfinite(values)]
        return float(values.max()) if len(values) else 0.0

    @property
    def judged_side(self) -> str:
        """Whose TTFT and E2E the SLO judges: ``engine`` or ``client``."""
        client = _mapping(self.config.get("slo")).get("side") == "client" and "client_ttft_s" in self.records
        return "client" if client else "engine"

    def latency_s(self, name: str) -> Floats:
        """Return ``ttft_s``, ``tpot_s`` or ``e2e_s`` of the judged side as float64[n]; NaN where there is none."""
        other = f"client_{name}"
        return self.column(other if self.judged_side == "client" and other in self.records else name)

    @property
    def targets_s(self) -> dict[str, float]:
        """The targets of the SLO that the configuration states: ``ttft_s``, ``tpot_s``, ``e2e_s``."""
        slo = _mapping(self.config.get("slo"))
        return {name: float(slo[name]) for name in TARGETS if _is_number(slo.get(name)) and slo[name] > 0}

    @property
    def num_layers(self) -> int | None:
        """Layers of the model; None if neither the server, the configuration nor a plan says."""
        if self.server is not None:
            return self.server.num_layers
        stated = _mapping(self.config.get("model")).get("num_layers")
        if isinstance(stated, int) and 0 < stated <= MOST_LAYERS:
            return int(stated)
        if self.transitions is None or not len(self.transitions):
            return None
        named = max(map(most_layer, [*self.transitions["from"], *self.transitions["to"]]))
        return named + 1 if named >= 0 else None

    @cached_property
    def plans(self) -> list[tuple[float, Plan]]:
        """(time_s, plan) of each decision that changed the plan, the first at 0 s; empty if the plan is unknown.

        Raises:
            ConfigError: for a plan that cannot be read.
        """
        if (layers := self.num_layers) is None:
            return []
        changes = (
            [] if self.transitions is None else list(zip(*(self.transitions[c] for c in ("time_s", "to")), strict=True))
        )
        if self.server is not None:
            first = self.server.first_plan
        elif self.transitions is not None and len(self.transitions):
            first = str(self.transitions["from"].iloc[0])
        else:
            return []
        try:
            return [(at_s, plan_from_text(str(text), layers)) for at_s, text in [(0.0, first), *changes]]
        except PlanError as error:
            raise ConfigError(f"{self.folder}: a plan cannot be read: {error}; {AGAIN}") from error

    @property
    def perplexity_ratio(self) -> float | None:
        """Perplexity over that of the dense model; None if it is unknown."""
        if _is_number(ratio := self.summary.get("perplexity_ratio")):
            return float(ratio)
        nll = self.summary.get("quality_nll")
        if self.server is None or self.server.dense_nll is None or not _is_number(nll):
            return None
        return math.exp(float(nll) - self.server.dense_nll)

    @property
    def mean_weight_share(self) -> float | None:
        """Bytes of the weights in memory over those of the dense model, averaged over time; None if unknown."""
        if self.kept_share is None or not len(self.kept_share):
            return None
        time_s = self.kept_share["time_s"].to_numpy(dtype=np.float64)
        share = self.kept_share["kept_share"].to_numpy(dtype=np.float64)
        seconds = np.diff(np.minimum(np.append(time_s, self.end_s), self.end_s))
        return float((seconds * share).sum() / seconds.sum()) if seconds.sum() > 0 else float(share[0])

    @property
    def mean_weight_bytes(self) -> float | None:
        """Bytes of the weights in memory, averaged over time; None if unknown."""
        share = self.mean_weight_share
        return None if share is None or self.server is None else share * self.server.dense_weight_bytes

    @property
    def missing(self) -> list[str]:
        """What the folder lacks, what the report cannot show for that reason, and how to get it."""
        found = []
        if self.iterations is None:
            found.append(
                "iterations.parquet: KV in use and iterations are not shown, and running and waiting requests are "
                "counted from the records, without preemptions. Replay again with iterations=true."
                if self._has_one_engine
                else "iterations.parquet: this command writes none, so KV in use and iterations are not shown."
            )
        if self.transitions is None:
            found.append("transitions.parquet: plan changes are not shown. sim.replay and hw.replay write them.")
        if self.kept_share is None:
            found.append("kept_share.parquet: weights in memory are not shown. sim.replay and hw.replay write it.")
        if self.server is None:
            found.append(
                "server.json: the memory budget is not shown, weights are shown as a share, and a plan that never "
                "changes is not shown. sim.replay, sim.compare and hw.replay write it; replay again with this version."
                if self._has_one_engine
                else "server.json: this command writes none, so plans and the memory budget are not shown."
            )
        if not self.provenance:
            found.append("provenance.json: the command and the commit are unknown. It may have been deleted.")
        return found

    @property
    def _has_one_engine(self) -> bool:
        return not {"replica", "prefill_replica"} & set(self.records) and not (self.folder / "client.json").is_file()


def run_folders(paths: Sequence[Path]) -> list[Path]:
    """Return the run folders that paths name: each itself, or those that lie in it (a sweep or a comparison).

    Raises:
        ConfigError: for a path without a complete run, a folder that is named twice, or more than MOST_RUNS.
    """
    if not paths:
        raise ConfigError("runs is empty; give one or more run folders: python -m sim.report RUN [RUN ...]")
    found: list[Path] = []
    for path in paths:
        if (path / "summary.json").is_file():
            found.append(path)
            continue
        if not path.is_dir():
            raise ConfigError(f"{path} is no folder; give run folders of sim.replay, sim.compare or hw.replay")
        inner = _inside(path)
        if not inner:
            raise ConfigError(
                f"{path} has no summary.json, so it holds no complete run; give run folders of sim.replay, "
                "sim.compare or hw.replay"
            )
        found += inner
    if len({one.resolve() for one in found}) < len(found):
        raise ConfigError("a run folder is named twice; name each once")
    if len(found) > MOST_RUNS:
        raise ConfigError(f"{len(found)} runs; a report shows at most {MOST_RUNS}: name some of the folders")
    return found


def _inside(folder: Path) -> list[Path]:
    """Return the run folders in a folder: those of a comparison in its order, others by name and number."""
    found = [one.parent for pattern in ("*", "*/*") for one in folder.glob(f"{pattern}/summary.json")]
    compared = _object(folder / "compare.json") or {}
    labels = list(_mapping(compared.get("summaries")))

    def rank(path: Path) -> tuple[int, list[Any]]:
        parts = path.relative_to(folder).parts
        at = labels.index(parts[0]) if parts[0] in labels else len(labels)
        # re.split gives text and digits in turn, so equal places hold equal types.
        return at, [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", "/".join(parts))]

    return sorted(found, key=rank)


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """Read run folders, and give each run a label that no other has.

    Raises:
        ConfigError: for a folder that lacks its records or summary, or has a file that cannot be read.
    """
    return _with_labels([read_run(folder) for folder in folders])


def read_run(folder: Path) -> RunData:
    """Read one run folder; its label is that of its configuration, or else the name of the folder.

    Raises:
        ConfigError: if the folder lacks its records or summary, or has a file that cannot be read.
    """
    records = _table(folder / "records.parquet", RECORD_COLUMNS, ("status", "met_slo"))
    if records is None and (folder / "records").is_dir():
        raise ConfigError(
            f"{folder} holds a cluster of several cells, and a report shows one; its figures are in summary.json, its "
            "requests in records/. Serve a part of them with cells=1 for a report"
        )
    if records is None:
        raise ConfigError(f"{folder} has no records.parquet; give run folders of sim.replay, sim.compare or hw.replay")
    if records["met_slo"].dtype != np.bool_:
        raise ConfigError(f"{folder / 'records.parquet'}: met_slo holds other things than true and false; {AGAIN}")
    config_text, config = _config(folder / "config.yaml")
    return RunData(
        label=str(config.get("label") or "") or _folder_name(folder),
        folder=folder,
        summary=_summary(folder / "summary.json"),
        records=records.sort_values("arrival_s", kind="stable", ignore_index=True),
        iterations=_table(folder / "iterations.parquet", ITERATION_COLUMNS),
        transitions=_table(folder / "transitions.parquet", TRANSITION_COLUMNS, ("from", "to")),
        kept_share=_table(folder / "kept_share.parquet", ("time_s", "kept_share")),
        server=_server(folder / "server.json"),
        config=config,
        config_text=config_text,
        provenance=_object(folder / "provenance.json") or {},
        hardware=_object(folder / "hardware.json"),
    )


def _with_labels(runs: Sequence[RunData]) -> list[RunData]:
    """Return the runs with labels that differ: of equal ones, the names of the folders, longer where needed."""
    labels = [run.label for run in runs]
    parts = 1
    while len(set(labels)) < len(labels):
        repeated = {label for label in labels if labels.count(label) > 1}
        for at, run in enumerate(runs):
            if labels[at] in repeated:
                labels[at] = "/".join(run.folder.absolute().parts[-parts:])
        parts += 1
    return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def _folder_name(folder: Path) -> str:
    """Return the name of a folder without the time at which Hydra made it."""
    name = folder.absolute().name
    return re.sub(r"^\d\d-\d\d-\d\d-\d+_", "", name) or name


def _table(path: Path, numbers: Sequence[str], others: Sequence[str] = ()) -> pd.DataFrame | None:
    """Return a table whose columns ``numbers`` hold numbers; None if there is no such file."""
    if not path.is_file():
        return None
    try:
        frame = pd.read_parquet(path)
    except Exception as error:  # pyarrow raises errors of many types for a file that it cannot read
        raise ConfigError(f"{path} is no Parquet file; {AGAIN}") from error
    if missing := [name for name in (*numbers, *others) if name not in frame]:
        raise ConfigError(f"{path} lacks the column {missing[0]}; {AGAIN}")
    for name in numbers:
        numeric = getattr(frame[name].dtype, "kind", "") in "iufb"
        values = frame[name].to_numpy(dtype=np.float64) if numeric else np.zeros(0)
        if not numeric or (name in ALWAYS and not np.isfinite(values).all()):
            raise ConfigError(f"{path}: the column {name} holds other things than numbers; {AGAIN}")
        if (np.abs(values[np.isfinite(values)]) > LARGEST).any():
            raise ConfigError(f"{path}: the column {name} holds numbers beyond {LARGEST:.0e}; {AGAIN}")
    return frame


def _object(path: Path) -> dict[str, Any] | None:
    return read_json_object(path, ConfigError, AGAIN) if path.is_file() else None


def _summary(path: Path) -> dict[str, Any]:
    found = _object(path)
    if found is None:
        raise ConfigError(f"{path.parent} has no summary.json, so its run is not complete; {AGAIN}")
    for name in (*TARGETS, "itl_s", "slo_attainment"):
        if name not in found:
            raise ConfigError(f"{path} lacks {name}; {AGAIN}")
    for name, value in found.items():
        values = [value] if name in FIGURES else []
        if name in DISTRIBUTIONS:
            values = [value.get(one, "") for one in STATISTICS] if isinstance(value, dict) else [""]
        if not all(one is None or _is_number(one) for one in values):
            raise ConfigError(f"{path}: {name} is {value!r:.80}, not what a replay writes; {AGAIN}")
    return found


def _server(path: Path) -> Server | None:
    found = _object(path)
    if found is None:
        return None
    try:
        layers = found["num_layers"]
        if not is_whole(layers) or not 0 < layers <= MOST_LAYERS:
            raise ValueError(f"num_layers is {layers!r:.80}")
        budget = tuple((float(at_s), float(size)) for at_s, size in found["budget"])
        if not budget or not np.isfinite(budget).all():
            raise ValueError("budget holds other things than times and bytes")
        nll = found["dense_nll"]
        return Server(
            num_layers=layers,
            dense_weight_bytes=float(found["dense_weight_bytes"]),
            dense_nll=None if nll is None else float(nll),
            first_plan=str(found["first_plan"]),
            budget=budget,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{path} is not what a replay writes ({type(error).__name__}: {error}); {AGAIN}") from error


class _PlainLoader(yaml.SafeLoader):
    """Refuses aliases: no run has them, and a few lines of them stand for billions of values."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Return the next node."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("a configuration has no aliases")
        return super().compose_node(parent, index)


def _config(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the text and the values of a configuration; empty if there is none that can be read."""
    try:
        text = path.read_text(encoding="utf-8")
        found = yaml.load(text, _PlainLoader)  # builds nothing, and resolves no ${oc.env:...}
    except (OSError, yaml.YAMLError, RecursionError, UnicodeDecodeError):
        return "", {}
    return text, _mapping(found)


def _mapping(value: Any) -> dict[str, Any]:
    return {str(key): one for key, one in value.items()} if isinstance(value, dict) else {}


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
