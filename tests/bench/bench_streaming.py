"""Time of a decode pass whose layers are streamed, over that of a pass whose layers are on the device.

python tests/bench/bench_streaming.py [MODEL ...]     # smollm2_135m llama2_7b

Random weights, on a CUDA device if there is one, else on a CPU, where a thread reads the file of stored weights. The
rounds alternate; times are medians. The last column is what sim.cost.streaming says, from three things measured here:
the pass without streaming, how much slower it is next to copies that never stop, and how long one layer takes to cross.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from hw.calibrate.device import Bench, DeviceSettings
from hw.elastic.checkpoint import pick_device
from hw.elastic.device import Accelerator
from hw.elastic.model import ElasticModel
from hw.elastic.processor import processor_name
from hw.elastic.random_weights import random_model
from sim.cost.memory import layer_weight_bytes
from sim.cost.model_spec import load_model
from sim.cost.plan import dense_plan
from sim.cost.streaming import even_layers, steady_pass_s

ROUNDS, PASSES = 7, 6
CONTEXT = 256
QUEUED = 40
BATCHES = (1, 32)


def crossing_s(elastic: ElasticModel) -> float:
    """Return the median seconds in which the first streamed layer crosses, with nothing else to do."""
    streams = elastic.streams
    streams.enter(next(iter(streams.layers)))
    streams.leave(next(iter(streams.layers)))
    seconds = []
    for _ in range(ROUNDS):
        streams.restart()
        elastic.hardware.synchronize()
        start_s = time.perf_counter()
        streams.enter(next(iter(streams.layers)))
        elastic.hardware.synchronize()
        seconds.append((time.perf_counter() - start_s) / min(2, len(streams.layers)))
        streams.leave(next(iter(streams.layers)))
    return statistics.median(seconds)


@contextmanager
def copying(elastic: ElasticModel) -> Iterator[None]:
    """Copy the first layer again and again meanwhile."""
    key, store = elastic.blocks["ffn"][0].keys(16)[0], elastic._store
    targets = [torch.empty(t.shape, dtype=t.dtype, device=elastic.hardware.place) for t in store.shapes(key)]
    ended = threading.Event()

    def copy() -> None:
        while not ended.is_set():
            store.load(key, targets)

    if isinstance(elastic.hardware, Accelerator):
        for _ in range(QUEUED):  # they run next to what is started later
            store.load(key, targets)
        yield
        elastic.hardware.synchronize()
        return
    thread = threading.Thread(target=copy)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@torch.inference_mode()
def main() -> None:
    """Print a table for every model."""
    torch.set_num_threads(1)
    place = pick_device("auto")
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    for name in sys.argv[1:] or ["smollm2_135m"]:
        spec = load_model(name)
        elastic = ElasticModel(random_model(spec, seed=0, dtype=dtype, place=place), name=name)
        spec, layers = elastic.spec, elastic.spec.num_layers
        bench = Bench(elastic, DeviceSettings(model=name, device=place.type, seconds=60.0, seed=0, clock="wall"))
        counts = sorted({0, 3, layers // 4, layers // 2, layers})
        plans = {
            count: replace(dense_plan(spec), streamed=tuple(i in even_layers(layers, count) for i in range(layers)))
            for count in counts
        }
        elastic.prepare_for(plans.values())
        elastic.apply(plans[layers])
        layer_s = crossing_s(elastic)
        size = layer_weight_bytes(spec)
        print(f"{name}, {processor_name(place)}: {size / 1e6:.1f} MB a layer cross in {1e3 * layer_s:.2f} ms")
        print("decodes   streamed layers   ms a pass   times dense   sim.cost.streaming")
        for batch in BATCHES:
            run = bench.full_pass([(CONTEXT, 1)] * batch, [])
            seconds: dict[int, list[float]] = {count: [] for count in counts}
            for _ in range(ROUNDS):
                for count in counts:
                    elastic.apply(plans[count])
                    run()
                    seconds[count] += [run()[0] for _ in range(PASSES)]
            median = {count: statistics.median(found) for count, found in seconds.items()}
            elastic.apply(plans[0])
            busy = []
            for _ in range(ROUNDS):
                with copying(elastic):
                    busy.append(run()[0])
            slowdown = max(0.0, statistics.median(busy) / median[0] - 1.0)
            for count in counts:
                blocks, streamed = [2] * layers, plans[count].streamed
                said_s = steady_pass_s([size] * layers, blocks, streamed, median[0], size / layer_s, slowdown=slowdown)
                print(
                    f"{batch:7} {count:17} {1e3 * median[count]:11.1f} {median[count] / median[0]:13.2f} "
                    f"{said_s / median[0]:20.2f}"
                )


if __name__ == "__main__":
    main()
