"""``apt_serve``: keys and values, or hidden states, by what Apt-Serve says that each is worth (arXiv 2504.07494).

Apt-Serve composes the batch of each iteration again: it sorts requests by value over memory, and may give each of them
keys and values or hidden states. The value v of a request is how long it has waited. With hidden states it is worth
v - U c n, as each iteration then computes keys and values of its n tokens, c seconds each, for which U requests wait.
It gets hidden states first if that is at least v / 2, and keys and values if memory is left then.

Here ``engine.admission_order=value`` admits requests by value over memory, and what a request keeps follows from the
plan that runs when its prefill ends. So this policy decides for all requests of a period at once, by that comparison
for the queue: v is the wait of its head, n the mean tokens of its requests, U all requests that wait or run (our
reading of the paper), and memory is left if the keys and values of all of these fit the pool.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sim.cost.latency_tables import KV_SHARE
from sim.cost.plan import Plan, check_plan, dense_plan
from sim.engine.protocol import EngineState
from sim.errors import ConfigError
from sim.policies.base import PolicyContext


@dataclass(slots=True)
class AptServe:
    """Runs ``plans[1]``, which keeps hidden states, while the pool is short and the queue has waited long enough.

    plans: keys and values, hidden states. token_s: seconds in which an iteration computes keys and values of a token.
    kv_block_tokens, num_layers: how the pool is counted.
    """

    plans: tuple[Plan, Plan]
    token_s: float
    kv_block_tokens: int
    num_layers: int

    @property
    def first_plan(self) -> Plan:
        """Keys and values."""
        return self.plans[0]

    def __call__(self, state: EngineState) -> Plan:
        """Compare what both are worth to the request that waits longest."""
        pool_tokens = state.kv_layer_blocks * self.kv_block_tokens // self.num_layers
        if state.waiting == 0 or state.running_tokens + state.waiting_tokens <= pool_tokens:
            return self.plans[0]
        tokens = state.waiting_tokens / state.waiting
        delay_s = (state.waiting + state.running) * self.token_s * tokens
        return self.plans[state.oldest_wait_s - delay_s >= state.oldest_wait_s / 2]


def apt_serve(served: PolicyContext) -> AptServe:
    """Build the policy.

    Raises:
        ConfigError: for a server without calibration. PlanError: for a model whose hidden states do not halve its KV.
    """
    if served.server is None:
        raise ConfigError("policy=apt_serve prices what hidden states cost, so it needs a server with a calibration")
    model, latency = served.model, served.server.priced()
    dense = dense_plan(model)
    hidden = replace(dense, kv_hidden=True)
    check_plan(model, hidden)
    # Products over a full context are as fast per token as they get; iterations compute as many and more.
    layer_s = KV_SHARE * latency.linear_s("mha", dense.weight_bits[0], model.max_context_tokens)
    return AptServe(
        plans=(dense, hidden),
        token_s=model.num_layers * layer_s / model.max_context_tokens,
        kv_block_tokens=served.kv_block_tokens,
        num_layers=model.num_layers,
    )
