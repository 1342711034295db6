"""Prometheus metrics: under vLLM's names where they mean the same, and under ``rap:`` for what only this engine has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from prometheus_client import Counter, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from sim.cost.plan import describe
from sim.engine.live_request import LiveRequest
from sim.engine.protocol import EngineState
from sim.serve.engine_thread import EngineThread, Reason

GAUGES: Mapping[str, tuple[str, str]] = {
    "vllm:num_requests_waiting": ("waiting", "Requests in the queue."),
    "vllm:num_requests_running": ("running", "Requests that the engine runs."),
    "rap:kv_layer_blocks": ("kv_layer_blocks", "KV blocks of the pool, each for one layer."),
    "rap:kv_used_layer_blocks": ("kv_used_layer_blocks", "KV blocks that requests hold."),
    "rap:weight_bytes": ("weight_bytes", "Bytes of the resident weights."),
    "rap:budget_bytes": ("budget_bytes", "Bytes that weights, KV and workspace may take together."),
    "rap:incoming_bytes": ("incoming_bytes", "Bytes of weights that are being copied in."),
}
COUNTERS: Mapping[str, tuple[str, str]] = {
    "vllm:generation_tokens": ("produced_tokens", "Tokens produced."),
    "vllm:num_preemptions": ("preemptions", "Times that a running request gave up its KV and waited again."),
    "rap:requests_arrived": ("arrived", "Requests that arrived."),
    "rap:iterations": ("iterations", "Batches run."),
    "rap:busy_seconds": ("busy_s", "Seconds in which a batch ran."),
    "rap:budget_violation_seconds": ("budget_violation_s", "Seconds in which more bytes were held than the budget."),
}
"""Metric (counters without ``_total``) -> field of EngineState, and what it counts."""

# The buckets are vLLM's (vllm/v1/metrics/loggers.py), so that its dashboards show this server too.
TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
HISTOGRAMS: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token": ("Time to first token, from the arrival on.", TTFT_S),
    "inter_token_latency": ("Time between two tokens of one request.", TOKEN_S),
    "time_per_output_token": ("The same as inter_token_latency, under its older name.", TOKEN_S),
    "request_time_per_output_token": ("Mean time between the tokens of a request that finished.", TOKEN_S),
    "e2e_request_latency": ("Time from the arrival of a request that finished to its last token.", REQUEST_S),
    "request_queue_time": ("Time from the arrival of a request to its admission.", REQUEST_S),
    "request_prefill_time": ("Time from the admission of a request that finished to its first token.", REQUEST_S),
    "request_decode_time": ("Time from the first token of a request that finished to its last.", REQUEST_S),
    "request_inference_time": ("Time from the admission of a request that finished to its last token.", REQUEST_S),
}
"""Histogram without ``vllm:`` and ``_seconds`` -> what it measures, and its buckets."""


LABELS = ("model_name", "engine")
"""The labels of every metric, as vLLM has them."""
ENGINE = "0"
"""The number of the engine: a server has one."""


class EngineMetrics(Collector):
    """Reads the engine's latest state at every scrape, and observes its requests. Each app has its own registry."""

    def __init__(self, thread: EngineThread, model: str) -> None:
        """Measure the engine of a thread, which serves a model of this name."""
        self._thread, self._labels = thread, (model, ENGINE)
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._histograms = {
            name: Histogram(f"vllm:{name}_seconds", meaning, LABELS, registry=self.registry, buckets=buckets).labels(
                *self._labels
            )
            for name, (meaning, buckets) in HISTOGRAMS.items()
        }
        ended = Counter(
            "vllm:request_success", "Requests that ended, by reason.", [*LABELS, "finished_reason"],
            registry=self.registry,
        )  # fmt: skip
        self._prompt_tokens, self._asked_tokens, self._cached_tokens = (
            Counter(f"vllm:{name}", meaning, LABELS, registry=self.registry).labels(*self._labels)
            for name, meaning in (
                ("prompt_tokens", "Prompt tokens whose prefill ended; a second prefill does not count."),
                ("prefix_cache_queries", "Of them, those looked for in the prefix cache: all, if there is one."),
                ("prefix_cache_hits", "Of them, those whose KV the prefix cache had."),
            )
        )
        reasons: tuple[Reason, ...] = ("stop", "length", "abort", "error")
        self._ended = {reason: ended.labels(*self._labels, reason) for reason in reasons}
        thread.observer = self

    def saw_token(self, live: LiveRequest, gap_s: float | None) -> None:
        """Take note of a token; ``gap_s``: seconds since the token before, None for the first."""
        if gap_s is None:
            self._prompt_tokens.inc(live.request.prompt_tokens)
            if self._thread.engine.config.prefix_caching:
                self._asked_tokens.inc(live.request.prompt_tokens)
                self._cached_tokens.inc(max(live.cached_tokens, 0))
            self._histograms["time_to_first_token"].observe(live.first_token_s - live.request.arrival_s)
            self._histograms["request_queue_time"].observe(live.admitted_s - live.request.arrival_s)
        else:
            self._histograms["inter_token_latency"].observe(gap_s)
            self._histograms["time_per_output_token"].observe(gap_s)

    def saw_end(self, live: LiveRequest | None, reason: Reason, e2e_s: float) -> None:
        """Take note of the end of a request, ``e2e_s`` after its arrival; ``live`` is None if it never arrived."""
        self._ended[reason].inc()
        if live is None or reason not in ("stop", "length") or math.isnan(live.first_token_s):
            return
        self._histograms["e2e_request_latency"].observe(e2e_s)
        self._histograms["request_prefill_time"].observe(live.first_token_s - live.admitted_s)
        self._histograms["request_decode_time"].observe(live.last_token_s - live.first_token_s)
        self._histograms["request_inference_time"].observe(live.last_token_s - live.admitted_s)
        if live.produced_tokens > 1:
            mean_s = (live.last_token_s - live.first_token_s) / (live.produced_tokens - 1)
            self._histograms["request_time_per_output_token"].observe(mean_s)

    def collect(self) -> Iterator[Metric]:
        """Yield what one state shows."""
        state: EngineState = self._thread.state
        for name, (field, meaning) in GAUGES.items():
            yield self._gauge(name, meaning, getattr(state, field))
        used = state.kv_used_layer_blocks / state.kv_layer_blocks if state.kv_layer_blocks else 0.0
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of the KV blocks that requests hold, 0 to 1.", used)
        counted = {name: (getattr(state, field), meaning) for name, (field, meaning) in COUNTERS.items()}
        counted["rap:out_of_memory"] = (self._thread.engine.out_of_memory, "Times that the device ran out of memory.")
        for name, (value, meaning) in counted.items():
            counter = CounterMetricFamily(name, meaning, labels=LABELS)
            counter.add_metric(self._labels, value)
            yield counter
        config, layers = self._thread.engine.config, len(state.plan.weight_bits)
        cache = InfoMetricFamily("vllm:cache_config", "Size of a KV block in tokens, and blocks now.", labels=LABELS)
        about = {"block_size": config.kv_block_tokens, "num_gpu_blocks": state.kv_layer_blocks // layers}
        about["enable_prefix_caching"] = config.prefix_caching
        cache.add_metric(self._labels, {name: str(value) for name, value in about.items()})
        yield cache
        plans = InfoMetricFamily("rap:plan", "The plan that runs, and the one that is wanted.", labels=LABELS)
        plans.add_metric(self._labels, {"runs": describe(state.plan), "wanted": describe(state.target)})
        yield plans

    def _gauge(self, name: str, meaning: str, value: float) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(name, meaning, labels=LABELS)
        gauge.add_metric(self._labels, value)
        return gauge
