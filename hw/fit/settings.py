"""The keys of ``python -m hw.fit``, and what they build."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from hw.fit.measured import MeasuredRun
from hw.fit.readers import read_run
from hw.fit.readers.columns import Naming
from hw.fit.server import Prompts, Server
from sim.config import build
from sim.cost.plan import dense_plan
from sim.engine.server_spec import ServerSpec
from sim.errors import ConfigError, nearest
from sim.limits import MOST_REPLICAS, check_count, check_whole

SIDES = ("client", "engine")


@dataclass(kw_only=True)
class ColumnNames:
    """The names of a table's columns; null takes known ones.

    sent, first_token, finish: times on one clock. prompt, output: tokens. ttft, e2e: time from the sending.
    decode: time from the first token to the last. gap: mean time between two tokens.
    failed: true where not empty, 0, false or ok.
    """

    sent: str | None = None
    prompt: str | None = None
    output: str | None = None
    ttft: str | None = None
    first_token: str | None = None
    finish: str | None = None
    e2e: str | None = None
    decode: str | None = None
    gap: str | None = None
    failed: str | None = None


@dataclass(kw_only=True)
class FitConfig:
    """Which runs to fit, and the server that they ran on.

    run: a folder or file, or several: a folder of hw.client or LLMServingSim; the JSON of vllm bench serve
        --save-detailed, guidellm, inference-perf or aiperf; or a table (CSV, Parquet, JSON lines), one row per request.
    judge: further runs that no fit sees, to state its errors on.
    columns: of a table, the names of the columns sent, prompt, output; ttft or first_token; and finish, e2e, decode or
        gap; failed. unit: of its times, s, ms, us or ns, where a column's name does not end in one.
    benchmark: which one of a file with several, from 0.
    side: who measured a table: client, or engine (then no front end is fitted).
    model, gpu, engine, frontend, budget, latency, workspace_bytes: the server, as in sim.replay.
    replicas: number of such servers behind a router. router: how it chooses; requests are then not matched one by one.
    distinct_prompts: how many prompts the client sends in turn; shared_tokens: how many tokens all prompts begin with.
        Both only matter with engine.prefix_caching.
    stated: take engine settings that the run's own files state, in place of engine= and budget=.
    free: which numbers to fit, of front_s, memory_bound, compute_bound, fixed_s, host_floor_s, front_token_s; null
        chooses, [] fits none.
    warm_up: how many first requests of each run to leave out; null finds them.
    settings: whether to try other settings of the server.
    name: of the calibration that is written; null takes that of the prices with _fitted.
    out: folder for the calibration and the report; null writes the calibration to conf/calibration of a checkout (else
        ./calibration), and the report to a new folder under runs/.
    """

    model: Any
    gpu: Any
    engine: Any
    frontend: Any
    budget: Any
    router: Any
    run: Any = None
    judge: Any = None
    latency: str | None = None
    workspace_bytes: float = 1.24e9
    replicas: int = 1
    columns: ColumnNames = field(default_factory=ColumnNames)
    unit: str = "s"
    benchmark: int | None = None
    side: str = "client"
    distinct_prompts: int | None = None
    shared_tokens: int = 0
    stated: bool = True
    free: Any = None
    warm_up: int | None = None
    settings: bool = True
    name: str | None = None
    out: str | None = None
    seed: int = 0


ConfigStore.instance().store(name="fit_schema", node=FitConfig)


def names_of(value: Any, key: str) -> list[str]:
    """Return a key that holds one text or a list of texts as a list.

    Raises:
        ConfigError: if it holds something else.
    """
    values = [] if value is None else [value] if isinstance(value, str) else value
    if isinstance(value, int | float | bool) or not all(isinstance(one, str) for one in values):
        raise ConfigError(f"{key} is {value!r:.80}; it must be a text, or a list of texts: {key}='[A,B]'")
    return list(values)


def runs_of(cfg: DictConfig, key: str = "run") -> list[MeasuredRun]:
    """Read the measured runs of a key.

    Raises:
        ConfigError: for a run that cannot be read, or none.
    """
    if cfg.side not in SIDES:
        raise ConfigError(f"side is {cfg.side!r}; {nearest(str(cfg.side), SIDES)}")
    naming = Naming(columns={str(k): v for k, v in cfg.columns.items() if v is not None}, unit=cfg.unit)
    paths = names_of(cfg[key], key)
    if key == "run" and not paths:
        raise ConfigError("no run to fit; set run= to a folder or file of a measured run, see --help")
    runs = [read_run(path, naming, benchmark=cfg.benchmark, side=cfg.side) for path in paths]
    sides = {run.side for run in runs}
    if len(sides) > 1:
        raise ConfigError("some runs were measured by clients and some in the engine; fit them one after the other")
    return runs


def server_of(cfg: DictConfig) -> Server:
    """Build the described server.

    Raises:
        RapLabError: for a part that does not exist, or numbers out of range.
    """
    check_whole(cfg.replicas, "replicas", 1)
    check_count(cfg.replicas, "replicas", MOST_REPLICAS, "lower replicas")
    check_whole(cfg.shared_tokens, "shared_tokens", 0)
    if cfg.distinct_prompts is not None:
        check_whole(cfg.distinct_prompts, "distinct_prompts", 1)
    config = build(cfg.engine)
    # The ids of prompts are made here, one for each KV block, as real engines share them.
    config = replace(config, hash_block_tokens=config.kv_block_tokens)
    spec = ServerSpec.from_parts(
        build(cfg.model), build(cfg.gpu), config, latency=cfg.latency, workspace_bytes=cfg.workspace_bytes
    )
    spec = replace(spec, latency=spec.priced(), quality_nll=None)
    plan = dense_plan(spec.model)
    return Server(
        spec=spec,
        plan=plan,
        budget=build(cfg.budget)(spec.budget_context(plan)),
        front_end=build(cfg.frontend),
        prompts=Prompts(distinct=cfg.distinct_prompts, shared_tokens=cfg.shared_tokens),
        replicas=cfg.replicas,
        router=build(cfg.router),
        seed=cfg.seed,
    )


def name_of_fit(cfg: DictConfig, calibration: str) -> str:
    """Return the name of the calibration that is written.

    Raises:
        ConfigError: if it is no plain name of a file.
    """
    name = cfg.name if cfg.name is not None else f"{calibration}_fitted"
    if (
        not isinstance(name, str)
        or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name)
        or name.endswith(".json")
    ):
        raise ConfigError(f"name is {name!r}; it must be letters, digits, dots, dashes and underscores, without .json")
    return name
