"""About 200 runs of the compiled engine, frozen as hashes of everything they record.

usage: python -m tests.frozen.runs --check [NAME ...]   compare with hashes.json, exactly; exit 1 if a run differs
       python -m tests.frozen.runs --write [NAME ...]   store the hashes in hashes.json
       python -m tests.frozen.runs --times [NAME ...]   print the seconds and requests of each run

NAME limits each to the runs whose names contain it.

The random cases here do not schedule ahead, which is younger than their hashes.

A refactoring must leave every run equal. After a deliberate change of behavior, write the hashes of the runs that the
change touches and say in the commit which ones and why.

**What is hashed.** Records, iterations, token gaps (sorted), plan changes, resident weights over time, and observable
states; for clusters also the replicas' phases, for disaggregated systems also the KV transfers. The hash covers each
column's position, dtype, shape and bytes, not its name. After a rename, edit the name in place in the section "What
the runs use from the library" and the hashes stay equal. A plan's description enters only as "same text as an earlier
row", so its wording may change; the plans themselves are hashed through the states.

**Two hashes a run.** ``exact`` covers every bit. ``rounded`` covers integers exactly, and each float column by which
values are finite and by one position-weighted mean to 6 significant digits. It survives changes in last bits and misses
only changes of floats alone that move no mean by a millionth.

**What last bits depend on.** Policies, quality tables and generated traces use ``exp``, ``log`` and matrix products.
NumPy and OpenBLAS choose their code for these by processor (AVX2, AVX-512, FMA) and version. Python 3.12 and later add
floats in ``sum()`` more precisely than 3.11. The random cases (engines, clusters, disaggregated systems) use none of
these, except that rare large exponential gaps pass through libm's ``log1p``. So ``--check``, which is exact, is meant
for the machine that wrote the hashes. test_frozen.py compares configured runs by ``rounded``, and random cases by
``exact`` on a machine like that one, else by ``rounded``.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy loads OpenBLAS: one order of additions

import argparse
import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import llvmlite.binding  # type: ignore[import-untyped]
import numba
import numpy as np
from hydra import compose, initialize_config_dir
from numpy.typing import NDArray
from omegaconf import DictConfig

from sim.cluster import run as cluster_command
from sim.cluster.cluster import Cluster
from sim.config import CONF_DIR
from sim.cost.plan import Plan
from sim.disaggregate import run as disaggregate_command
from sim.disaggregate.disaggregate import Disaggregated
from sim.engine.protocol import EngineState
from sim.engine.sim_engine import SimEngine
from sim.policies import Fixed
from sim.policies.schedule import Schedule
from sim.replay.run import build_engine, build_trace, replay_with
from sim.results.run_folder import commit, write_json
from tests.sim.cluster import cluster_cases
from tests.sim.disaggregate import disaggregated_cases
from tests.sim.engine import kernel_cases

HASHES = Path(__file__).with_name("hashes.json")
Columns = list[NDArray[Any]]
Tables = dict[str, Columns]
"""Label -> columns. Several engines of one run put their columns one after another under the same label."""

# -- What the runs use from the library ------------------------------------------------------------------------------
#
# Attribute names may change here; the order must not, for the position of a column is part of the hash.

RECORDS = (
    "arrival_s",
    "first_token_s",
    "finish_s",
    "prompt_tokens",
    "produced_tokens",
    "output_tokens",
    "admitted_s",
    "preemptions",
    "status",
    "kept_params_share",
    "quality_nll",
    "cached_tokens",
)
CLUSTER_RECORDS = (*RECORDS, "replica", "moves")
DISAGGREGATED_RECORDS = (*RECORDS, "prefill_replica", "decode_replica", "sent_bytes", "send_s", "sent_s")
ITERATIONS = (
    "start_s",
    "end_s",
    "prefill_tokens",
    "decode_requests",
    "running",
    "waiting",
    "kv_used_share",
    "preemptions",
    "extrapolated",
)
TRANSITIONS = (
    "time_s",
    "bytes_in",
    "bytes_freed",
    "ready_s",
    "preempted",
    "recomputed_tokens",
    "kv_blocks_before",
    "kv_blocks_after",
)
STATE_INTS = (
    "waiting",
    "waiting_tokens",
    "running",
    "running_tokens",
    "kv_layer_blocks",
    "kv_used_layer_blocks",
    "budget_bytes",
    "weight_bytes",
    "arrived",
    "arrived_prompt_tokens",
    "first_tokens",
    "produced_tokens",
    "finished",
    "rejected",
    "preemptions",
    "iterations",
    "next_budget_bytes",
    "incoming_bytes",
)
STATE_FLOATS = ("time_s", "oldest_wait_s", "ttft_sum_s", "busy_s", "next_budget_s", "budget_violation_s")


def plan_columns(plans: Sequence[Plan]) -> Columns:
    """Return plans as columns: bool[n, layers] for each mask, int64 for the rest; -1 where there is no limit."""

    def or_none(value: int | None) -> int:
        return -1 if value is None else value

    return [
        np.array([plan.decode.mha for plan in plans], dtype=np.bool_),
        np.array([plan.decode.ffn for plan in plans], dtype=np.bool_),
        np.array([plan.prefill.mha for plan in plans], dtype=np.bool_),
        np.array([plan.prefill.ffn for plan in plans], dtype=np.bool_),
        np.array([plan.weight_bits for plan in plans], dtype=np.int64),
        np.array(
            [[(or_none(keep.first_tokens), or_none(keep.last_tokens)) for keep in plan.kv_keep] for plan in plans],
            dtype=np.int64,
        ),
        np.array([or_none(plan.max_running) for plan in plans], dtype=np.int64),
        np.array([or_none(plan.max_waiting) for plan in plans], dtype=np.int64),
    ]


def state_columns(states: Sequence[EngineState]) -> Columns:
    """Return observed states as columns, one entry a state, the plans that run and that are wanted included."""
    return [
        *(np.array([getattr(state, name) for state in states], dtype=np.int64) for name in STATE_INTS),
        *(np.array([getattr(state, name) for state in states], dtype=np.float64) for name in STATE_FLOATS),
        *plan_columns([state.plan for state in states]),
        *plan_columns([state.target for state in states]),
    ]


def columns_of(table: Any, names: Sequence[str]) -> Columns:
    """Return the named columns of a table of the library."""
    return [np.asarray(getattr(table, name)) for name in names]


def engine_tables(engine: SimEngine, states: Sequence[EngineState]) -> Tables:
    """Return what an engine recorded, but for its requests, and the states that were observed of it."""
    gaps, changes = engine.token_gaps(), engine.transitions()
    order = np.lexsort((gaps.count, gaps.itl_s))
    return {
        "iterations": columns_of(engine.iterations(), ITERATIONS),
        "token_gaps": [gaps.itl_s[order], gaps.count[order]],
        "transitions": [*columns_of(changes, TRANSITIONS), numbered([*changes.from_plan, *changes.to_plan])],
        "resident": [np.array(engine.kept_share(), dtype=np.float64)],
        "states": state_columns(states),
    }


def engine_case(seed: int) -> Tables:
    """Serve a random case of one engine."""
    engine, states = kernel_cases.serve(SimEngine, kernel_cases.random_case(seed, ahead=False, later=False))
    return {"records": columns_of(engine.records(), RECORDS), **engine_tables(engine, states)}


def cluster_tables(cluster: Cluster) -> Tables:
    """Return what a cluster recorded after it has served."""
    events = cluster.events()
    tables: Tables = {
        "records": columns_of(cluster.records(), CLUSTER_RECORDS),
        "events": [
            np.array([event.time_s for event in events], dtype=np.float64),
            *(
                np.array([int(getattr(event, name)) for event in events], dtype=np.int64)
                for name in ("replica", "phase", "moved")
            ),
        ],
        "lives": [
            np.array([served.replica for served in cluster.engines()], dtype=np.int64),
            np.array([(served.begun_s, served.ended_s) for served in cluster.engines()], dtype=np.float64),
        ],
    }
    for served in cluster.engines():
        state = served.engine.observe(min(served.ended_s, cluster.end_s))
        add(tables, engine_tables(served.engine, [state]))
    return tables


def cluster_case(seed: int, *, in_python: bool = False, stops_s: Sequence[float] = ()) -> Tables:
    """Serve a random cluster; ``in_python``: with a router that is called for each request."""
    router = cluster_cases.FewestRequests() if in_python else None
    return cluster_tables(
        cluster_cases.fast_cluster(cluster_cases.random_cluster(seed, ahead=False, later=False), router, stops_s)
    )


def configured_cluster(*overrides: str) -> Tables:
    """Serve with the cluster of a configuration."""
    cluster = cluster_command.build_cluster(composed("cluster", overrides))
    cluster.run()
    return cluster_tables(cluster)


def disaggregated_tables(system: Disaggregated) -> Tables:
    """Serve with a disaggregated system; return what it recorded."""
    system.run()
    tables: Tables = {
        "records": columns_of(system.records(), DISAGGREGATED_RECORDS),
        "links": [np.array([link.busy_s for link in system.links], dtype=np.float64)],
    }
    for side in (*system.prefill, *system.decode):
        add(tables, engine_tables(side.engine, [side.engine.observe(float(system.env.now))]))
    return tables


def disaggregated_case(seed: int, *, overlap: bool) -> Tables:
    """Serve a random disaggregated case; ``overlap``: KV is sent while its prompt is computed."""
    return disaggregated_tables(
        disaggregated_cases.fast_disaggregated(
            disaggregated_cases.random_disaggregated(seed, ahead=False, later=False), overlap
        )
    )


def configured_disaggregated(*overrides: str) -> Tables:
    """Serve with the disaggregated system of a configuration."""
    return disaggregated_tables(disaggregate_command.build_system(composed("disaggregate", overrides)))


class Recorder:
    """A policy that keeps what another one saw and decided."""

    def __init__(self, policy: Any) -> None:
        self.first_plan, self._policy = policy.first_plan, policy
        self.states: list[EngineState] = []
        self.plans: list[Plan] = []

    def __call__(self, state: EngineState) -> Plan:
        """Return what the other policy decides."""
        plan: Plan = self._policy(state)
        self.states.append(state)
        self.plans.append(plan)
        return plan


def configured_replay(*overrides: str) -> Tables:
    """Replay a configuration: its trace, engine, budget and policy."""
    cfg = composed("replay", overrides)
    engine, policy = build_engine(cfg)
    recorder = Recorder(policy)
    # The loop treats a fixed plan and a schedule as known beforehand, so these must be passed as they are.
    replay_with(cfg, build_trace(cfg), engine, policy if isinstance(policy, Fixed | Schedule) else recorder)
    states = [*recorder.states, engine.run_until(kernel_cases.LATE_S)]
    return {
        "records": columns_of(engine.records(), RECORDS),
        "decisions": plan_columns(recorder.plans),
        **engine_tables(engine, states),
    }


def composed(command: str, overrides: Sequence[str]) -> DictConfig:
    """Return the configuration of a command."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(command, overrides=list(overrides))


