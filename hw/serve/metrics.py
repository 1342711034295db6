"""The state of the engine as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry

from hw.serve.engine_thread import EngineThread
from sim.engine.protocol import EngineState

GAUGES = {
    "requests_waiting": ("waiting", "Requests in the queue."),
    "requests_running": ("running", "Requests that the engine runs."),
    "kv_layer_blocks": ("kv_layer_blocks", "KV blocks of the pool, each for one layer."),
    "kv_used_layer_blocks": ("kv_used_layer_blocks", "KV blocks that requests hold."),
    "weight_bytes": ("weight_bytes", "Bytes of the resident weights."),
    "budget_bytes": ("budget_bytes", "Bytes that weights, KV and workspace may take together."),
    "incoming_bytes": ("incoming_bytes", "Bytes of weights that are being copied in."),
}
COUNTERS = {
    "requests_arrived": ("arrived", "Requests that arrived."),
    "requests_finished": ("finished", "Requests that finished."),
    "requests_rejected": ("rejected", "Requests that were rejected."),
    "preemptions": ("preemptions", "Times that a running request gave up its KV and waited again."),
    "prompt_tokens": ("arrived_prompt_tokens", "Prompt tokens of the requests that arrived."),
    "produced_tokens": ("produced_tokens", "Tokens produced."),
    "iterations": ("iterations", "Batches run."),
    "busy_seconds": ("busy_s", "Seconds in which a batch ran."),
    "budget_violation_seconds": ("budget_violation_s", "Seconds in which more bytes were held than the budget allows."),
}
"""Metric without ``rap_lab_`` and ``_total`` -> field of EngineState, and what it counts."""


class EngineMetrics(Collector):
    """Reads the engine's latest state at every scrape. Each app has its own registry."""

    def __init__(self, thread: EngineThread) -> None:
        """Describe the engine of a thread."""
        self._thread = thread
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics, taken from one state."""
        state: EngineState = self._thread.state
        for name, (field, meaning) in GAUGES.items():
            yield GaugeMetricFamily(f"rap_lab_{name}", meaning, value=getattr(state, field))
        for name, (field, meaning) in COUNTERS.items():
            yield CounterMetricFamily(f"rap_lab_{name}", meaning, value=getattr(state, field))
        yield CounterMetricFamily(
            "rap_lab_out_of_memory", "Times that the device ran out of memory.", value=self._thread.engine.out_of_memory
        )
        yield SummaryMetricFamily(
            "rap_lab_ttft_seconds",
            "Time to first token of the requests that produced one.",
            count_value=state.first_tokens,
            sum_value=state.ttft_sum_s,
        )
