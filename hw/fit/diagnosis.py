"""What a run shows before anything is fitted: figures of both sides, and sentences that name the likely wrong setting.

Descriptions are wrong more often than prices. So the first comparison has nothing free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hw.fit.measured import MeasuredRun
from hw.fit.regression import Costs, costs
from hw.fit.server import Server, Simulated, most_rate_rps, simulate
from sim.errors import ConfigError
from sim.results.records import Iterations, Moments
from sim.types import Floats

MOST_PERIOD = 5000
PERIOD_SHARE = 0.9
"""Share of prompts that must have the length of the one a period before."""
WARM_UP_E2E, WARM_UP_TTFT = 1.35, 2.0
"""A request is slow by warm-up if it takes so many times as long as the second half of the run, against simulation."""
WARM_UP_SHARE, WARM_UP_WINDOW = 0.2, 5
STEP_SHARE = 0.08
"""Share of requests that makes a bar of the histogram of TTFT a step."""
PREFILL_SHARE = 0.20
"""From this share of busy time on, prompts tell the cost of arithmetic."""
NEAR_MOST = 0.9
PLATEAU_SHARE = 0.2
LIKE_ITSELF = 1.25
"""A ratio of real to simulated within this factor of 1 is a matter of prices, not of a setting."""
LITTLE = 0.5
"""What another sequence adds, against simulation, if a least time of iterations hides it."""

WAITING = 3.0
"""A TTFT this many times as long as simulated is waiting for a place."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Diagnosis:
    """The figures of a run and what they say.

    real, simulated: costs of a token; None for several servers, since a client does not know which one served it.
    period: prompts repeat after so many; distinct: how many texts there are, where the file has texts.
    steps_s: values at which TTFT gathers, (real, simulated). warm_up: requests before the server ran at full speed.
    warm_ratio: of those over the others, real over simulated. most_rps, utilization: by simulation.
    prefill_share: of busy time. peak: sequences that decode at once, (real, simulated).
    """

    run: MeasuredRun
    simulated_run: Simulated
    real: Costs | None
    simulated: Costs | None
    period: int | None
    distinct: int | None
    steps_s: tuple[list[float], list[float]]
    warm_up: int
    warm_ratio: float | None
    most_rps: float | None
    utilization: float | None
    prefill_share: float
    peak: tuple[int, int]
    kv_peak_tokens: int
    sentences: list[str]


def diagnose(run: MeasuredRun, server: Server) -> Diagnosis:
    """Compare a run with its simulation on the described server, nothing fitted.

    Raises:
        ConfigError: if that server can take no request of the run.
    """
    single = server.replicas == 1
    done = simulate(server, run, keep_iterations=single)
    if done.rejected == len(run):
        raise ConfigError(
            f"no request of {run.source} fits into the KV cache or the context of the described server; check model=, "
            "gpu=, the budget and engine.max_context_tokens, and the tokens of the prompts"
        )
    real, ours = (costs(run), costs(done)) if single else (None, None)
    most, full = most_rate_rps(server, run)
    warm_up, warm_ratio = find_warm_up(run, done) if single else (0, None)
    found = Diagnosis(
        run=run,
        simulated_run=done,
        real=real,
        simulated=ours,
        period=find_period(run.prompt_tokens),
        distinct=None if run.prompts is None else len(np.unique(run.prompts)),
        steps_s=(find_steps(run.ttft_s), find_steps(done.ttft_s)),
        warm_up=warm_up,
        warm_ratio=warm_ratio,
        most_rps=most,
        utilization=run.rate_rps / most if most and full and np.isfinite(run.rate_rps) else None,
        prefill_share=_prefill_share(run, server, done) * _dearer(real, ours),
        peak=(_peak(run)[0], _peak(done)[0]),
        kv_peak_tokens=kv_peak(run),
        sentences=[],
    )
    first_round = not server.config.prefix_caching and (
        found.period is not None or (real is not None and ours is not None and _hardly_computed(real, ours))
    )
    if found.warm_up and (first_round or (found.utilization or 0.0) >= NEAR_MOST):
        # The first round of prompts that come again is slower because it is computed; and the first requests of a full
        # server find it empty, so that a wrong limit looks like a slow start.
        found = replace(found, warm_up=0, warm_ratio=None)
    found.sentences.extend(sentences(found, server))
    return found