# -- The runs --------------------------------------------------------------------------------------------------------

# Llama-2-7B on an A100 with prices for 4 bits: a burst that it serves easily with all its memory, and not with less.
BURST = "latency=llama2_7b_a100_trtllm trace=burst trace.duration_s=45 trace.rate_rps=9 workload=only_4096"
# No quality table covers 8 bits or shortened KV of Llama-2-7B; this model has none at all.
WITHOUT_QUALITY = "trace=burst trace.duration_s=45 trace.rate_rps=9 workload=only_4096 model=llama3.1_8b"
TENANT = "budget=cotenant budget.cotenant_bytes=55e9 budget.mean_away_s=8 budget.mean_stay_s=8 budget.horizon_s=60"
TENANT_63 = TENANT.replace("55e9", "63.5e9")  # the dense weights do not fit while it is there
WALK = "budget=random_walk budget.low_share=0.18 budget.high_share=0.4 budget.period_s=5 budget.horizon_s=60"
STEPS = "budget=steps budget.rows=[[0,0.9],[10,0.2],[25,0.17],[35,0.9]]"
V0 = "engine=vllm_v0"
SMALL = (
    "trace=small trace.on_rate_rps=8 trace.duration_s=30 model=smollm2_135m gpu=cpu_epyc_1thread engine=small "
    "workspace_bytes=1e8"
)
SMALL_STEPS = "budget=steps budget.unit=bytes budget.rows=[[0,4.5e8],[8,3.6e8],[20,4.5e8]]"

