"""What a learned policy observes: every entry with name, unit and range, and the functions that compute it.

The environments in ``agents`` and the policies trained in them call the same functions, so that a policy observes the
same numbers in a replay as in training. An exported policy contains these tables and is refused if they differ. The
texts of entries are part of the comparison: changing one invalidates the policies in conf/policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sim.cost.memory import ffn_weight_bytes, mha_weight_bytes, peak_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import KeepMask, keep_all
from sim.types import Bools, Floats32, Ints

# Shapes: n loads or environments, b = 2 * layers blocks in the order MHA0, FFN0, MHA1, ..., a actions, o entries.


@dataclass(frozen=True, slots=True)
class Entry:
    """One number of an observation."""

    name: str
    unit: str
    low: float
    high: float
    meaning: str


@dataclass(frozen=True, slots=True)
class ObservationSpec:
    """The entries of an observation, in order, and the actions; one flag per action follows the entries.

    entries: without the flags. actions: names; flag i states whether action i is legal.
    """

    entries: tuple[Entry, ...]
    actions: tuple[str, ...]

    @property
    def features(self) -> int:
        """The number of entries that a network reads: all but the flags."""
        return len(self.entries)

    @property
    def size(self) -> int:
        """The number of values in an observation, flags included."""
        return len(self.entries) + len(self.actions)

    def rows(self) -> list[dict[str, Any]]:
        """Return every entry as a dict, flags included."""
        flags = [Entry(f"legal.{name}", "flag", 0.0, 1.0, f"whether {name} is allowed now") for name in self.actions]
        return [asdict(entry) for entry in (*self.entries, *flags)]

    def bounds(self) -> tuple[Floats32, Floats32]:
        """Return the lowest and the highest value of each entry, float32[size] each."""
        rows = self.rows()
        low = np.array([row["low"] for row in rows], dtype=np.float32)
        return low, np.array([row["high"] for row in rows], dtype=np.float32)

    def markdown(self) -> str:
        """Return the table as Markdown; entries that differ only in the block share one line."""
        lines = ["| entry | unit | range | meaning |", "|---|---|---|---|"]
        seen: set[str] = set()
        for row in self.rows():
            kind = str(row["name"]).split(".")[0]
            if kind in seen:
                continue
            seen.add(kind)
            count = sum(str(other["name"]).split(".")[0] == kind for other in self.rows())
            name = row["name"] if count == 1 else f"{row['name']} ... ({count} entries)"
            lines.append(f"| `{name}` | {row['unit']} | {row['low']:g} to {row['high']:g} | {row['meaning']} |")
        return "\n".join(lines) + "\n"


def block_names(layers: int) -> tuple[str, ...]:
    """Return ``MHA0, FFN0, MHA1, ...``."""
    return tuple(f"{kind}{layer}" for layer in range(layers) for kind in ("MHA", "FFN"))


def removed_blocks(mask: KeepMask) -> Bools:
    """Return bool[b], True for blocks that the mask drops."""
    removed = np.empty(2 * len(mask.mha), dtype=np.bool_)
    removed[0::2], removed[1::2] = np.logical_not(mask.mha), np.logical_not(mask.ffn)
    return removed


def mask_of(removed: Bools) -> KeepMask:
    """Return the mask that drops these blocks, bool[b]."""
    kept = (~removed).tolist()
    return KeepMask(mha=tuple(kept[0::2]), ffn=tuple(kept[1::2]))


# --- Pruning to a budget: RAP's own setting ---------------------------------------------------------------------------

PRUNE_LOAD_ENTRIES = (
    Entry("batch", "log2(requests) / 8", 0.0, 1.0, "sequences B that are served together"),
    Entry("sequence_tokens", "log2(tokens) / 16", 0.0, 1.0, "prompt and output of each, S"),
    Entry("budget_share", "of the dense peak", 0.0, 1.0, "memory there is"),
    Entry("peak_share", "of the dense peak", 0.0, 1.0, "memory that the kept blocks need at their peak"),
    Entry("missing_share", "of the dense peak", 0.0, 1.0, "memory that is still missing; 0 once the plan fits"),
    Entry("kv_share", "of the dense peak", 0.0, 1.0, "KV cache of the dense model"),
    Entry("mha_share", "of the dense peak", 0.0, 1.0, "all MHA blocks, their KV included"),
    Entry("ffn_share", "of the dense peak", 0.0, 1.0, "all FFN blocks"),
    Entry(
        "mha_over_ffn", "log2(ratio) / 4", -1.0, 1.0, "what dropping one MHA block frees, over what one FFN block frees"
    ),
    Entry("missing_mha", "MHA blocks / layers", 0.0, 4.0, "how many MHA blocks would free what is missing"),
    Entry("missing_ffn", "FFN blocks / layers", 0.0, 4.0, "how many FFN blocks would free what is missing"),
)


def prune_table(model: ModelSpec, *, scores: bool = False, restore: bool = False) -> ObservationSpec:
    """Return the table of ``PruneToBudget``.

    scores: adds the loss of each block alone. restore: adds actions that restore blocks, and one that accepts.
    """
    names = block_names(model.num_layers)
    entries = [*PRUNE_LOAD_ENTRIES]
    entries += [Entry(f"kept.{name}", "flag", 0.0, 1.0, "whether the block runs") for name in names]
    if scores:
        entries += [
            Entry(f"score.{name}", "nats a token", 0.0, 4.0, "loss when this block alone is dropped") for name in names
        ]
    actions = [f"drop {name}" for name in names]
    if restore:
        actions += ["accept", *(f"restore {name}" for name in names)]
    return ObservationSpec(tuple(entries), tuple(actions))


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """n loads and their memory; bytes are exact, int64[n].

    mha_bytes, ffn_bytes: what dropping one block frees, an MHA block with its KV. kv_bytes: KV of the dense model.
    """

    batch: Ints
    sequence_tokens: Ints
    budget_bytes: Ints
    dense_bytes: Ints
    mha_bytes: Ints
    ffn_bytes: Ints
    kv_bytes: Ints

    def peak_bytes(self, removed: Bools) -> Ints:
        """Return the peak bytes, int64[n], without the blocks ``removed``, bool[n, b] (RAP's memory model)."""
        mha, ffn = removed[:, 0::2].sum(axis=1), removed[:, 1::2].sum(axis=1)
        peak: Ints = self.dense_bytes - mha * self.mha_bytes - ffn * self.ffn_bytes
        return peak


def loads(model: ModelSpec, batch: Sequence[int], sequence_tokens: Sequence[int], budget_bytes: Sequence[int]) -> Loads:
    """Return the memory of a model under loads and budgets, each a sequence of n."""
    b, s = np.asarray(batch, dtype=np.int64), np.asarray(sequence_tokens, dtype=np.int64)
    kv_layer = b * s * model.kv_bytes_per_token_layer
    return Loads(
        batch=b,
        sequence_tokens=s,
        budget_bytes=np.asarray(budget_bytes, dtype=np.int64),
        dense_bytes=peak_bytes(model, keep_all(model), 0, 0) + model.num_layers * kv_layer,
        mha_bytes=mha_weight_bytes(model) + kv_layer,
        ffn_bytes=np.full(len(b), ffn_weight_bytes(model), dtype=np.int64),
        kv_bytes=model.num_layers * kv_layer,
    )


def load_columns(load: Loads, layers: int) -> Floats32:
    """Return the entries of ``PRUNE_LOAD_ENTRIES`` that no action changes, float32[n, 7]: all but peak and missing."""
    dense = load.dense_bytes.astype(np.float64)
    columns = (
        np.log2(np.maximum(load.batch, 1)) / 8.0,
        np.log2(np.maximum(load.sequence_tokens, 1)) / 16.0,
        load.budget_bytes / dense,
        load.kv_bytes / dense,
        layers * load.mha_bytes / dense,
        layers * load.ffn_bytes / dense,
        np.log2(load.mha_bytes / load.ffn_bytes) / 4.0,
    )
    return np.clip(np.stack(columns, axis=1), (0.0,) * 6 + (-1.0,), 1.0).astype(np.float32)


def prune_features(load: Loads, columns: Floats32, removed: Bools, peak: Ints, scores: Floats32 | None) -> Floats32:
    """Return the features of ``prune_table`` without the legal flags, float32[n, o].

    Args:
        load: the loads. columns: their ``load_columns``. peak: their ``peak_bytes``.
        removed: bool[n, b], the blocks already dropped.
        scores: float32[b], the loss of each block alone, if the table has it.
    """
    n, blocks = removed.shape
    fixed = len(PRUNE_LOAD_ENTRIES)
    out = np.empty((n, fixed + blocks + (0 if scores is None else blocks)), dtype=np.float32)
    missing = np.maximum(peak - load.budget_bytes, 0)
    layers = blocks // 2
    out[:, 0:3] = columns[:, 0:3]
    out[:, 3] = peak / load.dense_bytes
    out[:, 4] = missing / load.dense_bytes
    out[:, 5:9] = columns[:, 3:7]
    out[:, 9] = np.minimum(missing / (load.mha_bytes * layers), 4.0)
    out[:, 10] = np.minimum(missing / (load.ffn_bytes * layers), 4.0)
    np.logical_not(removed, out=out[:, fixed : fixed + blocks], casting="unsafe")
    if scores is not None:
        out[:, fixed + blocks :] = scores
    return out


def prune_legal(removed: Bools, fits: Bools, restore: bool) -> Bools:
    """Return which actions of ``prune_table`` are legal, bool[n, a].

    A kept block can be dropped, a dropped one restored. Accepting is legal once the plan fits, or if every block is
    dropped.
    """
    if not restore:
        return ~removed
    accept = fits | removed.all(axis=1)
    return np.concatenate((~removed, accept[:, None], removed), axis=1)


def same_table(table: ObservationSpec, exported: Mapping[str, Any]) -> str:
    """Return the first difference between a table and that of an exported policy; empty if they are equal."""
    rows = exported.get("observation", [])
    if len(rows) != table.size:
        return f"it has {len(rows)} entries, this table has {table.size}"
    for ours, theirs in zip(table.rows(), rows, strict=True):
        if ours != theirs:
            return f"its entry {theirs.get('name')!r} is {theirs}, in this table {ours}"
    if list(table.actions) != list(exported.get("actions", [])):
        return f"its {len(exported.get('actions', []))} actions differ from the {len(table.actions)} of this table"
    return ""