def find_period(lengths: Any) -> int | None:
    """Return after how many requests the lengths of prompts repeat; None if they do not, or cannot show it.

    Lengths that are all alike repeat always, so a period must match far more often than chance.
    """
    values = np.asarray(lengths)
    chance = float(np.sum((np.unique(values, return_counts=True)[1] / len(values)) ** 2))
    if chance > 0.5:
        return None
    wanted = max(PERIOD_SHARE, chance + 0.4)
    for period in range(2, min(len(values) * 2 // 3, MOST_PERIOD) + 1):
        if float(np.mean(values[period:] == values[:-period])) >= wanted:
            return period
    return None


def find_steps(ttft_s: Floats) -> list[float]:
    """Return the values at which TTFT gathers: narrow bars of its histogram with many requests.

    A prompt that is cut into chunks adds full iterations, so chunk sizes show as steps.
    """
    values = ttft_s[np.isfinite(ttft_s) & (ttft_s > 0)]
    if len(values) < 20:
        return []
    logs = np.log(values)
    low, high = np.quantile(logs, (0.01, 0.99)).tolist()
    bars = max(2, min(60, int((high - low) / 0.03) + 1))
    count, edges = np.histogram(logs, bars, range=(low, high + 1e-9))
    padded = np.concatenate(([0], count, [0]))
    top = (count >= STEP_SHARE * len(values)) & (count >= padded[:-2]) & (count >= padded[2:])
    found = []
    for at in np.flatnonzero(top):
        inside = (logs >= edges[at]) & (logs <= edges[at + 1])
        found.append(float(np.exp(np.median(logs[inside]))))
    return found[:6]


def find_warm_up(run: MeasuredRun, done: Simulated) -> tuple[int, float | None]:
    """Return how many first requests a server was slow for, and how slow: their ratio over that of the others."""
    e2e, ttft = (_excess(getattr(run, name), getattr(done, name)) for name in ("e2e_s", "ttft_s"))
    slow = (e2e > WARM_UP_E2E) | (ttft > WARM_UP_TTFT)
    most, end = int(WARM_UP_SHARE * len(slow)), 0
    for at in range(most):
        window = slow[at : at + WARM_UP_WINDOW]
        if slow[at] and (at == 0 or window.mean() > 0.5 or slow[max(0, at - WARM_UP_WINDOW) : at].mean() > 0.5):
            end = at + 1
        elif at >= end + WARM_UP_WINDOW:
            break
    if end == 0 or end >= most:  # slow all along is no warm-up
        return 0, None
    return end, float(np.nanmedian(np.maximum(e2e, ttft)[:end]))


def _excess(real_s: Floats, simulated_s: Floats) -> Floats:
    """Return real over simulated of each request, over the median of the second half; 1 where it is not known."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = real_s / simulated_s
    known = np.isfinite(ratio) & (ratio > 0)
    later = ratio[len(ratio) // 2 :][known[len(ratio) // 2 :]]
    return np.where(known, ratio / np.median(later), 1.0) if len(later) else np.ones(len(ratio))


def _prefill_share(run: MeasuredRun, server: Server, done: Simulated) -> float:
    """Return the share of busy time that prompts take, beyond the decodes next to them."""
    rows = done.iterations
    if rows is None:
        computed = float((run.prompt_tokens - done.cached_tokens).sum())
        latency = server.spec.priced()
        chunk = server.config.limits.max_batch_tokens
        each_s = latency.iteration_s(server.plan, [(chunk, 0)], 0, 0, 1) / chunk
        gap_s = float(np.nansum(done.tpot_s * (done.produced_tokens - 1)))
        return computed * each_s / max(computed * each_s + gap_s, 1e-12)
    return prefill_share(rows)


def _dearer(real: Costs | None, ours: Costs | None) -> float:
    """Return how many times as long a prompt takes in the run as in the simulation, at most twice; 1 if not known."""
    if real is None or ours is None or real.prompt_s < 3 * real.error[2] or ours.prompt_s < 3 * ours.error[2]:
        return 1.0
    return min(max(real.prompt_s / ours.prompt_s, 0.5), 2.0)


def prefill_share(rows: Iterations) -> float:
    """Return the share of the busy time of iterations that prompts take: what they add to decodes alone."""
    spent_s = rows.end_s - rows.start_s
    prompts = rows.prefill_tokens > 0
    alone = ~prompts & (rows.decode_requests > 0)
    if not prompts.any():
        return 0.0
    decode_s = np.zeros(len(spent_s))
    if alone.sum() >= 2 and np.ptp(rows.decode_requests[alone]) > 0:
        slope, base = np.polyfit(rows.decode_requests[alone], spent_s[alone], 1)
        decode_s = np.where(rows.decode_requests > 0, base + slope * rows.decode_requests, 0.0)
    elif alone.any():
        decode_s = np.where(rows.decode_requests > 0, spent_s[alone].mean(), 0.0)
    extra = np.clip(spent_s - decode_s, 0.0, None)[prompts].sum()
    return float(extra / max(spent_s.sum(), 1e-12))


def _peak(moments: Moments) -> tuple[int, float]:
    """Return how many sequences decode at once, P95 over busy time, and the share of it with 90 % of them or more.

    Not the maximum: clients see tokens late, so a request seems to decode while the next one has its place.
    """
    known = np.isfinite(moments.first_token_s) & np.isfinite(moments.finish_s)
    at = np.concatenate([moments.first_token_s[known], moments.finish_s[known]])
    change = np.concatenate([np.ones(int(known.sum())), -np.ones(int(known.sum()))])
    order = np.lexsort((change, at))
    running = np.cumsum(change[order])
    spans = np.diff(at[order], append=at[order][-1])
    busy_s = float(spans[running > 0].sum())
    if busy_s <= 0:
        return int(running.max()), 0.0
    by_count = np.argsort(running, kind="stable")
    at_most = np.cumsum(np.where(running > 0, spans, 0.0)[by_count])
    peak = int(running[by_count][min(int(np.searchsorted(at_most, 0.95 * busy_s)), len(running) - 1)])
    return peak, float(spans[running >= 0.9 * peak].sum()) / busy_s


def kv_peak(run: MeasuredRun) -> int:
    """Return the most tokens of KV that requests that decode at once must have held, if no prompt is shared."""
    first, finish = run.first_token_s, run.finish_s
    rate = np.where(finish > first, (run.produced_tokens - 1) / np.maximum(finish - first, 1e-9), 0.0)
    at = finish - 1e-9  # where a request holds most
    most = 0
    for moment in at[:: max(1, len(at) // 400)]:
        held = (first <= moment) & (moment < finish)
        most = max(most, int((run.prompt_tokens + rate * (moment - first))[held].sum()))
    return most


# --- Sentences -------------------------------------------------------------------------------------------------------


def sentences(found: Diagnosis, server: Server) -> list[str]:
    """Return what the figures say, the most certain first; a wrong unit alone, for it falsifies all others."""
    if unit := _units(found):
        return unit
    said = [*_of_limits(found, server), *_of_prompts(found, server), *_of_costs(found, server)]
    if found.warm_up and found.warm_ratio is not None:
        said.append(
            f"the first {found.warm_up} request{'s' * (found.warm_up > 1)} took {found.warm_ratio:.1f} times as long "
            "as later ones, against simulation: the server was warming up; they are left out of the fit (warm_up=N "
            "changes that)"
        )
    if found.utilization is not None and found.utilization >= NEAR_MOST:
        said.append(
            f"the run offers {100 * found.utilization:.0f} % of the maximum rate of the described server: from "
            f"{100 * NEAR_MOST:.0f} % on TTFT depends on small errors; judge the maximum rate instead"
        )
    if found.simulated_run.rejected:
        said.append(
            f"{found.simulated_run.rejected} requests fit into no KV cache or context of the described server, but the "
            "real one answered them: raise engine.max_context_tokens or the budget (budget.share, budget.blocks)"
        )
    return said


def _units(found: Diagnosis) -> list[str]:
    """Return a sentence if times seem to be in another unit."""
    # A unit changes all requests; where requests wait long, the first ones do not.
    with np.errstate(divide="ignore", invalid="ignore"):
        few, ratio = (
            np.nanquantile(found.run.ttft_s, (0.05, 0.5)) / np.nanquantile(found.simulated_run.ttft_s, (0.05, 0.5))
        ).tolist()
    if not ((min(few, ratio) > 300 and ratio < 3000) or 1 / 3000 < ratio < 1 / 300):
        return []
    unit = "ms" if ratio > 1 else "s"
    return [
        f"real TTFT is {ratio:.3g} times the simulated one, so its unit may be wrong; unit={unit} changes a table's"
    ]


def _of_limits(found: Diagnosis, server: Server) -> list[str]:
    """Return sentences on the number of requests that run at once, and on memory."""
    said = []
    real, ours = found.peak
    limit = server.config.limits.max_running * server.replicas
    if real > 1.05 * limit:
        said.append(
            f"{real} requests decoded at once, but engine.limits.max_running allows {limit // server.replicas}"
            f"{' on each server' if server.replicas > 1 else ''}: set it to the server's max_num_seqs, at least "
            f"{-(-real // server.replicas)}"
        )
    real_share = _peak(found.run)[1]
    if real <= limit and server.replicas == 1 and ours > 1.2 * real and real_share >= PLATEAU_SHARE and real >= 2:
        said.append(
            f"hardly more than {real} requests decoded at once, {100 * real_share:.0f} % of the time nearly that many, "
            f"but {ours} in the simulation: the server has a limit, its max_num_seqs (engine.limits.max_running), its "
            "KV blocks (budget=kv_blocks budget.blocks=N), or the client lets only so many through"
        )
    return said


def _of_prompts(found: Diagnosis, server: Server) -> list[str]:
    """Return sentences on prompts that come again."""
    said = []
    repeats = found.period
    if found.distinct is not None and found.distinct < 0.9 * len(found.run):
        said.append(
            f"only {found.distinct} of {len(found.run)} prompts differ in their text: a prefix cache holds the others"
            + ("" if server.config.prefix_caching else "; set engine.prefix_caching=true if the server has it on")
        )
    elif repeats is not None and server.prompts.distinct != repeats:
        said.append(
            f"prompt lengths repeat after {repeats} requests: the client sends {repeats} prompts in turn, and a prefix "
            f"cache holds them after the first round; set engine.prefix_caching=true distinct_prompts={repeats}, "
            "unless the server has no prefix cache"
        )
    elif server.prompts.distinct is not None and repeats is None and np.ptp(found.run.prompt_tokens) > 0:
        said.append(f"distinct_prompts is {server.prompts.distinct}, but prompt lengths do not repeat; check it")
    return said


def _of_costs(found: Diagnosis, server: Server) -> list[str]:
    """Return sentences on the three costs of a token that differ by more than prices do."""
    real, ours = found.real, found.simulated
    if real is None or ours is None:
        return []
    said = []
    if _has_floor(real, ours):
        return [
            f"a token alone takes {1e3 * real.base_s:.2g} ms, simulated {1e3 * ours.base_s:.2g}, and more sequences "
            "and prompts add little to that: iterations seem to have a least time, as on a server without CUDA graphs; "
            "fit it to runs at two rates, run='[A,B]' free='[front_s,memory_bound,host_floor_s]'; if the server has "
            "CUDA graphs, check model=, gpu= and the precision of the weights"
        ]
    if _differs(real.prompt_s, ours.prompt_s, real.error[2], ours.error[2]):
        said.append(
            f"a prompt that comes in costs the others {1e3 * real.prompt_s:.2g} ms, simulated "
            f"{1e3 * ours.prompt_s:.2g}: " + _of_prompt_cost(found, server, cheap=real.prompt_s < ours.prompt_s)
        )
    if _near(found.run.tpot_s, found.simulated_run.tpot_s):
        return said  # base and sequence stand in for each other where the number of requests hardly changes
    if _differs(real.base_s, ours.base_s, real.error[0], ours.error[0]):
        said.append(
            f"a token alone takes {1e3 * real.base_s:.2g} ms, simulated {1e3 * ours.base_s:.2g}: check model=, gpu= "
            "and the precision of the weights"
        )
    if _differs(real.sequence_s, ours.sequence_s, real.error[1], ours.error[1]):
        said.append(
            f"each running sequence adds {1e6 * real.sequence_s:.2g} us to a token, simulated "
            f"{1e6 * ours.sequence_s:.2g}: check model=, gpu=, the lengths of prompts, the precision of the KV "
            "cache, and the number of servers (replicas=)"
        )
    return said


def _has_floor(real: Costs, ours: Costs) -> bool:
    """Return whether tokens are slow alone, and hardly slower with others: iterations then have a least time."""
    return (
        real.base_s > ours.base_s
        and _differs(real.base_s, ours.base_s, real.error[0], ours.error[0])
        and real.sequence_s < LITTLE * ours.sequence_s
        and real.prompt_s < ours.prompt_s
    )


def _hardly_computed(real: Costs, ours: Costs) -> bool:
    """Return whether a prompt costs so much less than simulated that a prefix cache may hold it."""
    return real.prompt_s < ours.prompt_s and _differs(real.prompt_s, ours.prompt_s, real.error[2], ours.error[2])


def _of_prompt_cost(found: Diagnosis, server: Server, *, cheap: bool) -> str:
    """Return what to check if a prompt costs something else than simulated."""
    caching = server.config.prefix_caching
    real_s, ours_s = (float(np.nanmedian(one.ttft_s)) for one in (found.run, found.simulated_run))
    if cheap and not caching and real_s > WAITING * ours_s:
        return (
            "requests wait before they come in, so fewer come together; check the limits of the server first "
            "(engine.limits.max_running, budget=kv_blocks budget.blocks=N)"
        )
    if cheap and not caching and found.period is None and real_s > ours_s:
        return (
            "but TTFT is no shorter than simulated, so prompts are computed, perhaps in smaller pieces; check "
            "engine.limits.max_batch_tokens, model= and gpu="
        )
    if cheap and not caching:
        return (
            "prompts are hardly computed, so a prefix cache may hold them; set engine.prefix_caching=true with "
            f"distinct_prompts={found.period or 'N'} (or shared_tokens=N)"
        )
    if caching and not cheap:
        return (
            "the prefix cache finds less than described; check distinct_prompts and shared_tokens, or set "
            "engine.prefix_caching=false"
        )
    return "check model=, gpu=, engine.scheduler and engine.limits.max_batch_tokens, or let compute_bound be fitted"


def _near(real_s: Floats, ours_s: Floats) -> bool:
    """Return whether the medians of two sides differ by no more than prices do."""
    known = [values[np.isfinite(values) & (values > 0)] for values in (real_s, ours_s)]
    if not all(len(values) for values in known):
        return True
    ratio = float(np.median(known[0]) / np.median(known[1]))
    return 1 / LIKE_ITSELF < ratio < LIKE_ITSELF


def _differs(real: float, ours: float, *errors: float) -> bool:
    """Return whether two costs differ by more than prices and their errors explain."""
    if min(real, ours) < 1e-3 * max(real, ours) and max(errors) > 0.1 * max(real, ours):
        return False  # at its bound, because the others stand in for it
    far = max(real, ours) > LIKE_ITSELF * LIKE_ITSELF * max(min(real, ours), 1e-12)
    return far and abs(real - ours) > 3 * math.hypot(*errors) + 2e-4 * max(real, ours)


def shown_ms(values: Sequence[float]) -> str:
    """Return times as milliseconds."""
    return ", ".join(f"{1e3 * value:.3g}" for value in values) or "none"