REPLAYS = {
    "dense on a burst": BURST,
    "dense, co-tenant": f"{BURST} {TENANT}",
    "dense, co-tenant, vllm_v0": f"{BURST} {TENANT} {V0}",
    "dense, weights do not fit": f"{BURST} {TENANT_63}",
    "dense, reuse of preempted KV": f"{BURST} {STEPS} engine.reuse_preempted_kv=true",
    "fixed plan, two phases, limits": (
        f"{WITHOUT_QUALITY} budget=kv_blocks budget.blocks=900 policy=fixed policy.drop_mha=[20,21,25] "
        "policy.drop_ffn=[22] policy.prefill_drop_mha=[25] policy.prefill_drop_ffn=[] policy.weight_bits=8 "
        "policy.max_running=48 policy.max_waiting=20"
    ),
    "fixed plan, shortened KV": (
        f"{WITHOUT_QUALITY} budget.share=0.22 policy=fixed policy.kv_first_tokens=4 policy.kv_last_tokens=256 "
        "policy.kv_layers=[3,4,5]"
    ),
    "int4, steps": f"{BURST} {STEPS} policy=int4",
    "int8, vllm_v0": f"{WITHOUT_QUALITY} budget=steps budget.rows=[[0,0.9],[10,0.13],[30,0.5]] policy=int8 {V0}",
    "w4_prefix": f"{BURST} {WALK} policy=static_w4_prefix",
    "rap_60": f"{BURST} {WALK} policy=rap_60 {V0}",
    "rap_80, relative budget": f"{BURST} budget=rap policy=rap_80",
    "schedule": f"{BURST} {WALK} policy=schedule policy.steps.1.at_s=10 policy.steps.2.at_s=30",
    "random, co-tenant": f"{BURST} {TENANT} policy=random",
    "random, restore by recompute": f"{BURST} {TENANT_63} policy=random engine.restore=recompute {V0}",
    "greedy_stop, co-tenant": f"{BURST} {TENANT} policy=greedy_stop",
    "greedy_stop, notice": f"{BURST} {TENANT_63} budget.notice_s=3 policy=greedy_stop",
    "greedy_stop, restore by recompute": f"{BURST} {TENANT} policy=greedy_stop engine.restore=recompute",
    "greedy_stop, diurnal, vllm_v0": (
        "trace=diurnal trace.duration_s=60 trace.period_s=60 trace.peak_s=30 trace.rate_rps=8 workload=fit_4096 "
        f"{WALK} policy=greedy_stop {V0}"
    ),
    "pressure_stop, Poisson arrivals": (
        f"trace=poisson trace.duration_s=50 trace.rate_rps=9 workload=shuffle_lengths {STEPS} policy=adaptive_pruning"
    ),
    "pressure_stop, vllm_v0": f"{BURST} {WALK} policy=adaptive_pruning {V0}",
    "precision": f"{BURST} {TENANT} policy=adaptive_precision tick_s=0.5",
    "precision, MMPP arrivals, vllm_v0": (
        "latency=llama2_7b_a100_trtllm trace=mmpp trace.duration_s=60 trace.on_rate_rps=16 trace.mean_off_s=15 "
        f"workload=fit_4096 {WALK} policy=adaptive_precision {V0}"
    ),
    "morphserve": f"{BURST} {TENANT} policy=morphserve tick_s=0.25",
    "morphserve, performance, L4": (
        "model=llama2_7b gpu=l4_24gb trace=burst trace.kind=conv trace.duration_s=60 trace.rate_rps=1.5 "
        "workload=only_4096 engine=vllm_v0 budget=constant budget.budget_bytes=22.75e9 policy=morphserve "
        "policy.mode=performance tick_s=0.2"
    ),
    "saber": f"{BURST} {TENANT} policy=saber policy.limit=requests",
    "saber, gamma arrivals, vllm_v0": (
        f"trace=gamma trace.duration_s=50 trace.rate_rps=8 workload=fit_4096 {STEPS} {V0} "
        "policy=saber policy.limit=requests"
    ),
    "limited, dense": f"{BURST} {TENANT} policy=limited",
    "limited, injected burst": (
        f"{BURST} workload=inject_burst workload.steps.0.start_s=10 workload.steps.0.duration_s=10 {WALK} "
        "policy=limited policy.policy=int4"
    ),
    "lookahead": f"{BURST} trace.duration_s=25 {TENANT} policy=lookahead",
    "lookahead, vllm_v0": f"{BURST} trace.duration_s=15 {STEPS} policy=lookahead {V0}",
    "learned_serve, co-tenant": f"{BURST} {TENANT} policy=learned_serve policy.path=learned_replica_llama2",
    "learned_serve, random walk": f"{BURST} {WALK} policy=learned_serve policy.path=learned_replica_llama2",
    "learned_serve, vllm_v0": f"{BURST} {TENANT_63} policy=learned_serve policy.path=learned_replica_llama2 {V0}",
    "learned_prune": f"{SMALL} {SMALL_STEPS} policy=learned_prune policy.path=tests/frozen/policies/learned_prune.json",
    "knapsack": f"{SMALL} {SMALL_STEPS} policy=knapsack",
    "pdtrim": f"{SMALL} budget.share=0.05 policy=pdtrim policy.most_perplexity=1.25",
}
FLOW = "trace.duration_s=25 trace.rate_rps=14"
CLUSTERS = {
    "expected wait, failures": (
        f"{FLOW} router=shortest_expected_wait outages=failures outages.mean_up_s=8 outages.mean_away_s=4 "
        "replicas.main.count=3 load_bytes_per_s=1e10 start_s=1"
    ),
    "spot machines, rap_80": (
        f"{FLOW} policy=rap_80 outages=spot outages.mean_up_s=8 outages.mean_away_s=4 outages.notice_s=2 "
        "replicas.main.count=3 load_bytes_per_s=1e10 start_s=1"
    ),
    "autoscaled": (
        f"{FLOW} autoscaler=by_requests autoscaler.requests_each=12 autoscaler.patience=2 autoscaler.period_s=2 "
        "replicas.main.count=4 load_bytes_per_s=1e10 start_s=1"
    ),
    "mixed devices, least KV": (
        f"{FLOW} router=least_kv replicas.main.count=1 +replicas.slow={{count:1,gpu:l40s_48gb,policy:rap_80}} {V0}"
    ),
    "greedy_stop, co-tenants": f"{FLOW} {TENANT} policy=greedy_stop router=power_of_two",
    "learned_cluster": f"{FLOW} latency=llama2_7b_a100_trtllm {TENANT} policy=learned_cluster router=round_robin",
}
DISAGGREGATED = {
    "100 Gbit/s": FLOW,
    "25 Gbit/s, overlap": f"{FLOW} link_bytes_per_s=3.125e9 overlap=true prefill_replicas=1",
    "one link, rap_80, vllm_v0": f"{FLOW} link_bytes_per_s=3.125e9 one_link=true policy=rap_80 decode_replicas=1 {V0}",
    "pdtrim": (
        f"{SMALL} budget.share=0.3 policy=pdtrim policy.most_perplexity=1.25 prefill_replicas=1 decode_replicas=1 "
        "link_bytes_per_s=1e7"
    ),
}


