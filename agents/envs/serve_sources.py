"""The traces that the windows of ``ServeTrace`` come from, and the part of each that a split may use.

conf/split/serve.yaml lists the sources. A source is either one trace cut in time (``parts``), or a generated trace of
its own for each split (``splits``), which then follow each other in time. No rate over time that training sees returns
in validation or test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from agents.envs.prune_loads import SPLITS
from agents.envs.serve_requests import Chains, chains_of, check_windows_of
from sim.config import build, build_option, load_option, option_path
from sim.errors import ConfigError, TraceError, nearest
from sim.paths import find_data
from sim.traces.trace import Trace, sorted_trace
from sim.traces.transforms import apply_steps, drop_long

KEYS = ("trace", "rate", "overrides", "steps", "parts", "splits", "repeats", "named_only", "made_of")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What conf/split/serve.yaml says of a source.

    trace: name of a file of conf/trace. rate: lowest and highest speed-up of arrivals in training.
    overrides: keys of the trace that differ. steps: workload steps, as in conf/workload.
    parts: for each split that may use it, start and end as shares of the trace's duration; empty with ``splits``.
    splits: for each split that may use it, more keys of the trace; ``duration_s`` must be one of them, or
        ``arrivals`` with it.
    repeats: whether it is one piece that repeats, so that its windows are no independent ones.
    made_of: sources whose rates over time it takes; it is no test trace next to them.
    named_only: whether it is left out wherever a configuration does not name it: it suits some models alone.
    """

    trace: str
    rate: tuple[float, float]
    overrides: Mapping[str, Any]
    steps: tuple[Mapping[str, Any], ...]
    parts: Mapping[str, tuple[float, float]]
    splits: Mapping[str, Mapping[str, Any]]
    repeats: bool = False
    named_only: bool = False
    made_of: tuple[str, ...] = ()

    @property
    def lent_to(self) -> tuple[str, ...]:
        """The splits that may use it."""
        return tuple(split for split in SPLITS if split in (self.splits or self.parts))

    @property
    def file(self) -> str | None:
        """The file or folder that the trace is read from; None for a generated trace."""
        path = self.overrides.get("path", load_option("trace", self.trace).get("path"))
        return None if path is None else str(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceTrace:
    """The requests of a source, and where each split begins and ends, in seconds.

    chains: which turns of its sessions follow each other; None without sessions.
    """

    trace: Trace
    spans_s: Mapping[str, tuple[float, float]]
    chains: Chains | None = None

    def from_s(self, at_s: float) -> float:
        """Return the start of the split in which a time lies, in seconds; 0 before all of them."""
        return max((begin_s for begin_s, _ in self.spans_s.values() if begin_s <= at_s), default=0.0)


@cache
def serve_split() -> dict[str, Any]:
    """Return the content of conf/split/serve.yaml.

    Raises:
        ConfigError: if it cannot be read.
    """
    path = option_path("split", "serve")
    try:
        value: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        return dict(value)
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is not a valid split of windows ({type(error).__name__}: {error})") from error


@cache
def sources() -> dict[str, Source]:
    """Return the sources by name.

    Raises:
        ConfigError: if one is malformed, or its parts overlap.
    """
    content = serve_split()
    found = {}
    for name, value in content.get("sources", {}).items():
        try:
            found[str(name)] = _source(content["parts"], value)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"conf/split/serve.yaml: sources.{name} is not valid ({type(error).__name__}: {error})"
            ) from error
    return found


def _source(parts: Mapping[str, Any], value: Mapping[str, Any]) -> Source:
    for key in value:
        if key not in KEYS:
            raise ValueError(f"there is no key {key!r}; {nearest(str(key), KEYS)}")
    splits = dict(value.get("splits", {}))
    own = {} if splits else {name: (float(a), float(b)) for name, (a, b) in value.get("parts", parts).items()}
    ordered = sorted(own.values())
    if any(later[0] < earlier[1] for earlier, later in pairwise(ordered)) or not all(
        0.0 <= low < high <= 1.0 for low, high in ordered
    ):
        raise ValueError(f"parts must be shares from 0 to 1 that do not overlap, but are {own}")
    if unknown := {*splits, *own} - {*SPLITS}:
        raise ValueError(f"there is no split {sorted(unknown)[0]!r}; {nearest(sorted(unknown)[0], SPLITS)}")
    if any(_duration_s(changed) is None for changed in splits.values()):
        raise ValueError("each of splits needs duration_s, or arrivals with it")
    low, high = value["rate"]
    return Source(
        trace=str(value["trace"]),
        rate=(float(low), float(high)),
        overrides=dict(value.get("overrides", {})),
        steps=tuple(value.get("steps", ())),
        parts=own,
        splits=splits,
        repeats=bool(value.get("repeats", False)),
        made_of=tuple(value.get("made_of", ())),
        named_only=bool(value.get("named_only", False)),
    )


def _duration_s(changed: Mapping[str, Any]) -> float | None:
    """Return the seconds of a generated trace; None if its keys do not say."""
    arrivals = changed.get("arrivals")
    seconds = changed.get("duration_s", arrivals.get("duration_s") if isinstance(arrivals, Mapping) else None)
    return None if seconds is None else float(seconds)


