"""Random replays for comparing the compiled engine with the plain one: built from a seed, shrunk if they differ."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sim.cost.ffn_width import FFN_WIDTHS, LEAST_CHANNELS
from sim.cost.latency import LatencyModel, calibration_from_dict
from sim.cost.memory import budget_for_kv_blocks, layer_weight_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import KV_METHODS, LEAST_THINK_PERCENT, KeepMask, KVCompression, KVKeep, Plan, dense_plan
from sim.cost.streaming import LEAST_STREAMED
from sim.engine.budget import Budget, stepped
from sim.engine.protocol import EngineConfig, EngineState, Request, Restore
from sim.engine.scheduler import Limits, SchedulerName
from sim.engine.sim_engine import SimEngine
from sim.errors import BudgetError
from tests.sim.engine.plain_engine import PlainEngine
from tests.sim.serving import TINY, linear_latency
from tests.sim.shrink import shrunk_case, without_some

RELATIVE = 1e-9
LATE_S = 1e6
DENSE = dense_plan(TINY)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One replay: requests, decisions made during it and scheduled ones, a budget, and how the engine serves."""

    requests: tuple[tuple[float, int, int], ...]
    plans: tuple[tuple[float, Plan], ...]
    scheduled: tuple[tuple[float, Plan], ...]
    ticks_s: tuple[float, ...]
    first_plan: Plan
    kv_blocks: int
    budget_steps: tuple[tuple[float, float], ...]
    config: EngineConfig
    latency: LatencyModel
    host_to_device_bytes_per_s: float
    copy_slowdown: float
    copy_layer_s: float = 0.0
    slowdown: float = 1.0
    charges_cut_kv: bool = False
    tp: int = 1
    gqa: bool = True
    intermediate_size: int = TINY.intermediate_size

    @property
    def model(self) -> ModelSpec:
        """What one of the ``tp`` GPUs holds; without ``gqa`` every query head has its own keys and values."""
        whole = replace(TINY, intermediate_size=self.intermediate_size)
        return (whole if self.gqa else without_gqa(whole)).shard(self.tp)

    def hash_ids(self, prompt: int, output: int) -> tuple[int, ...]:
        """Return the hash ids of a prompt: the first are shared with other prompts, the others are its own."""
        count = -(-prompt // self.config.hash_block_tokens)
        alike = (7 * prompt + output) % 9
        return tuple(
            200 * ((prompt + output) % 2) + i if i < alike else 200 * (2 + (83 * prompt + output) % 500) + i
            for i in range(count)
        )

    def submit(self, engine: SimEngine | PlainEngine) -> None:
        """Hand the requests to an engine."""
        engine.submit(self.submitted())

    def submitted(self) -> list[Request]:
        """Return the requests, with their hash ids."""
        return [
            Request(request_id=i, arrival_s=a, prompt_tokens=p, output_tokens=o, hash_ids=self.hash_ids(p, o))
            for i, (a, p, o) in enumerate(self.requests)
        ]

    @property
    def quality_nll(self) -> Callable[[Plan], float]:
        """Nats per token that a plan costs."""
        return kv_quality_nll if self.charges_cut_kv else quality_nll

    def budget(self) -> Budget:
        """Return the budget: ``kv_blocks`` KV blocks next to the first plan, then steps relative to that."""
        first = budget_for_kv_blocks(self.model, self.first_plan, self.kv_blocks, 0, self.config.kv_block_tokens)
        room = layer_weight_bytes(self.model)
        steps = [(time_s, max(1, int(first + share * room))) for time_s, share in self.budget_steps]
        return stepped([(0.0, first), *steps])


def without_gqa(model: ModelSpec) -> ModelSpec:
    """Return the model with keys and values of its own for every query head, as hidden states need it."""
    return replace(model, num_kv_heads=model.num_heads)


def quality_nll(plan: Plan) -> float:
    """Return a made-up quality that differs between all plans, except those that keep other tokens of KV."""
    score = 1.0
    for layer, (mha, ffn, bits) in enumerate(zip(plan.decode.mha, plan.decode.ffn, plan.weight_bits, strict=True)):
        score += (2 + layer) * 0.1 * (not mha) + (3 + layer) * 0.01 * (not ffn) + 0.001 * (16 - bits)
    score += sum(0.0003 * (2 + layer) * (16 - bits) for layer, bits in enumerate(plan.kv_bits))
    lower = zip(plan.product_bits, plan.weight_bits, strict=True)
    score += sum(0.0005 * (4 + layer) * (bits - less) for layer, (less, bits) in enumerate(lower))
    score += sum(0.0007 * (3 + layer) * kv_only for layer, kv_only in enumerate(plan.kv_only))
    score += sum(0.0011 * (5 + layer) * (8 - width) for layer, width in enumerate(plan.ffn_width))
    if (used := plan.kv_compression) is not None:
        score += 0.0009 * (100 - used.percent) + 0.002 * KV_METHODS.index(used.method)
    return score + sum(0.5 * (not keep) for keep in (*plan.prefill.mha, *plan.prefill.ffn))


def kv_quality_nll(plan: Plan) -> float:
    """Return a made-up quality that differs between all plans; the frozen records were charged ``quality_nll``."""
    return quality_nll(plan) + sum(
        0.007 * (2 + layer) / (1 + 13 * keep.first_tokens + keep.last_tokens)
        for layer, keep in enumerate(plan.kv_keep)
        if keep.first_tokens is not None and keep.last_tokens is not None
    )


def random_plan(rng: np.random.Generator) -> Plan:
    """Return a plan of the tiny model: often dense or close to it."""
    layers = TINY.num_layers
    keep = rng.choice([0.5, 0.85, 1.0])
    decode_mha, decode_ffn = rng.random(layers) < keep, rng.random(layers) < keep
    prefill_mha, prefill_ffn = decode_mha, decode_ffn
    if rng.random() < 0.3:
        prefill_mha, prefill_ffn = decode_mha | (rng.random(layers) < 0.5), decode_ffn | (rng.random(layers) < 0.5)
    bits = rng.choice([16, 16, 8, 4], layers) if rng.random() < 0.3 else np.full(layers, 16)
    kv_keep = [KVKeep()] * layers
    if rng.random() < 0.15:
        kv_keep = [
            KVKeep(first_tokens=int(rng.integers(0, 6)), last_tokens=int(rng.integers(1, 12)))
            if rng.random() < 0.6
            else KVKeep()
            for _ in range(layers)
        ]

    def flags(mask: Any) -> tuple[bool, ...]:
        return tuple(bool(x) for x in mask)

    return Plan(
        decode=KeepMask(mha=flags(decode_mha), ffn=flags(decode_ffn)),
        prefill=KeepMask(mha=flags(prefill_mha), ffn=flags(prefill_ffn)),
        weight_bits=tuple(int(b) for b in bits),
        kv_keep=tuple(kv_keep),
        max_running=int(rng.integers(1, 12)) if rng.random() < 0.15 else None,
        max_waiting=int(rng.integers(0, 8)) if rng.random() < 0.15 else None,
    )


def random_latency(rng: np.random.Generator) -> LatencyModel:
    """Return a latency model: round numbers, so that many events coincide, or irregular ones."""
    if rng.random() < 0.3:
        return linear_latency(base_s=1.0)
    if rng.random() < 0.5:
        return linear_latency(base_s=0.5, token_s=float(rng.random() / 50), context_s=float(rng.random() / 300))

    return irregular_latency(rng)


def irregular_latency(rng: np.random.Generator, tp: int = 1) -> LatencyModel:
    """Return a latency model of random tables; with ``tp`` above 1, one with all-reduces."""

    def rising(*shape: int) -> list[Any]:
        table = np.cumsum(rng.random(shape) * 1e4, axis=-1)
        return (np.cumsum(table, axis=0) if len(shape) > 1 else table).tolist()

    tables: dict[str, Any] = {
        "tokens": [1, 7, 30, 200],
        "linear_us": {bits: {"mha": rising(4), "ffn": rising(4)} for bits in ("16", "8", "4")},
        "token_us": rising(4),
        "sequences": [1, 4, 20],
        "head_us": rising(3),
        "prefill_attention": {"tokens": [1, 16, 128], "context": [1.0, 20.0, 100.0], "us": rising(3, 3)},
        "decode_attention": {"batch": [1, 6, 16], "context": [1.0, 30.0, 200.0], "us": rising(3, 3)},
    }
    description = {**linear_description(float(rng.random() * 1e5)), "tp": tp}
    if tp > 1:
        tables["allreduce"] = {"tokens": [0.5, 3.0, 17.5, 290.0], "us": rising(4)}
    return calibration_from_dict({**description, "tables": tables})


def linear_description(fixed_us: float) -> dict[str, Any]:
    """Return what a calibration says in addition to its tables."""
    return {
        "schema": 1,
        "name": "made up",
        "model": TINY.name,
        "device": "none",
        "kind": "composed",
        "fixed_us": fixed_us,
        "fixed_source": "made up",
        "errors": {},
        "validation": "none",
        "sources": [],
        "notes": [],
    }


def schedules_ahead(seed: int) -> bool:
    """Return whether the engine of a seed schedules ahead; its own stream, so that all else of a seed stays."""
    return bool(np.random.default_rng([seed, 10]).random() < 0.4)


def with_later_settings(seed: int, config: EngineConfig, allowed: bool = True) -> EngineConfig:
    """Return the config of a seed with its way to preempt, copy weights and admit; streams of their own, as above."""
    if not allowed:
        return config
    rng = np.random.default_rng([seed, 11])
    swaps = not config.prefix_caching and rng.random() < 0.75
    return replace(
        config,
        preemption="swap" if swaps else "recompute",
        host_kv_blocks=int(rng.choice([1, 5, 20, 400])) if swaps else 0,
        copying="blocking" if rng.random() < 0.25 else "overlapped",
        admission_order="value" if np.random.default_rng([seed, 24]).random() < 0.3 else "fcfs",
    )


def with_waits(seed: int, case: Case) -> Case:
    """Return the case of a seed with plans that limit how long a request may wait; its own stream, as above."""
    rng = np.random.default_rng([seed, 12])
    if rng.random() < 0.6:
        return case
    limits: dict[Plan, float | None] = {}

    def limited(plan: Plan) -> Plan:
        if plan not in limits:
            some = float(rng.choice([0.5, 2.0, 10.0, float(rng.random() * 30) + 0.01]))
            limits[plan] = some if rng.random() < 0.6 else None
        return replace(plan, max_wait_s=limits[plan])

    return _with_plans(case, limited)


def with_kv_bits(seed: int, case: Case) -> Case:
    """Return the case of a seed with plans that quantize KV; its own stream, as above."""
    rng = np.random.default_rng([seed, 13])
    if rng.random() < 0.6:
        return case
    bits: dict[Plan, tuple[int, ...]] = {}

    def quantized(plan: Plan) -> Plan:
        if plan not in bits:
            some = tuple(int(b) for b in rng.choice([16, 8, 4], TINY.num_layers))
            bits[plan] = some if rng.random() < 0.6 else ()
        return replace(plan, kv_bits=bits[plan])

    return _with_plans(case, quantized)


def with_streams(seed: int, case: Case) -> Case:
    """Return the case of a seed with plans that stream layers; its own stream, as above."""
    rng = np.random.default_rng([seed, 14])
    if rng.random() < 0.6:
        return case
    layers: dict[Plan, tuple[bool, ...]] = {}

    def streaming(plan: Plan) -> Plan:
        if plan not in layers:
            some = rng.choice(TINY.num_layers, int(rng.integers(LEAST_STREAMED, TINY.num_layers + 1)), replace=False)
            flags = tuple(layer in some for layer in range(TINY.num_layers))
            layers[plan] = flags if rng.random() < 0.6 else ()
        return replace(plan, streamed=layers[plan])

    return _with_plans(case, streaming)


def with_kv_only(seed: int, case: Case) -> Case:
    """Return the case of a seed with plans in which prompts only write KV in some layers; its own stream, as above."""
    rng = np.random.default_rng([seed, 16])
    if rng.random() < 0.6:
        return case
    layers: dict[Plan, tuple[bool, ...]] = {}

    def writing(plan: Plan) -> Plan:
        if plan not in layers:
            some = tuple(bool(flag) for flag in rng.random(TINY.num_layers) < 0.5)
            layers[plan] = some if rng.random() < 0.7 else ()
        return replace(plan, kv_only=layers[plan])

    return _with_plans(case, writing)


def with_compute_bits(seed: int, case: Case) -> Case:
    """Return the case of a seed with plans that compute below their resident bits, also one that differs in that alone.

    Its own stream, as above.
    """
    rng = np.random.default_rng([seed, 18])
    if rng.random() < 0.6:
        return case

    def lower(plan: Plan) -> Plan:
        nested = rng.random(TINY.num_layers) < rng.choice([0.0, 0.5, 1.0])
        both = zip(plan.weight_bits, nested, strict=True)
        return replace(plan, compute_bits=tuple(max(bits // 2, 4) if half else bits for bits, half in both))

    return _with_plans(case, lower)


def with_kv_compression(seed: int, case: Case) -> Case:
    """Return the case of a seed with plans that compress the KV of prompts; its own stream, as above."""
    rng = np.random.default_rng([seed, 20])
    if rng.random() < 0.6:
        return case
    chosen: dict[Plan, KVCompression | None] = {}

    def compressing(plan: Plan) -> Plan:
        if set(plan.kv_keep) != {KVKeep()}:
            return plan
        if plan not in chosen:
            method = str(rng.choice(KV_METHODS))
            percent = int(rng.integers(LEAST_THINK_PERCENT if method == "think" else 1, 100))
            chosen[plan] = KVCompression(method=method, percent=percent) if rng.random() < 0.7 else None
        return replace(plan, kv_compression=chosen[plan])

    return _with_plans(case, compressing)


def with_kv_hidden(seed: int, case: Case) -> Case:
    """Return the case of a seed without GQA and with plans that keep hidden states; its own stream, as above."""
    rng = np.random.default_rng([seed, 22])
    if rng.random() < 0.6 or case.tp > 1:
        return case
    chosen: dict[Plan, bool] = {}

    def hiding(plan: Plan) -> Plan:
        if set(plan.kv_keep) != {KVKeep()}:
            return plan
        if plan not in chosen:
            chosen[plan] = bool(rng.random() < 0.7)
        return replace(plan, kv_hidden=True, kv_bits=(), kv_compression=None) if chosen[plan] else plan

    return replace(_with_plans(case, hiding), gqa=False)


def with_ffn_width(seed: int, case: Case) -> Case:
    """Return the case of a seed with plans that cut FFN blocks of more channels, often to several widths in turn.

    Its own stream, as above.
    """
    rng = np.random.default_rng([seed, 23])
    if rng.random() < 0.6:
        return case

    def cutting(plan: Plan) -> Plan:
        few = rng.choice(FFN_WIDTHS, TINY.num_layers)
        return replace(plan, ffn_width=tuple(int(w) for w in few) if rng.random() < 0.7 else ())

    wide = replace(case, intermediate_size=LEAST_CHANNELS * case.tp)
    speed = link_factor(wide) * case.host_to_device_bytes_per_s
    return _with_plans(replace(wide, host_to_device_bytes_per_s=speed), cutting)


def link_factor(case: Case) -> float:
    """Return how much faster the host link of a case is: as much as FFN blocks that can be cut have more bytes."""
    return (
        case.model.intermediate_size / TINY.intermediate_size if case.intermediate_size > TINY.intermediate_size else 1
    )


def with_tp(seed: int, case: Case) -> Case:
    """Return the case of a seed with its model divided among GPUs, and a slow host; its own stream, as above."""
    rng = np.random.default_rng([seed, 15])
    if rng.random() < 0.7:
        return case
    tp = int(rng.choice([2, 4]))
    latency = irregular_latency(rng, tp)
    return replace(case, tp=tp, latency=latency.with_host_floor(float(rng.choice([0.0, 0.3, 1.0]))))


def _with_plans(case: Case, changed: Callable[[Plan], Plan]) -> Case:
    return replace(
        case,
        first_plan=changed(case.first_plan),
        plans=tuple((time_s, changed(plan)) for time_s, plan in case.plans),
        scheduled=tuple((time_s, changed(plan)) for time_s, plan in case.scheduled),
    )


def random_case(seed: int, *, ahead: bool | None = None, later: bool = True) -> Case:
    """Return the case of a seed.

    Args:
        ahead: whether its engine schedules ahead; None lets the seed decide.
        later: whether the seed may choose what came later than the frozen records: swapping, weight copies that hold
            the engine up, admission by value, plans that limit how long a request may wait, quantize KV, stream layers,
            let prompts only write KV, compute below their resident bits, keep hidden states or cut FFN blocks, and a
            model that is divided among GPUs, or has no GQA. Cut KV then costs something too.
    """
    rng = np.random.default_rng(seed)
    round_times = rng.random() < 0.4
    count = int(rng.integers(1, 60))
    gap_s = float(rng.choice([0.0, 0.2, 1.0, 4.0]))
    arrivals = np.cumsum(rng.exponential(gap_s, count) * (rng.random(count) < 0.8)) if gap_s else np.zeros(count)
    if round_times:
        arrivals = np.round(arrivals)
    prompts = rng.integers(1, int(rng.choice([8, 40, 150])), count)
    outputs = rng.integers(1, int(rng.choice([3, 20, 80])), count)
    plans, ticks, steps = [], [], []
    if rng.random() < 0.7:
        time_s = 0.0
        several = [random_plan(rng) for _ in range(int(rng.integers(1, 5)))]
        for _ in range(int(rng.integers(1, 12))):
            time_s += float(rng.exponential(8.0))
            plans.append((round(time_s) if round_times else time_s, several[int(rng.integers(len(several)))]))
    if rng.random() < 0.5:
        ticks = [float(t) for t in np.cumsum(rng.integers(1, 9, int(rng.integers(1, 20))))]
    if rng.random() < 0.5:
        time_s = 0.0
        for _ in range(int(rng.integers(1, 8))):
            time_s += float(rng.integers(1, 20)) if round_times else float(rng.exponential(10.0)) + 1e-3
            steps.append((time_s, float(rng.choice([-1.5, -0.7, -0.2, 0.0, 0.5]))))
    scheduler: SchedulerName = "chunked" if rng.random() < 0.65 else "prefill_first"
    restore: Restore = "new_requests" if rng.random() < 0.6 else "recompute"
    beforehand = plans and rng.random() < 0.4
    at = int(rng.integers(0, len(plans) + 1)) if beforehand else 0
    kv_block_tokens = int(rng.choice([1, 2, 4, 16]))
    case = Case(
        requests=tuple((float(a), int(p), int(o)) for a, p, o in zip(arrivals, prompts, outputs, strict=True)),
        plans=tuple(plans[at:]),
        scheduled=tuple(plans[:at] if rng.random() < 0.5 else plans[::2][:at]),
        ticks_s=tuple(ticks),
        first_plan=DENSE if rng.random() < 0.6 else random_plan(rng),
        kv_blocks=int(rng.choice([12, 30, 60, 400])),
        budget_steps=tuple(steps),
        config=with_later_settings(
            seed,
            EngineConfig(
                scheduler=scheduler,
                limits=Limits(
                    max_batch_tokens=int(rng.choice([3, 8, 64, 512])),
                    max_running=int(rng.choice([1, 3, 8, 40])),
                    long_prefill_tokens=int(rng.choice([0, 0, 0, 5])),
                    reserve_full_prompt=bool(rng.random() < 0.6),
                ),
                kv_block_tokens=kv_block_tokens,
                kv_watermark_share=float(rng.choice([0.0, 0.0, 0.1])),
                reuse_preempted_kv=bool(rng.random() < 0.5),
                max_context_tokens=int(rng.choice([60, 4096])),
                restore=restore,
                prefix_caching=bool(rng.random() < 0.4),
                hash_block_tokens=kv_block_tokens * int(rng.choice([1, 1, 2, 4])),
                schedules_ahead=schedules_ahead(seed) if ahead is None else ahead,
            ),
            later,
        ),
        latency=random_latency(rng),
        host_to_device_bytes_per_s=float(rng.choice([2e3, 2e4, 1e6])),
        copy_slowdown=float(rng.choice([0.0, 0.3])),
        copy_layer_s=0.5 * (later and seed % 4 == 0),
        slowdown=(0.6, 1.0, 1.0, 1.9)[seed // 3 % 4] if later else 1.0,
        charges_cut_kv=later,
    )
    if not later:
        return case
    case = with_kv_only(seed, with_tp(seed, with_streams(seed, with_kv_bits(seed, with_waits(seed, case)))))
    case = with_kv_hidden(seed, with_kv_compression(seed, with_compute_bits(seed, case)))
    return with_ffn_width(seed, case)


def serve(kind: type[SimEngine] | type[PlainEngine], case: Case) -> tuple[Any, list[EngineState]]:
    """Return the engine after a case, and the states observed on the way."""
    engine = kind(
        model=case.model,
        latency=case.latency,
        config=case.config,
        plan=case.first_plan,
        budget_bytes=case.budget(),
        host_to_device_bytes_per_s=case.host_to_device_bytes_per_s,
        slowdown=case.slowdown,
        copy_slowdown=case.copy_slowdown,
        copy_layer_s=case.copy_layer_s,
        quality_nll=case.quality_nll,
    )
    case.submit(engine)
    engine.apply_at([time_s for time_s, _ in case.scheduled], [plan for _, plan in case.scheduled])
    states = []
    changes = dict(case.plans)
    for index, time_s in enumerate(sorted({*changes, *case.ticks_s})):
        states.append(engine.run_until(time_s))
        if time_s in changes:
            engine.apply(changes[time_s])
        if index % 3 == 1:
            states.append(engine.run_until(time_s))  # a second call changes nothing
    engine.run_until(math.inf)
    states.append(engine.run_until(LATE_S))  # the clock may stand at different moments after all is done
    return engine, states


def differences(case: Case) -> list[str]:
    """Return the differences between the two engines; empty if they agree, or refuse the case with the same error."""
    served = []
    for kind in (PlainEngine, SimEngine):
        try:
            served.append(serve(kind, case))
        except BudgetError as error:
            served.append(str(error))
    plain, fast = served
    if isinstance(plain, str) or isinstance(fast, str):
        return [] if plain == fast else [f"plain: {plain}; compiled: {fast}"]
    found = []
    if not np.array_equal(plain[0].arrival_order(), fast[0].arrival_order()):
        found.append(f"order of arrivals: {plain[0].arrival_order()} and {fast[0].arrival_order()}")
    for name in ("records", "iterations", "token_gaps", "transitions"):
        ours, theirs = getattr(plain[0], name)(), getattr(fast[0], name)()
        if name == "token_gaps":
            ours, theirs = merged(ours), merged(theirs)
        found += [f"{name}.{what}" for what in unequal(ours, theirs)]
    ours, theirs = plain[0].host_layer_blocks, fast[0].host_layer_blocks
    if ours != theirs or sum(ours) != TINY.num_layers * case.config.host_kv_blocks or min(ours) < 0:
        found.append(f"KV blocks of the host, held and free: {ours} and {theirs}")
    plain[0].check()
    found += [
        f"state {i}: {what}" for i, (a, b) in enumerate(zip(plain[1], fast[1], strict=True)) for what in unequal(a, b)
    ]
    return found


def merged(gaps: Any) -> Any:
    """Return gaps, merging those that differ only by rounding."""
    order = np.argsort(gaps.itl_s)
    itl_s, count = gaps.itl_s[order], gaps.count[order]
    new = np.diff(itl_s, prepend=-1.0) > RELATIVE * np.maximum(itl_s, 1e-3)
    first = np.flatnonzero(new)
    return replace(gaps, itl_s=itl_s[first], count=np.add.reduceat(count, first) if len(first) else count)


def unequal(ours: Any, theirs: Any) -> Iterator[str]:
    """Yield the fields that differ: floats by more than rounding, others at all."""
    for field in dataclasses.fields(ours):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name in ("plan", "target") or isinstance(a, tuple):
            if a != b:
                yield f"{field.name}: {a} and {b}"
            continue
        a, b = np.asarray(a), np.asarray(b)
        if a.shape != b.shape:
            yield f"{field.name}: {len(np.atleast_1d(a))} and {len(np.atleast_1d(b))} entries"
        elif a.dtype.kind == "f":
            if not np.allclose(a, b, rtol=RELATIVE, atol=1e-9, equal_nan=True):
                where = np.flatnonzero(~np.isclose(a, b, rtol=RELATIVE, atol=1e-9, equal_nan=True).ravel())
                yield f"{field.name}: first at {where[0]}: {a.ravel()[where[0]]} and {b.ravel()[where[0]]}"
        elif not np.array_equal(a, b):
            where = np.flatnonzero(a.ravel() != b.ravel())
            yield f"{field.name}: first at {where[0]}: {a.ravel()[where[0]]} and {b.ravel()[where[0]]}"


def shrunk(case: Case) -> Case:
    """Return a smaller case that still differs: fewer requests, plans, ticks and steps, shorter texts."""
    return shrunk_case(case, _smaller, differences)


def _smaller(case: Case) -> Iterator[Case]:
    for field in ("requests", "plans", "scheduled", "ticks_s", "budget_steps"):
        rows = getattr(case, field)
        for fewer in without_some(rows):
            yield replace(case, **{field: fewer})
        if len(rows) == 1:
            yield replace(case, **{field: ()})
    for i, (arrival_s, prompt, output) in enumerate(case.requests):
        for row in ((arrival_s, prompt // 2, output), (arrival_s, prompt, output // 2)):
            if min(row[1:]) >= 1:
                yield replace(case, requests=(*case.requests[:i], row, *case.requests[i + 1 :]))