def all_runs() -> dict[str, Callable[[], Tables]]:
    """Return every run by its name; the first word of a name is its group."""
    runs: dict[str, Callable[[], Tables]] = {}
    for seed in range(90):
        runs[f"engine {seed}"] = partial(engine_case, seed)
    for seed in range(34):
        in_python, stops_s = seed % 5 == 4, (4.0, 11.5) if seed % 3 == 2 else ()
        runs[f"cluster {seed}"] = partial(cluster_case, seed, in_python=in_python, stops_s=stops_s)
    for seed in range(36):
        runs[f"disaggregated {seed}"] = partial(disaggregated_case, seed, overlap=seed % 3 == 2)
    for group, make, named in (
        ("replay", configured_replay, REPLAYS),
        ("configured cluster", configured_cluster, CLUSTERS),
        ("configured disaggregated", configured_disaggregated, DISAGGREGATED),
    ):
        for name, overrides in named.items():
            runs[f"{group}: {name}"] = partial(make, *overrides.split())
    return runs


RUNS = all_runs()
CONFIGURED = frozenset(name for name in RUNS if ":" in name)
"""Runs that pass through libm and BLAS; the others are random cases of a tiny model."""

# -- Hashes ----------------------------------------------------------------------------------------------------------

GENERIC = 0.7310585786300049
"""A factor without a short decimal form: a mean such as 0.125 shall not lie on the border between two roundings."""


