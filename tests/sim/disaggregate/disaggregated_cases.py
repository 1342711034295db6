"""Random disaggregated systems, for comparing ``sim.disaggregate`` with the plain implementation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sim.cluster.outages import Outage
from sim.cost.ffn_width import FFN_WIDTHS, LEAST_CHANNELS
from sim.cost.latency import LatencyModel
from sim.cost.memory import budget_for_kv_blocks
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import KV_METHODS, Plan
from sim.disaggregate.disaggregate import Disaggregated, decode_side
from sim.engine.protocol import EngineConfig
from sim.engine.scheduler import Limits, SchedulerName
from sim.engine.sim_engine import SimEngine
from sim.policies.fixed import static_plan
from sim.traces.trace import Trace
from tests.sim.disaggregate.plain_disaggregated import PREFILL, PlainDisaggregated, build
from tests.sim.engine.kernel_cases import irregular_latency, schedules_ahead, with_later_settings, without_gqa
from tests.sim.engine.plain_engine import PlainEngine
from tests.sim.serving import TINY, linear_latency
from tests.sim.shrink import shrunk_case, without_some

WIDE = replace(TINY, intermediate_size=4 * LEAST_CHANNELS)
"""The tiny model with FFN blocks that can be cut, also on one of four GPUs."""


@dataclass(frozen=True, kw_only=True)
class DisaggregatedCase:
    """One system: requests, a plan, the replicas of each side and their KV blocks, a link."""

    requests: tuple[tuple[float, int, int], ...]
    plan: Plan
    prefill: int
    decode: int
    prefill_blocks: int
    decode_blocks: int
    config: EngineConfig
    latency: LatencyModel
    bytes_per_s: float
    latency_s: float
    one_link: bool
    outages: tuple[tuple[Outage, ...], ...] = ()
    turns: tuple[tuple[float, int], ...] = ()
    load_bytes_per_s: float = 1e9
    start_s: float = 0.0
    turn_s: float = 0.0
    tp: int = 1
    gqa: bool = True

    @property
    def model(self) -> ModelSpec:
        """What one of the ``tp`` GPUs of a replica holds; without ``gqa`` every query head has its own KV."""
        whole = WIDE if self.plan.cuts_ffn else TINY
        return (whole if self.gqa else without_gqa(whole)).shard(self.tp)

    def trace(self) -> Trace:
        """Return the requests as a trace."""
        arrival_s, prompts, outputs = (np.array(column) for column in zip(*self.requests, strict=True))
        return Trace(arrival_s=arrival_s, prompt_tokens=prompts, output_tokens=outputs)

    def engine_arguments(self, blocks: int, plan: Plan) -> dict[str, Any]:
        """Return the arguments of an engine of one side."""
        budget_bytes = budget_for_kv_blocks(self.model, plan, blocks, 0, self.config.kv_block_tokens)
        shared: dict[str, Any] = {"model": self.model, "latency": self.latency, "config": self.config}
        if any(plan.streamed):
            shared["host_to_device_bytes_per_s"] = 2e5
        return {**shared, "plan": plan, "budget_bytes": budget_bytes}


def random_disaggregated(seed: int, *, ahead: bool | None = None, later: bool = True) -> DisaggregatedCase:
    """Return the case of a seed; its times are irregular, so that rounding does not decide any order.

    ``ahead`` sets whether its engines schedule ahead, None lets the seed decide; ``later`` as in ``random_case``.
    """
    rng = np.random.default_rng([seed, 9])
    count = int(rng.integers(1, 50))
    gap_s = float(rng.choice([0.0, 0.3, 2.0]))
    rows = zip(
        np.cumsum(rng.exponential(gap_s, count) if gap_s else np.zeros(count)).tolist(),
        rng.integers(1, int(rng.choice([6, 40])), count).tolist(),
        rng.integers(1, int(rng.choice([3, 25])), count).tolist(),
        strict=True,
    )
    mha = [layer for layer in range(3) if rng.random() < 0.3]
    kv: dict[str, Any] = {"kv_first_tokens": 2, "kv_last_tokens": 3, "kv_layers": [0, 2]} if rng.random() < 0.4 else {}
    scheduler: SchedulerName = "chunked" if rng.random() < 0.6 else "prefill_first"
    waits = np.random.default_rng([seed, 12])
    limited = later and waits.random() < 0.4
    bits = np.random.default_rng([seed, 13])
    if later and bits.random() < 0.4:
        kv["kv_bits"] = [int(each) for each in bits.choice([16, 8, 4], TINY.num_layers)]
    if later and np.random.default_rng([seed, 14]).random() < 0.4:
        kv["streamed"] = list(range(TINY.num_layers))
    lower = np.random.default_rng([seed, 18])
    if later and lower.random() < 0.4:
        weights = [int(each) for each in lower.choice([16, 8, 4], TINY.num_layers)]
        kv |= {"weight_bits": weights, "compute_bits": [max(each // 2, 4) for each in weights]}
    narrow = np.random.default_rng([seed, 23])
    if later and narrow.random() < 0.4:
        kv["ffn_width"] = [int(each) for each in narrow.choice(FFN_WIDTHS, TINY.num_layers)]
    compressing = np.random.default_rng([seed, 20])
    if later and "kv_layers" not in kv and compressing.random() < 0.5:
        kv |= {"kv_method": str(compressing.choice(KV_METHODS)), "kv_percent": int(compressing.integers(51, 100))}
    case = DisaggregatedCase(
        requests=tuple(rows),
        plan=static_plan(
            WIDE if "ffn_width" in kv else TINY,
            drop_mha=mha,
            drop_ffn=mha[:1],
            prefill_drop_mha=mha[:1],
            prefill_drop_ffn=[],
            max_wait_s=float(waits.random()) * 10 + 0.1 if limited else None,
            **kv,
        ),
        prefill=int(rng.integers(1, 4)),
        decode=int(rng.integers(1, 4)),
        prefill_blocks=int(rng.choice([20, 60, 300])),
        decode_blocks=int(rng.choice([8, 20, 60, 300])),
        config=with_later_settings(
            seed,
            EngineConfig(
                scheduler=scheduler,
                limits=Limits(
                    max_batch_tokens=int(rng.choice([4, 16, 64])),
                    max_running=int(rng.choice([1, 3, 8])),
                    long_prefill_tokens=int(rng.choice([0, 0, 5])),
                    reserve_full_prompt=bool(rng.random() < 0.6),
                ),
                kv_block_tokens=4,
                kv_watermark_share=float(rng.choice([0.0, 0.1])),
                schedules_ahead=schedules_ahead(seed) if ahead is None else ahead,
            ),
            later,
        ),
        latency=linear_latency(
            base_s=0.3 + float(rng.random()) / 7, token_s=float(rng.random()) / 90, context_s=float(rng.random()) / 900
        ),
        bytes_per_s=float(rng.choice([500.0, 5e3, 1e6])) * (1 + float(rng.random())),
        latency_s=float(rng.choice([0.0, 0.1])) * (1 + float(rng.random())),
        one_link=bool(rng.random() < 0.5),
    )
    divided = np.random.default_rng([seed, 15])
    if later and divided.random() < 0.3:
        tp = int(divided.choice([2, 4]))
        case = replace(case, tp=tp, latency=irregular_latency(divided, tp))
    hiding = np.random.default_rng([seed, 22])
    if later and case.tp == 1 and "kv_layers" not in kv and hiding.random() < 0.5:
        hidden = replace(case.plan, kv_hidden=True, kv_bits=(), kv_compression=None)
        case = replace(case, gqa=False, plan=hidden)
        if hiding.random() < 0.5:  # of the others, no product takes any time
            case = replace(case, latency=irregular_latency(hiding))
    changes = np.random.default_rng([seed, 17])
    if not later or changes.random() >= 0.5:
        return case
    end_s = 2.0 * max(10.0, case.requests[-1][0])
    return replace(case, **random_changes(changes, case.prefill + case.decode, end_s))


def random_changes(rng: np.random.Generator, replicas: int, end_s: float) -> dict[str, Any]:
    """Return what of a case says when replicas fail, come back and change their roles, mostly before ``end_s``."""

    def one() -> tuple[Outage, ...]:
        found, from_s = [], float(rng.exponential(end_s / 2))
        for _ in range(rng.integers(0, 4)):
            until_s = math.inf if rng.random() < 0.1 else from_s + float(rng.exponential(end_s / 8))
            found.append(Outage(from_s=from_s, until_s=until_s, notice_s=float(rng.choice([0.0, end_s / 20]))))
            if math.isinf(until_s):
                break
            from_s = until_s + float(rng.exponential(end_s / 4))
        return tuple(found)

    outages = tuple(one() for _ in range(replicas)) if rng.random() < 0.7 else ((),) * replicas
    turns = np.sort(rng.exponential(end_s / 3, int(rng.integers(0, 5)))) if rng.random() < 0.7 else ()
    return {
        "outages": outages,
        "turns": tuple((float(time_s), int(rng.integers(1, replicas))) for time_s in turns),
        "load_bytes_per_s": float(rng.choice([1e4, 1e6])) * (1 + float(rng.random())),
        "start_s": float(rng.choice([0.0, 1.0])) * float(rng.random()),
        "turn_s": float(rng.choice([0.0, 0.5])) * float(rng.random()),
    }


def outages_of(case: DisaggregatedCase) -> tuple[tuple[Outage, ...], ...]:
    """Return the outages of each replica."""
    return case.outages or ((),) * (case.prefill + case.decode)


def serve_fast(case: DisaggregatedCase, overlap: bool = False) -> Disaggregated:
    """Serve a case, and let its replicas change their roles."""
    made = fast_disaggregated(case, overlap)
    for time_s, count in case.turns:
        made.run_until(time_s)
        made.set_prefill(count)
    made.run()
    return made


def fast_disaggregated(case: DisaggregatedCase, overlap: bool = False) -> Disaggregated:
    """Return the system of a case, before it serves."""

    def side(blocks: int, plan: Plan) -> Any:
        return lambda env: SimEngine(**case.engine_arguments(blocks, plan), env=env, external_clock=True)

    prefill, decode = side(case.prefill_blocks, case.plan), side(case.decode_blocks, decode_side(case.plan))
    outages = outages_of(case)
    return Disaggregated(
        case.trace(),
        plan=case.plan,
        prefill=[prefill] * case.prefill,
        decode=[decode] * case.decode,
        turned=[decode] * case.prefill + [prefill] * case.decode if case.turns else None,
        outages=lambda replica: outages[replica],
        load_bytes_per_s=case.load_bytes_per_s,
        start_s=case.start_s,
        turn_s=case.turn_s,
        link_bytes_per_s=case.bytes_per_s,
        link_latency_s=case.latency_s,
        one_link=case.one_link,
        overlap=overlap,
    )


def plain_disaggregated(case: DisaggregatedCase) -> dict[str, Any]:
    """Serve a case with the plain system and return its columns."""

    def make(role: int, now_s: float) -> PlainEngine:
        blocks, plan = (
            (case.prefill_blocks, case.plan) if role == PREFILL else (case.decode_blocks, decode_side(case.plan))
        )
        return build(PlainEngine, now_s, **case.engine_arguments(blocks, plan))

    return PlainDisaggregated(
        trace=case.trace(),
        plan=case.plan,
        build=make,
        counts=(case.prefill, case.decode),
        outages=outages_of(case),
        turns=case.turns,
        bytes_per_s=case.bytes_per_s,
        latency_s=case.latency_s,
        one_link=case.one_link,
        token_layer_bytes=case.model.kv_bytes_per_token_layer,
        load_bytes_per_s=case.load_bytes_per_s,
        start_s=case.start_s,
        turn_s=case.turn_s,
    ).run()


def differences(case: DisaggregatedCase) -> list[str]:
    """Return the differences between the two systems; empty if they agree in every bit."""
    records, found = serve_fast(case).records(), []
    for name, a in plain_disaggregated(case).items():
        b = np.asarray(getattr(records, name), dtype=np.float64)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        if not same.all():
            at = int(np.argmin(same))
            found.append(f"{name}: first at request {at}: plain {a[at]}, compiled {b[at]}")
    return found


def shrunk(case: DisaggregatedCase) -> DisaggregatedCase:
    """Return a smaller case that still differs."""
    return shrunk_case(case, _smaller, differences)


def _smaller(case: DisaggregatedCase) -> Iterator[DisaggregatedCase]:
    for rows in without_some(case.requests):
        if rows:
            yield replace(case, requests=rows)
    if case.outages:
        yield replace(case, outages=())
        for k, own in enumerate(case.outages):
            for fewer in without_some(own):
                yield replace(case, outages=(*case.outages[:k], tuple(fewer), *case.outages[k + 1 :]))
    for turns in without_some(case.turns):
        yield replace(case, turns=turns)
    for name in () if case.outages or case.turns else ("prefill", "decode"):
        if getattr(case, name) > 1:
            yield replace(case, **{name: getattr(case, name) - 1})