def source_of(name: str) -> Source:
    """Return a source by name.

    Raises:
        ConfigError: for an unknown name.
    """
    known = sources()
    if name not in known:
        raise ConfigError(f"there is no source {name!r} in conf/split/serve.yaml; {nearest(name, known)}")
    return known[name]


def sources_with(split: str) -> tuple[list[str], list[str]]:
    """Return the sources for any model that lend a part to a split and whose data is here, and a sentence on others."""
    names, notes = [], []
    for name, source in sources().items():
        if split not in source.lent_to or source.named_only:
            continue
        if source.file is None or find_data(source.file).exists():
            names.append(name)
        else:
            notes.append(f"{name} is left out: {source.file} is not here; set RAP_LAB_DATA to the folder that holds it")
    return names, notes


def own_sources(names: Sequence[str]) -> list[str] | None:
    """Return those sources of a training that suit its model alone, on which it is validated; None without any."""
    return [name for name in names if source_of(name).named_only] or None


@cache
def load_source(name: str) -> SourceTrace:
    """Return the requests of a source, without those that exceed the model's context.

    Raises:
        ConfigError: for an unknown source. TraceError: if its file is missing.
    """
    source = source_of(name)
    if not source.splits:
        trace = _built(name, source, {})
        trace = replace(trace, arrival_s=trace.arrival_s - trace.arrival_s[0])
        duration_s = float(trace.arrival_s[-1])
        spans = {split: (a * duration_s, b * duration_s) for split, (a, b) in source.parts.items()}
        return SourceTrace(trace=trace, spans_s=spans, chains=chains_of(trace))
    traces, spans_s, begin_s = [], {}, 0.0
    for split in source.lent_to:
        changed = source.splits[split]
        trace = _built(name, source, changed)
        spans_s[split] = (begin_s, begin_s + (_duration_s(changed) or 0.0))
        traces.append(replace(trace, arrival_s=trace.arrival_s + begin_s))
        begin_s = spans_s[split][1]
    joined = _one_after_another(traces, name)
    return SourceTrace(trace=joined, spans_s=spans_s, chains=chains_of(joined))


def _one_after_another(traces: Sequence[Trace], name: str) -> Trace:
    """Return the traces of the splits as one. Only turns of sessions may come after their split has ended."""
    columns: dict[str, Any] = {
        key: np.concatenate([getattr(trace, key) for trace in traces])
        for key in ("arrival_s", "prompt_tokens", "output_tokens")
    }
    if traces[0].session is None:  # spans do not overlap, so they stay in order
        return Trace(**columns, name=name)
    sessions, ids, sessions_before, ids_before = [], [], 0, 0
    for trace in traces:  # equal numbers in two splits are different sessions, and different blocks of tokens
        assert trace.session is not None
        sessions.append(trace.session + sessions_before)
        sessions_before = int(sessions[-1].max()) + 1
        if trace.hash_ids is not None:
            ids += [one + ids_before for one in trace.hash_ids]
            ids_before = max((int(one.max()) + 1 for one in ids if len(one)), default=0)
    think_s = np.concatenate([trace.think_s for trace in traces if trace.think_s is not None])
    return sorted_trace(
        **columns,
        hash_ids=ids or None,
        session=np.concatenate(sessions),
        think_s=think_s,
        name=name,
        hash_block_tokens=traces[0].hash_block_tokens,
    )


def _built(name: str, source: Source, changed: Mapping[str, Any]) -> Trace:
    """Return the trace of a source with some keys changed, after its steps."""
    try:
        trace: Trace = build_option("trace", source.trace, {**source.overrides, **changed})
        trace = apply_steps(trace, [build(OmegaConf.create(dict(step))) for step in source.steps])
    except TraceError as error:  # its hints name keys of the group trace
        where = f"sources.{name} of conf/split/serve.yaml"
        raise TraceError(f"{error} ({where} holds the trace's keys, without trace.)") from error
    check_windows_of(trace, f"sources.{name} of conf/split/serve.yaml")
    return drop_long(trace, max_total_tokens=int(serve_split()["max_total_tokens"]))


def source_trace(name: str) -> Trace:
    """Return the requests of a source (``load_source``)."""
    return load_source(name).trace


def source_span_s(name: str, split: str) -> tuple[float, float]:
    """Return the start and end of a split in a source, in seconds of its trace.

    Raises:
        ConfigError: if the source lends no part to the split.
    """
    source = source_of(name)
    if split not in source.lent_to:
        others = ", ".join(other for other, one in sources().items() if split in one.lent_to)
        raise ConfigError(
            f"{name} has no {split} part in conf/split/serve.yaml (it has {', '.join(source.lent_to)}); sources with "
            f"one: {others}"
        )
    return load_source(name).spans_s[split]


__all__ = [
    "Source",
    "SourceTrace",
    "load_source",
    "own_sources",
    "serve_split",
    "source_of",
    "source_span_s",
    "source_trace",
    "sources",
    "sources_with",
]
