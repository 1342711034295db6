"""Hostile plans: options as ``PUT /plan`` and ``policy=fixed`` take them, and plans of quality tables."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from sim.cost.plan import Plan, check_plan, dense_plan, describe
from sim.cost.plan_json import plan_from_json, plan_to_json
from sim.policies.fixed import plan_of
from tests.sim.serving import TINY, requests, tiny_engine
from tests.soak.kinds import Case, FaultError
from tests.soak.mutate import JSON_VALUES, edge_value, mutate_json, mutate_text, to_json

SERVED_SHARE = 0.15
OPTIONS: dict[str, Any] = {
    "drop_mha": [1],
    "drop_ffn": [0, 2],
    "prefill_drop_mha": [],
    "prefill_drop_ffn": [0],
    "weight_bits": [16, 8, 4],
    "kv_first_tokens": 2,
    "kv_last_tokens": 3,
    "kv_layers": [0, 1],
    "max_running": 2,
    "max_waiting": 3,
    "max_wait_s": 1.5,
}
WORKLOAD = requests((0.0, 10, 6), (0.0, 40, 9), (3.0, 5, 4), (9.0, 30, 12), (12.0, 1, 1))


class Plans:
    """Plans for a model of three layers."""

    name = "plans"

    def __init__(self, folder: Path) -> None:
        self._rng = random.Random(0)
        self._serve(dense_plan(TINY))  # compile the engine

    def make(self, rng: random.Random) -> Case:
        """Return the JSON of a plan, changed."""
        if rng.random() < 0.25:
            plan = plan_of(TINY, {"drop_mha": [1], "weight_bits": 8, "kv_first_tokens": 2, "kv_last_tokens": 3})
            return Case("plan of a table", to_json(mutate_json(plan_to_json(plan), rng), rng))
        names = rng.sample(list(OPTIONS), rng.randrange(1, 5))
        options = {name: json.loads(json.dumps(OPTIONS[name])) for name in names}
        if "kv_first_tokens" in options or "kv_last_tokens" in options:
            options = {**options, "kv_first_tokens": rng.randrange(4), "kv_last_tokens": rng.randrange(4)}
        how = rng.random()
        if how < 0.25:
            options[rng.choice(names)] = edge_value(rng)
        elif how < 0.3:
            return Case("options", mutate_text(to_json(options, rng), rng))
        elif how < 0.85:
            options = mutate_json(options, rng)
        return Case("options", to_json(options, rng))

    def strategy(self) -> st.SearchStrategy[Case]:
        """Return hypothesis' strategy of plans."""
        values = st.dictionaries(st.sampled_from(sorted(OPTIONS)), JSON_VALUES, max_size=4)
        return values.map(lambda options: Case("options", json.dumps(options).encode()))

    def feed(self, case: Case) -> str:
        """Read a plan as the server does; run a share of the accepted ones."""
        try:
            content = json.loads(case.content)
        except (ValueError, RecursionError):
            return "refused"
        if case.target == "plan of a table":
            plan = plan_from_json(content)
            if len(plan.weight_bits) != TINY.num_layers:
                return "accepted"
            check_plan(TINY, plan)
        else:
            if not isinstance(content, dict):
                return "refused"
            plan = plan_of(TINY, content)
        describe(plan)
        hash(plan)
        if self._rng.random() < SERVED_SHARE:
            self._serve(plan)
        return "accepted"

    def _serve(self, plan: Plan) -> None:
        """Serve requests; switch to the plan in between and back."""
        engine = tiny_engine(kv_blocks=60)
        engine.submit(WORKLOAD)
        engine.run_until(2.0)
        engine.apply(plan)
        engine.run_until(8.0)
        engine.apply(dense_plan(TINY))
        engine.run_until(9.5)
        engine.apply(plan)
        engine.run_until(1e5)
        engine.apply(dense_plan(TINY))  # a plan may hold requests back
        state = engine.run_until(float("inf"))
        if state.finished + state.rejected != len(WORKLOAD):
            raise FaultError("requests were lost", f"{state.finished} finished, {state.rejected} rejected")

    def close(self) -> None:
        """Nothing runs."""
