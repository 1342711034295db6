"""The numbers that a fit may change, and what is believed of each before it.

| name | prior | what it is |
|---|---|---|
| `front_s` | 5 +- 5 ms | from a client's sending to the engine's queue |
| `memory_bound` | 1 +- 10 % | time of reading weights and KV over that of the calibration |
| `compute_bound` | 1 +- 25 % | time of arithmetic over that of the calibration |
| `fixed_s` | + 0.5 ms | overhead of an iteration beyond the calibration's |
| `host_floor_s` | 10 ms, times or over 1.6 | least time of an iteration, of a server without CUDA graphs |
| `front_token_s` | + 2 us | more of the way in for each token of the prompt |

Each number is counted in deviations from its prior; factors by their logarithm, and so is `host_floor_s`, which differs
most from server to server. Two numbers that were fitted on a short run at a low load left 2 % of ITL and E2E and 6 % of
TTFT on other loads; five fit better and predict worse, because one load cannot separate linear layers from attention,
nor overhead from memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hw.fit.server import Server
from sim.cost.bounds import Factors
from sim.cost.front_end import FrontEnd
from sim.cost.latency import LatencyModel
from sim.errors import ConfigError, nearest
from sim.types import Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Prior:
    """What is believed of a number: its middle, one deviation (of a factor: of its logarithm), and its bounds.

    factor: whether deviations are those of the logarithm.
    """

    middle: float
    deviation: float
    least: float
    most: float
    factor: bool = False
    far: float = math.inf
    """A value further than this from the middle (of a factor: its logarithm) says that the description is wrong."""

    def value(self, deviations: float) -> float:
        """Return the number that lies so many deviations from the middle."""
        if self.factor:
            return self.middle * math.exp(self.deviation * deviations)
        return self.middle + self.deviation * deviations

    def deviations(self, value: float) -> float:
        """Return how many deviations a number lies from the middle."""
        return (math.log(value / self.middle) if self.factor else value - self.middle) / self.deviation


PRIORS: Mapping[str, Prior] = {
    "front_s": Prior(middle=0.005, deviation=0.005, least=0.0, most=1.0, far=0.015),
    "memory_bound": Prior(middle=1.0, deviation=0.10, least=0.2, most=5.0, factor=True, far=0.22),
    "compute_bound": Prior(middle=1.0, deviation=0.25, least=0.2, most=5.0, factor=True, far=0.47),
    "fixed_s": Prior(middle=0.0, deviation=0.0005, least=0.0, most=0.1, far=0.003),
    "host_floor_s": Prior(middle=0.010, deviation=0.5, least=1e-4, most=5.0, factor=True, far=2.4),
    "front_token_s": Prior(middle=0.0, deviation=2e-6, least=0.0, most=1e-3, far=1e-5),
}
FRONT_END = ("front_s", "front_token_s")
"""The numbers of the front end."""
FLOOR = "host_floor_s"
UNITS = {
    "front_s": (1e3, "ms"),
    "fixed_s": (1e3, "ms"),
    "host_floor_s": (1e3, "ms"),
    "front_token_s": (1e6, "us"),
}


def shown(name: str, value: float) -> str:
    """Return a number of a parameter as text with its unit."""
    factor, unit = UNITS.get(name, (1.0, ""))
    return f"{factor * value:.3g} {unit}".strip() if unit else f"{value:.3f}"


def check_free(free: Sequence[str], served_rps: Sequence[float], engine_side: bool) -> None:
    """Check the names of the numbers that are to be fitted.

    Args:
        free: the names. served_rps: of each run, the requests per second that were served.
        engine_side: whether a run was measured in the engine.
    Raises:
        ConfigError: for an unknown or repeated one, or one that these runs cannot tell.
    """
    for name in free:
        if name not in PRIORS:
            raise ConfigError(f"free has {name!r}; {nearest(name, PRIORS)}")
    if len(set(free)) < len(free):
        raise ConfigError(f"free has a name twice: {', '.join(free)}; name each number once")
    for name, what in (("fixed_s", "an overhead"), (FLOOR, "the least time of an iteration")):
        if name in free and max(served_rps) < MOST_ALIKE * min(served_rps):
            raise ConfigError(
                f"free has {name}, but one load cannot separate {what} from memory-bound time; give runs at two rates, "
                f"run='[A,B]', one at least {MOST_ALIKE:g} times the other (requests per second that were served here: "
                f"{', '.join(f'{rate:.3g}' for rate in served_rps)}), or leave {name} out"
            )
    if engine_side and set(FRONT_END) & set(free):
        raise ConfigError(
            "free has a number of the front end, but the run was measured in the engine, behind it; leave it out"
        )


MOST_ALIKE = 1.3
"""Rates count as two from this ratio on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Values of the free numbers, by name."""

    values: Mapping[str, float]

    def __getitem__(self, name: str) -> float:
        return self.values.get(name, PRIORS[name].middle)

    @property
    def factors(self) -> Factors:
        """The factors on the times of a calibration."""
        return Factors(memory_bound=self["memory_bound"], compute_bound=self["compute_bound"])


def point_of(free: Sequence[str], deviations: Floats) -> Point:
    """Return the values of the free numbers from their deviations, within their bounds."""
    found = {}
    for name, at in zip(free, deviations.tolist(), strict=True):
        prior = PRIORS[name]
        found[name] = min(max(prior.value(at), prior.least), prior.most)
    return Point(values=found)


def priced(latency: LatencyModel, point: Point) -> LatencyModel:
    """Return a latency model at a point."""
    found = latency.with_factors(point.factors)
    if FLOOR in point.values:
        found = found.with_host_floor(point[FLOOR])
    if point.values.get("fixed_s"):
        found = found.with_fixed(latency.fixed_s + point["fixed_s"], "hw.fit")
    return found


def server_at(server: Server, point: Point) -> Server:
    """Return the described server with the values of a point; numbers that are not free stay as described."""
    front = server.front_end
    front = FrontEnd(
        front_s=point.values.get("front_s", front.front_s),
        front_token_s=point.values.get("front_token_s", front.front_token_s),
        back_s=front.back_s,
    )
    return replace(server.with_latency(priced(server.spec.priced(), point)), front_end=front)


def far_values(point: Point) -> list[str]:
    """Return a sentence for each value that is too far from its prior to be one of a well-described server."""
    found = []
    for name, value in point.values.items():
        prior = PRIORS[name]
        if name == FLOOR and value == 0.0:
            found.append(f"{name} is 0: these runs show no least time of an iteration")
            continue
        distance = math.log(value / prior.middle) if prior.factor else value - prior.middle
        advice = ADVICE[name][distance > 0]
        if abs(distance) > prior.far and advice:
            found.append(f"{name} is {shown(name, value)}: {advice}")
    return found


ADVICE: Mapping[str, tuple[str, str]] = {
    "front_s": (
        "",
        "clients wait elsewhere too: check the network, chat templates, and how many requests the client "
        "or a proxy lets through at once",
    ),
    "memory_bound": (
        "the server reads less than described: check model=, gpu= and the precision of its weights (a calibration of a "
        "quantized model), or speculative decoding, which the simulator does not have",
        "the server decodes slower than its kernels: check model=, gpu=, gpu.tp=, eager mode (no CUDA "
        "graphs: free host_floor_s with runs at two rates), or another program on the GPU",
    ),
    "compute_bound": (
        "prompts cost less than described: check engine.prefix_caching with distinct_prompts= or shared_tokens=, and "
        "model=, gpu= and the precision",
        "prompts cost more than described: check gpu= (a power limit?), model=, eager mode, and whether "
        "engine.prefix_caching finds less than you think",
    ),
    "fixed_s": ("", "the host is slow: check processor load, logging and the version of the server"),
    "host_floor_s": ("", "the host launches operations very slowly: check processor load"),
    "front_token_s": ("", "prompts are slow on their way in: check tokenizing, chat templates and the network"),
}
