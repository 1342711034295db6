"""Policies that lower the bits of products and keep the resident weights (``Plan.compute_bits``): nothing is copied.

``compute_precision`` lowers them while the server is late. With one step over all layers it is NestedFP's mechanism
(arXiv 2506.02024: one 16-bit copy, read as FP16 or FP8 in any iteration), as ``policy=nestedfp``. With steps over 8-bit
weights it is FlexQuant's and Any-precision LLM's (arXiv 2506.12024, 2402.10517: from 8 to 4 bits), as
``policy=flexquant``. FlexQuant itself moves layers as the entropy of the output falls, and in the order of their KL
divergence; entropies of outputs are unknown to a simulator, so here load decides, and layers go front to back.

``pmpd`` lowers them as decoding goes on (PMPD, arXiv 2410.13461). There every request has its own bits: prefill and its
first tokens at high ones, later tokens at low ones. Here one iteration has one precision, so a batch follows the
majority of its requests. Bits for each request would take three things: two groups of decodes in the engine's sums over
KV sets, by how many tokens they have produced; two sets of products in the price of an iteration, each over its own
tokens and with its own read of the weights; and a real engine that computes a batch in two groups. An iteration with
both groups would read all bits of the weights anyway, so it would save little of what PMPD saves at batch 1.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from sim.cost.plan import LARGEST, Plan, check_plan, is_positive
from sim.engine.protocol import EngineState
from sim.errors import ConfigError
from sim.limits import is_whole
from sim.policies.base import PolicyContext
from sim.policies.fixed import static_plan


@dataclass(slots=True)
class ComputePrecision:
    """Runs ``plans[level]``: one level up whenever the server is late, one down when it is well in time.

    It is late if iterations took longer than ``tpot_s`` on average since the last decision, or if the queue's head has
    waited longer than ``wait_s``; well in time if both are below ``calm`` times that. Between the two the level stays:
    ``calm`` must be below the time at low bits over that at high ones, or the level swings to and fro.
    """

    plans: tuple[Plan, ...]
    tpot_s: float
    wait_s: float
    calm: float
    level: int = 0
    before: tuple[int, float] = (0, 0.0)

    @property
    def first_plan(self) -> Plan:
        """Products at all bits of the weights."""
        return self.plans[0]

    def __call__(self, state: EngineState) -> Plan:
        """Take one sample and set the level."""
        iterations, busy_s = self.before
        self.before = state.iterations, state.busy_s
        done = state.iterations - iterations
        mean_s = (state.busy_s - busy_s) / done if done > 0 else 0.0
        late = max(mean_s / self.tpot_s, state.oldest_wait_s / self.wait_s)
        if late > 1.0:
            self.level = min(self.level + 1, len(self.plans) - 1)
        elif late < self.calm:
            self.level = max(self.level - 1, 0)
        return self.plans[self.level]


def compute_precision(
    served: PolicyContext,
    *,
    weight_bits: int | None = None,
    levels: int = 1,
    tpot_s: float = 0.05,
    wait_s: float = 0.5,
    calm: float = 0.5,
) -> ComputePrecision:
    """Build the policy: ``levels`` steps from all bits of the weights to half of them in all layers, front to back.

    Args:
        weight_bits: of the resident weights, 16 or 8; None takes those of the checkpoint.
        levels: steps, each over as many layers.
        tpot_s: how long an iteration may take, and with it a token.
        wait_s: how long a request may wait for its admission.
        calm: the share of both below which bits rise again.
    Raises:
        ConfigError: for numbers out of range. PlanError: for weights of which no half can be read.
    """
    if not (is_whole(levels) and 1 <= levels <= LARGEST):
        raise ConfigError(f"policy.levels is {levels!r}; it must be a whole number from 1")
    if not (is_positive(tpot_s) and is_positive(wait_s) and 0.0 <= calm < 1.0):
        raise ConfigError(
            f"policy.tpot_s is {tpot_s}, wait_s {wait_s}, calm {calm}; they must be above 0, above 0 and in [0, 1)"
        )
    layers = served.model.num_layers
    return ComputePrecision(
        tuple(half_precision(served, weight_bits, round(layers * level / levels)) for level in range(levels + 1)),
        tpot_s=tpot_s,
        wait_s=wait_s,
        calm=calm,
    )


def half_precision(served: PolicyContext, weight_bits: int | None, count: int) -> Plan:
    """Return the plan whose first ``count`` layers compute at half of the bits of their weights.

    Raises:
        PlanError: for weights of which no half can be read.
    """
    full = static_plan(served.model, weight_bits=weight_bits)
    bits = full.weight_bits[0]
    plan = replace(full, compute_bits=tuple(bits // 2 if i < count else bits for i in range(len(full.weight_bits))))
    check_plan(served.model, plan)
    return plan


@dataclass(slots=True)
class Pmpd:
    """Runs ``plans[1]``, at half of the bits, while few of the running requests are young, and ``plans[0]`` otherwise.

    A request is young until it has produced ``high_tokens``. Each iteration gives every decode one token, so those are
    young whose first token came within the last ``high_tokens`` iterations; some of them may have ended since.
    seen: (iterations, first tokens so far) at earlier decisions, oldest first.
    """

    plans: tuple[Plan, Plan]
    high_tokens: int
    most_young: float
    seen: deque[tuple[int, int]] = field(default_factory=deque)

    @property
    def first_plan(self) -> Plan:
        """Products at all bits of the weights."""
        return self.plans[0]

    def __call__(self, state: EngineState) -> Plan:
        """Count the young requests."""
        self.seen.append((state.iterations, state.first_tokens))
        since = state.iterations - self.high_tokens
        while len(self.seen) > 1 and self.seen[1][0] <= since:
            self.seen.popleft()
        # Before the first decision that is that old, all are young that ever got a token.
        before = self.seen[0][1] if self.seen[0][0] <= since else 0
        young = min(state.first_tokens - before, state.running)
        return self.plans[bool(state.running) and young <= self.most_young * state.running]


def pmpd(
    served: PolicyContext, *, weight_bits: int | None = None, high_tokens: int = 85, most_young: float = 0.5
) -> Pmpd:
    """Build the policy.

    Args:
        weight_bits: of the resident weights, 16 or 8; None takes those of the checkpoint.
        high_tokens: tokens that a request decodes at all bits. The paper's learned scheduler chooses among 0, T/3, 2T/3
            and T = 255; the default is T/3.
        most_young: share of the running requests that may have produced fewer than that at half of the bits.
    Raises:
        ConfigError: for numbers out of range. PlanError: for weights of which no half can be read.
    """
    if not (is_whole(high_tokens) and 0 <= high_tokens <= LARGEST and 0.0 <= most_young <= 1.0):
        raise ConfigError(
            f"policy.high_tokens is {high_tokens!r} and most_young {most_young}; they must be a whole number of tokens "
            "from 0 on, and in [0, 1]"
        )
    low = half_precision(served, weight_bits, served.model.num_layers)
    return Pmpd((static_plan(served.model, weight_bits=weight_bits), low), high_tokens, most_young)
