"""Random replays of a model of eight layers whose plans stream them: more sets of streamed layers than three have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from sim.cost.plan import Plan, dense_plan
from sim.cost.streaming import LEAST_STREAMED
from tests.sim.engine import kernel_cases
from tests.sim.engine.kernel_cases import Case

LAYERS = 8
MODEL = replace(kernel_cases.TINY, num_layers=LAYERS)


@contextmanager
def eight_layers() -> Iterator[None]:
    """Let the cases of ``kernel_cases`` be of the model with eight layers."""
    before = kernel_cases.TINY, kernel_cases.DENSE
    kernel_cases.TINY, kernel_cases.DENSE = MODEL, dense_plan(MODEL)
    try:
        yield
    finally:
        kernel_cases.TINY, kernel_cases.DENSE = before


def random_case(seed: int) -> Case:
    """Return the case of a seed: that of ``kernel_cases``, more changes of the plan, and streamed layers in most."""
    rng = np.random.default_rng([seed, 15])
    known: dict[Plan, Plan] = {}

    def streaming(plan: Plan) -> Plan:
        if plan not in known:
            some = rng.choice(LAYERS, int(rng.integers(LEAST_STREAMED, LAYERS + 1)), replace=False)
            flags = tuple(layer in some for layer in range(LAYERS))
            known[plan] = replace(plan, streamed=flags if rng.random() < 0.75 else ())
        return known[plan]

    with eight_layers():
        case = kernel_cases.random_case(seed)
        several = [kernel_cases.random_plan(rng) for _ in range(4)] + [kernel_cases.DENSE]
    case = replace(case, plans=tuple((time_s, replace(plan, streamed=())) for time_s, plan in case.plans))
    case = replace(case, scheduled=tuple((time_s, replace(plan, streamed=())) for time_s, plan in case.scheduled))
    case = replace(case, first_plan=replace(case.first_plan, streamed=()))
    times = np.cumsum(rng.exponential(6.0, int(rng.integers(0, 15)))).tolist()
    more = {time_s: several[int(rng.integers(len(several)))] for time_s in times}
    case = replace(case, plans=tuple(sorted({**dict(case.plans), **more}.items(), key=lambda pair: pair[0])))
    case = kernel_cases._with_plans(case, streaming)
    speed = kernel_cases.link_factor(case) * float(rng.choice([2e3, 2e4, 1e5, 1e6]))
    return replace(case, host_to_device_bytes_per_s=speed)


def differences(case: Case) -> list[str]:
    """Return the differences between the two engines."""
    with eight_layers():
        return kernel_cases.differences(case)


def shrunk(case: Case) -> Case:
    """Return a smaller case that still differs."""
    with eight_layers():
        return kernel_cases.shrunk(case)