def add(tables: Tables, more: Tables) -> None:
    """Put columns behind those that stand under the same labels."""
    for label, columns in more.items():
        tables.setdefault(label, []).extend(columns)


def numbered(texts: Iterable[str]) -> NDArray[np.int64]:
    """Return texts as numbers in order of first appearance: which are equal, not what they say."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(text, len(numbers)) for text in texts], dtype=np.int64)


def exact_hash(columns: Columns) -> str:
    """Return the hash of every bit of a table's columns."""
    digest = hashlib.sha256()
    for position, column in enumerate(columns):
        values = np.ascontiguousarray(column)
        if values.dtype.kind == "f":
            values = np.where(np.isnan(values), np.nan, values)  # one bit pattern for every NaN
        digest.update(f"{position} {values.dtype.str} {values.shape};".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def rounded_hash(label: str, columns: Columns) -> str:
    """Return a hash that changes in the last bits of floats leave equal."""
    if label == "token_gaps":
        # Equal gaps are counted together; last bits decide which are equal. The moments do not depend on that.
        pairs = zip(columns[::2], columns[1::2], strict=True)
        moments = [(count.sum(), (itl_s * count).sum(), (itl_s**2 * count).sum()) for itl_s, count in pairs]
        columns = [np.atleast_1d(moment) for three in moments for moment in three]
    digest = hashlib.sha256()
    for position, column in enumerate(columns):
        values = np.ascontiguousarray(column)
        digest.update(f"{position} {values.dtype.str} {values.shape};".encode())
        if values.dtype.kind != "f":
            digest.update(values.tobytes())
            continue
        flat = values.ravel()
        finite = np.isfinite(flat)
        digest.update(np.where(finite, 0.0, np.where(np.isnan(flat), np.nan, flat)).tobytes())
        weights = np.arange(1, len(flat) + 1)[finite] / max(len(flat), 1)
        mean = float((flat[finite] * weights).sum()) / max(len(weights), 1)
        digest.update(f"{GENERIC * mean + 0.0:.5e};".encode())
    return digest.hexdigest()


def hashes(tables: Tables) -> dict[str, str]:
    """Return both hashes of a run, and the beginning of the exact one of each table, to say which differ."""
    by_table = {label: exact_hash(columns) for label, columns in sorted(tables.items())}
    rounded = {label: rounded_hash(label, columns) for label, columns in sorted(tables.items())}
    return {
        "exact": _of_all(by_table),
        "rounded": _of_all(rounded),
        "tables": " ".join(f"{label}:{digest[:8]}" for label, digest in by_table.items()),
    }


def _of_all(by_table: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(by_table).encode()).hexdigest()


def differing_tables(frozen: dict[str, str], found: dict[str, str]) -> list[str]:
    """Return the labels of the tables whose exact hashes differ."""
    before, after = (dict(pair.split(":") for pair in one["tables"].split()) for one in (frozen, found))
    return sorted(label for label in before.keys() | after.keys() if before.get(label) != after.get(label))


def read_hashes() -> dict[str, Any]:
    """Return what hashes.json holds."""
    content: dict[str, Any] = json.loads(HASHES.read_text(encoding="utf-8"))
    return content


def machine() -> dict[str, str]:
    """Return what the last bits of floats depend on."""
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "libc": " ".join(platform.libc_ver()),
        "processor": llvmlite.binding.get_host_cpu_name(),
    }


