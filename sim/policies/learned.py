"""Learned policies: a network from a file, run with NumPy; no torch, no ray.

``python -m agents.export`` writes two files: NAME.safetensors with the weights, and NAME.json with layer sizes,
activation, the tables of observations and actions, how it was trained, and the commit. A policy whose tables differ
from those of the served model is refused, because its inputs and outputs would mean something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.cost.memory import weight_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan, dense_plan, with_mask
from sim.engine.protocol import EngineState
from sim.errors import ConfigError, nearest
from sim.immutable import Immutable
from sim.paths import REPOSITORY
from sim.policies.base import PolicyContext
from sim.policies.learned_files import read_about, read_weights
from sim.policies.observation.prune import (
    ObservationSpec,
    load_columns,
    loads,
    mask_of,
    prune_features,
    prune_table,
    removed_blocks,
    same_table,
)
from sim.policies.prune_guard import PruneGuard, read_guard
from sim.types import Bools, Floats, Floats32

SHIPPED = REPOSITORY / "conf" / "policy"

LOWEST = np.finfo(np.float32).min

_Activation = Callable[[Floats32], Floats32]


def _relu(x: Floats32) -> Floats32:
    return np.maximum(x, np.float32(0.0))


def _tanh(x: Floats32) -> Floats32:
    y: Floats32 = np.tanh(x)
    return y


ACTIVATIONS: dict[str, _Activation] = {"relu": _relu, "tanh": _tanh}


def pair_values(outputs: Any, heads: tuple[int, int]) -> Any:
    """Return the values [..., n * m] of all pairs (i, j), j fastest, from outputs [..., n + m] of two heads.

    Arrays of NumPy and tensors of torch.
    """
    first, second = heads
    sums = outputs[..., :first, None] + outputs[..., None, first:]
    return sums.reshape((*outputs.shape[:-1], first * second))


@dataclass(frozen=True, slots=True)
class Network(Immutable):
    """Float32 perceptrons: per layer, weights [out, in] and biases [out]; an activation between layers.

    With k members, weights are [k, out, in] and biases [k, out], and a value is the mean of the members' values. For
    policies trained by PPO this equals the mean of log-probabilities over the legal actions, up to a constant that all
    actions of a row share (each member's log of its normalizer), so both choose the same action: the one with the
    highest product of the members' probabilities. Members of other trainings must share one unit, such as nats (DQN).

    heads: (n, m) if an action is a pair: the network has n + m outputs, and the value of action i * m + j is the sum of
    outputs i and n + j. None for one output per action.
    """

    weights: tuple[NDArray[np.float32], ...]
    biases: tuple[NDArray[np.float32], ...]
    activation: str = "relu"
    heads: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"unknown activation {self.activation!r}; {nearest(self.activation, ACTIVATIONS)}")
        sizes = [w.shape for w in self.weights]
        fits = all(a[:-2] == b[:-2] and a[-2] == b[-1] for a, b in pairwise(sizes))
        if (
            not sizes
            or len(sizes[0]) not in (2, 3)
            or not fits
            or [b.shape for b in self.biases] != [s[:-1] for s in sizes]
        ):
            raise ConfigError(
                f"the layers {sizes} do not fit one another or their biases; export the policy again: "
                "python -m agents.export"
            )
        if self.heads is not None and sum(self.heads) != sizes[-1][-2]:
            raise ConfigError(
                f"heads {list(self.heads)} need {sum(self.heads)} outputs; the network has {sizes[-1][-2]}"
            )

    @property
    def parameters(self) -> int:
        """The number of learned parameters of all members."""
        return sum(w.size for w in self.weights) + sum(b.size for b in self.biases)

    @property
    def members(self) -> int:
        """The number of perceptrons whose values are averaged."""
        first = self.weights[0]
        return first.shape[0] if first.ndim == 3 else 1

    def member(self, number: int) -> Network:
        """Return one of the perceptrons, the first being 0, as a network of its own."""
        if self.members == 1:
            return self
        weights, biases = (tuple(layer[number] for layer in layers) for layers in (self.weights, self.biases))
        return replace(self, weights=weights, biases=biases)

    @property
    def inputs(self) -> int:
        """The number of features."""
        return int(self.weights[0].shape[-1])

    @property
    def actions(self) -> int:
        """The number of actions."""
        return math.prod(self.heads) if self.heads else int(self.weights[-1].shape[-2])

    def __call__(self, features: Floats32) -> Floats32:
        """Return one value per action, [a] or [n, a], for features [o] or [n, o]."""
        apply = ACTIVATIONS[self.activation]
        several = self.weights[0].ndim == 3
        x = np.atleast_2d(features) if several else features  # [n, o], then [k, n, ...]
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = x @ weight.swapaxes(-1, -2)
            x += bias[:, None] if several else bias
            if i < last:
                x = apply(x)
        if several:
            x = x.mean(axis=0)
            x = x if features.ndim == 2 else x[0]
        return x if self.heads is None else pair_values(x, self.heads)

    def act(self, features: Floats32, legal: Bools, added: Floats | None = None) -> NDArray[np.int64]:
        """Return the legal action with the highest value in each row, after ``added``, [a] or [n, a], is added."""
        # Values of weights near the limits of float32 overflow; a legal action still precedes every illegal one.
        values = np.fmax(self(features), LOWEST)
        if added is not None:
            values = values + added
        chosen: NDArray[np.int64] = np.where(legal, values, -np.inf).argmax(axis=-1)
        return chosen


@dataclass(frozen=True, slots=True)
class Learned:
    """An exported policy: its network and the content of its JSON file."""

    network: Network
    about: Mapping[str, Any]
    path: Path


def read_learned(path: str | Path, task: str) -> Learned:
    """Read NAME.json and NAME.safetensors; a name without suffix means a file of conf/policy.

    Args:
        path: the JSON file, or a name. task: the environment that the policy must have been trained in.
    Raises:
        ConfigError: if it is missing, malformed, or was trained in another environment.
    """
    file = Path(str(path))
    if file.suffix != ".json":
        file = SHIPPED / f"{path}.json"
    if not _exists(file):
        known = [p.stem for p in SHIPPED.glob("*.json")]
        raise ConfigError(
            f"there is no learned policy {str(path)!r}; {nearest(str(path), known)}, or give the path of a .json file"
        )
    try:
        about = read_about(file)
        if about["task"] != task:
            raise ValueError(f"it was trained for {about['task']!r}; expected {task!r}")
        layers = read_weights(file.with_suffix(".safetensors"), about["layers"], about.get("members", 1))
        network = network_of(layers, about["activation"], about.get("heads"))
    except (OSError, ValueError, MemoryError) as error:
        text = " ".join(str(error).split())[:500]
        raise ConfigError(
            f"{file} is not a learned policy for {task} ({type(error).__name__}: {text}); "
            "export one: python -m agents.export run=..."
        ) from error
    return Learned(network, about, file)


def _exists(file: Path) -> bool:
    try:
        return file.exists()
    except (OSError, ValueError):  # a name that is too long or has a null byte
        return False


def check_tables(learned: Learned, table: ObservationSpec) -> None:
    """Check that a policy was trained with exactly this table, and that its network has these inputs and outputs.

    Raises:
        ConfigError: if not; the message names the first entry that differs.
    """
    if difference := same_table(table, learned.about):
        raise ConfigError(
            f"{learned.path.name} was trained for another observation or other actions: {difference}; "
            f"use it with model={learned.about.get('model')}, or train one for this: python -m agents.train"
        )
    sizes = learned.network.inputs, learned.network.actions
    if sizes != (table.features, len(table.actions)):
        raise ConfigError(
            f"{learned.path.name}: its network has {sizes[0]} inputs and {sizes[1]} actions, but its table has "
            f"{table.features} entries and {len(table.actions)} actions; export it again: python -m agents.export"
        )


# --- RAP's policy: drop blocks until the load fits -------------------------------------------------------------------


@dataclass(slots=True)
class PruneNetwork:
    """Drops blocks one by one, as the network chooses, until a load fits its budget.

    scores: float32[b], the loss of each block alone, if the network observes it. shown: bool[o], False for entries that
    were hidden in training; None shows all. guard: keeps greedy_stop's plan unless the network's is clearly better.
    """

    model: ModelSpec
    network: Network
    scores: Floats32 | None = None
    shown: Bools | None = None
    guard: PruneGuard | None = None

    def removed_for(self, batch: int, sequence_tokens: int, budget_bytes: int) -> Bools:
        """Return which blocks to drop from the dense model, bool[b]."""
        load = loads(self.model, [batch], [sequence_tokens], [budget_bytes])
        columns = load_columns(load, self.model.num_layers)
        removed = np.zeros((1, 2 * self.model.num_layers), dtype=np.bool_)
        mha_bytes, ffn_bytes = int(load.mha_bytes[0]), int(load.ffn_bytes[0])
        peak = int(load.dense_bytes[0])
        for _ in range(removed.size):
            if peak <= budget_bytes:
                break
            features = prune_features(load, columns, removed, np.array([peak]), self.scores)
            if self.shown is not None:
                features *= self.shown
            block = int(self.network.act(features, ~removed)[0])
            removed[0, block] = True
            peak -= ffn_bytes if block % 2 else mha_bytes
        chosen: Bools = removed[0]
        if self.guard is not None:
            return self.guard(chosen, int(load.dense_bytes[0]), budget_bytes, (mha_bytes, ffn_bytes))
        return chosen


def prune_network(model: ModelSpec, path: str | Path) -> PruneNetwork:
    """Read a policy of ``PruneToBudget`` for a model.

    Raises:
        ConfigError: if it was trained on another model or with other tables.
    """
    learned = read_learned(path, "PruneToBudget")
    environment = learned.about.get("environment", {})
    if environment.get("restore") or environment.get("sequence", 1) != 1:
        raise ConfigError(
            f"{learned.path.name} was trained with restore or a sequence of loads, which a replay does "
            "not support; use a policy trained with restore=false sequence=1"
        )
    table = prune_table(model, scores=bool(environment.get("scores")))
    if learned.about.get("model") != model.name:
        raise ConfigError(f"{learned.path.name} was trained on {learned.about.get('model')}, not on {model.name}")
    scores = None
    if environment.get("scores"):
        scores = np.array(learned.about.get("scores", ()), dtype=np.float32)
        if len(scores) != 2 * model.num_layers:
            raise ConfigError(
                f"{learned.path.name} has {len(scores)} scores for {2 * model.num_layers} blocks of {model.name}; "
                "export it again: python -m agents.export"
            )
    check_tables(learned, table)
    hidden = set(environment.get("hide", ()))
    shown = np.array([entry.name.split(".")[0] not in hidden for entry in table.entries])
    guard = read_guard(model, learned.about["guard"]) if "guard" in learned.about else None
    return PruneNetwork(model, learned.network, scores, None if shown.all() else shown, guard)


@dataclass(slots=True)
class LearnedPrune:
    """RAP's policy while serving: prunes for the current load, and restores blocks after ``patience`` decisions.

    The load is the number of running requests and their mean length. The network was trained on complete generations,
    so ``headroom``, a factor on that length, stands for the tokens still to come.
    """

    dense: Plan
    prune: PruneNetwork
    dense_bytes: int
    workspace_bytes: int
    headroom: float
    patience: int
    running: Plan | None = None
    calm: int = field(default=0)

    @property
    def first_plan(self) -> Plan:
        """Dense."""
        return self.dense

    def __call__(self, state: EngineState) -> Plan:
        """Run the network if memory is short, or if it has sufficed for ``patience`` decisions."""
        present = self.running or self.dense
        budget_bytes = min(state.budget_bytes, state.next_budget_bytes) - self.workspace_bytes
        batch = max(1, state.running)
        tokens = max(1, round(self.headroom * state.running_tokens / batch))
        load = loads(self.prune.model, [batch], [tokens], [budget_bytes])
        fits = bool(load.peak_bytes(removed_blocks(present.decode)[None])[0] <= budget_bytes)
        if fits and present == self.dense:
            self.calm = 0
            return self.dense
        self.calm = self.calm + 1 if fits else self.patience
        if self.calm >= self.patience:
            removed = self.prune.removed_for(batch, tokens, budget_bytes)
            self.running, self.calm = with_mask(self.dense, mask_of(removed)), 0
        return self.running or self.dense


def learned_prune(served: PolicyContext, *, path: str, headroom: float = 1.1, patience: int = 5) -> LearnedPrune:
    """Build the policy from an exported file.

    Args:
        served: what the policy knows of the server.
        path: a JSON file of ``agents.export``, or the name of one in conf/policy.
        headroom, patience: as in ``LearnedPrune``.
    Raises:
        ConfigError: for a file that does not fit the model, or a headroom or patience below 1.
    """
    if not headroom >= 1.0 or patience < 1:
        raise ConfigError(f"policy.headroom is {headroom} and patience {patience}; both must be at least 1")
    dense = dense_plan(served.model)
    return LearnedPrune(
        dense=dense,
        prune=prune_network(served.model, path),
        dense_bytes=weight_bytes(served.model, dense),
        workspace_bytes=served.workspace_bytes,
        headroom=headroom,
        patience=patience,
    )


def network_of(
    arrays: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]],
    activation: str,
    heads: Sequence[int] | None = None,
) -> Network:
    """Return the network of (weight, bias) pairs."""
    pair = None if heads is None else (int(heads[0]), int(heads[1]))
    return Network(tuple(w for w, _ in arrays), tuple(b for _, b in arrays), activation, pair)


def averaged(networks: Sequence[Network]) -> Network:
    """Return the network whose members are these networks, which must have equal layers; one alone stays as it is.

    Raises:
        ConfigError: if their layers, activations or heads differ, or one has several members already.
    """
    first = networks[0]
    if len(networks) == 1:
        return first
    shapes = [w.shape for w in first.weights]
    for other in networks:
        if other.members != 1 or [w.shape for w in other.weights] != shapes:
            raise ConfigError(f"members need equal layers; {[w.shape for w in other.weights]} differ from {shapes}")
        if (other.activation, other.heads) != (first.activation, first.heads):
            raise ConfigError("members need the same activation and the same heads")
    weights = tuple(np.stack(same) for same in zip(*(n.weights for n in networks), strict=True))
    biases = tuple(np.stack(same) for same in zip(*(n.biases for n in networks), strict=True))
    return replace(first, weights=weights, biases=biases)