# -- The command -----------------------------------------------------------------------------------------------------


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.frozen.runs", description=__doc__.split("\n")[0])
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument("--check", action="store_true", help="compare with hashes.json; exit 1 if a run differs")
    job.add_argument("--write", action="store_true", help="store the hashes in hashes.json")
    job.add_argument("--times", action="store_true", help="print the seconds and requests of each run")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only runs whose names contain NAME")
    arguments = parser.parse_args()
    chosen = [name for name in RUNS if not arguments.names or any(part in name for part in arguments.names)]
    if not chosen:
        parser.error(f"no run's name contains any of {arguments.names}; names begin like 'engine 0', 'replay: saber'")
    if arguments.times:
        for name in chosen:
            started_s = time.perf_counter()
            records = RUNS[name]()["records"]
            print(f"{time.perf_counter() - started_s:7.2f} s {len(records[0]):6d} requests  {name}", flush=True)
        return 0
    started_s = time.perf_counter()
    found = {name: hashes(RUNS[name]()) for name in chosen}
    took = f"{time.perf_counter() - started_s:.0f} s"
    if arguments.write:
        old = read_hashes()["runs"] if HASHES.exists() else {}
        runs = {name: one for name in RUNS if (one := found.get(name, old.get(name))) is not None}
        write_json(HASHES, {"commit": commit(), "machine": machine(), "runs": runs})
        print(f"wrote {len(found)} of {len(RUNS)} runs to {HASHES.name} in {took}")
        return 0
    content = read_hashes()
    for what, value in machine().items():
        if value != content["machine"][what]:
            print(f"{what} is {value}; the hashes were written with {content['machine'][what]}: last bits may differ")
    equal = 0
    for name, one in found.items():
        frozen = content["runs"].get(name)
        if frozen is None:
            print(f"not frozen yet: {name}")
        elif frozen["exact"] == one["exact"]:
            equal += 1
        else:
            close = "last bits only" if frozen["rounded"] == one["rounded"] else "more than last bits"
            print(f"differs: {name} ({', '.join(differing_tables(frozen, one))}; {close})")
    print(f"{equal} of {len(found)} runs equal those of commit {content['commit'][:7]}, in {took}")
    return 0 if equal == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
