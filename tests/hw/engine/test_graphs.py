"""CUDA graphs of decode passes, on a fake device whose graphs fail where a GPU's would use old addresses.

The plain operations take the place of kernels, which triton's interpreter runs too slowly for full engines.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the real engine needs torch: pip install -e '.[hw]'")

import hw.elastic.graphs as graphs  # noqa: E402
import hw.engine.hw_engine as hw_engine  # noqa: E402
from hw.elastic import ops  # noqa: E402
from hw.elastic.attention import Kernels  # noqa: E402
from hw.elastic.graphs import DecodeGraphs  # noqa: E402
from hw.elastic.model import ElasticModel  # noqa: E402
from hw.engine.hw_engine import HwEngine  # noqa: E402
from hw.engine.prompts import RandomPrompts  # noqa: E402
from sim.cost.memory import budget_for_kv_blocks  # noqa: E402
from sim.cost.plan import Plan, dense_plan, drop, with_mask  # noqa: E402
from sim.engine.budget import Budget  # noqa: E402
from sim.engine.protocol import Request  # noqa: E402
from tests.hw.engine.runs import plain_tokens  # noqa: E402
from tests.hw.fake_cuda import FakeCuda  # noqa: E402
from tests.hw.serving import (  # noqa: E402
    VOCABULARY,
    PricedClock,
    engine_config,
    flat_latency,
    requests,
    tiny,
    tiny_spec,
)

WORKSPACE_BYTES = 1 << 26
ROWS = [(0.0, 9, 21), (0.0, 10, 20), (3.0, 7, 9)]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hw_engine, "find_attention", lambda *_, **__: Kernels())
    monkeypatch.setattr(ops, "lacks_slots", lambda slots: False)  # kernels need not know


def engine_on(device: FakeCuda, *, plan: Plan | None = None, budget: Budget | None = None, **more: Any) -> HwEngine:
    elastic = ElasticModel(tiny(), name="tiny", hardware=device)
    plan, config = plan or dense_plan(elastic.spec), engine_config()
    bytes_ = budget_for_kv_blocks(elastic.spec, dense_plan(elastic.spec), 60, WORKSPACE_BYTES, 4)
    return HwEngine(
        elastic=elastic,
        config=config,
        plan=plan,
        budget_bytes=budget or bytes_,
        workspace_bytes=WORKSPACE_BYTES,
        prompts=RandomPrompts(VOCABULARY),
        clock=PricedClock(flat_latency(), plan),
        **more,
    )


def tokens_of(engine: HwEngine) -> list[list[int]]:
    return [engine.tokens(i) for i in range(len(ROWS))]


def test_replayed_passes_give_the_tokens_of_a_plain_model() -> None:
    with FakeCuda() as device:
        engine = engine_on(device)
        engine.submit(requests(ROWS))
        engine.run_until(1e9)
        found = engine._torch._graphs
        assert found is not None
        assert device.replays > 4
        assert 0 < found.count <= 4
        assert device.uploads == device.reads == len(engine.shapes())
        assert tokens_of(engine) == plain_tokens("llama", ROWS)
        engine.close()
        assert found.count == engine.arena.backed_bytes == 0
        plain = engine_on(FakeCuda(), cuda_graphs=False)
        assert plain._torch._graphs is None


def test_plans_that_change_and_a_pool_that_shrinks_replay_nothing_old() -> None:
    spec = tiny_spec()
    high = budget_for_kv_blocks(spec, dense_plan(spec), 60, WORKSPACE_BYTES, 4)
    plans = [with_mask(dense_plan(spec), drop(spec, mha=[1], ffn=[2])), dense_plan(spec)]
    with FakeCuda() as device:
        engine = engine_on(device, budget=Budget((0.0, 20.0), (high, high - 20_000)))
        engine.submit(requests([(0.0, 5, 60), (0.0, 9, 60)]))
        for step in range(40):
            engine.run_until(2.0 * step)
            engine.check()
            if step in (6, 12):
                engine.apply(plans[step // 6 - 1])
        assert engine.drained
        assert device.replays > 20


def test_a_pool_that_is_resized_and_limits_that_change_forget_no_graph() -> None:
    spec, dense = tiny_spec(), dense_plan(tiny_spec())
    high = budget_for_kv_blocks(spec, dense, 60, WORKSPACE_BYTES, 4)
    with FakeCuda() as device:
        engine = engine_on(device, budget=Budget((0.0, 20.0, 40.0), (high, high - 20_000, high)))
        engine.submit(requests([(0.0, 5, 60)]))
        for step in range(60):
            engine.apply(replace(dense, max_running=2 + step % 3))
            engine.run_until(1.0 * step)
        engine.run_until(1e9)
        decodes = sum(shape.decode_batch > 0 and not shape.chunks for shape in engine.shapes())
        graphs_held = engine._torch._graphs
        assert graphs_held is not None
        recorded = graphs_held.count
        assert recorded
        # Each graph is preceded by the passes that showed that it recurs; all others replay one.
        assert device.replays == decodes - recorded * (graphs.RECURS - 1)
        started = Counter(shape.started for shape in engine.shapes() if not shape.chunks)
        assert started["recorded"] == recorded
        assert started["replayed"] == device.replays - recorded
        assert started["operations"] == decodes - device.replays
        assert all(shape.started == "operations" for shape in engine.shapes() if shape.chunks)


def test_the_fake_fails_where_a_graph_would_use_old_addresses() -> None:
    with FakeCuda() as device:
        engine = engine_on(device)
        engine.submit(requests([(0.0, 40, 60)]))
        engine.run_until(12.0)
        assert device.replays
        block = engine.elastic.blocks["ffn"][1]
        block.want(4)
        version = block.version
        block.join(wait=True)
        block.version = version  # as if no one had noticed
        with pytest.raises(AssertionError, match="a graph uses"):
            engine.run_until(20.0)


def test_swapped_kv_comes_back_to_graphs_that_are_replayed() -> None:
    rows = [(0.0, 20, 24), (0.0, 22, 24), (0.5, 18, 24), (1.0, 24, 20)]
    with FakeCuda() as device:
        elastic = ElasticModel(tiny(), name="tiny", hardware=device)
        dense = dense_plan(elastic.spec)
        engine = HwEngine(
            elastic=elastic,
            config=engine_config(preemption="swap", host_kv_blocks=200),
            plan=dense,
            budget_bytes=budget_for_kv_blocks(elastic.spec, dense, 16, WORKSPACE_BYTES, 4),
            workspace_bytes=WORKSPACE_BYTES,
            prompts=RandomPrompts(VOCABULARY),
            clock=PricedClock(flat_latency(), dense),
        )
        engine.submit(requests(rows))
        engine.run_until(1e9)
        assert engine.records().preemptions.sum() > 0
        assert engine.iterations().prefill_tokens.sum() == sum(prompt for _, prompt, _ in rows)
        assert device.downloads > 0
        assert device.replays > 0
        assert [engine.tokens(i) for i in range(len(rows))] == plain_tokens("llama", rows)


class Step:
    """A pass that is counted, over memory of its own."""

    def __init__(self) -> None:
        self.runs = 0
        self.source = torch.ones(8)

    def __call__(self) -> Any:
        self.runs += 1
        return self.source * 2


def test_a_pass_is_recorded_once_it_recurs_and_forgotten_with_its_addresses() -> None:
    with FakeCuda() as device:
        found, step = DecodeGraphs(device, 1 << 20), Step()
        for run in range(graphs.RECURS + 2):
            assert torch.equal(found.run("a", 0, step), torch.full((8,), 2.0))
            assert found.count == int(run >= graphs.RECURS - 1)
        assert device.replays == 3
        assert 0 < found.nbytes < 1000
        step.source = torch.zeros(8)
        with pytest.raises(AssertionError, match="a graph uses"):
            found.run("a", 0, step)
        assert torch.equal(found.run("a", 1, step), torch.zeros(8))
        assert found.count == 0


def test_the_number_and_the_memory_of_graphs_are_bounded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(graphs, "RECURS", 1)
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 3)
    with FakeCuda() as device:
        found, step = DecodeGraphs(device, 1 << 20), Step()
        for key in range(5):
            found.run(key, 0, step)
        assert found.count == 3
        each = found.nbytes // 3
        small = DecodeGraphs(device, 2 * each)
        for key in range(5):
            small.run(key, 0, step)
        assert small.count == 2
        none = DecodeGraphs(device, each - 1)
        for _ in range(3):
            assert torch.equal(none.run(1, 0, step), torch.full((8,), 2.0))
        assert none.count == 0
    assert capsys.readouterr().err.count("of the workspace") == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("not allowed while recording")])
def test_a_pass_that_cannot_be_recorded_runs_as_before(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(graphs, "RECURS", 1)

    class Refuses(FakeCuda):
        def record(self, step: Any) -> Any:
            raise error

    found = DecodeGraphs(Refuses(), 1 << 20)
    for _ in range(3):
        assert torch.equal(found.run("a", 0, Step()), torch.full((8,), 2.0))
    said = capsys.readouterr().err
    assert said.count("no CUDA graph") == 1
    assert str(error) in said


def test_a_moment_without_memory_does_not_end_the_recording_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "RECURS", 1)

    class RefusesOnce(FakeCuda):
        refused = False

        def record(self, step: Any) -> Any:
            if not self.refused:
                self.refused = True
                raise torch.OutOfMemoryError("no memory")
            return super().record(step)

    with RefusesOnce() as device:
        found, step = DecodeGraphs(device, 1 << 20), Step()
        for _ in range(2):
            found.run("a", 0, step)
        assert found.count == 1


def test_sizes_of_batches_that_have_a_graph() -> None:
    found = DecodeGraphs(FakeCuda(), 0)
    assert [found.rows_of(n) for n in (0, 1, 3, 4, 5, 9, 65, 256, 257)] == [None, 1, 4, 4, 8, 16, 96, 256, None]


def tokens_without_kv_of(*layers: int, cuda_graphs: bool) -> list[list[int]]:
    """Return the tokens of requests one after another, each without the KV of a layer that the plan runs."""
    dense, now_s = dense_plan(tiny_spec()), 0.0
    found: list[list[int]] = []
    with FakeCuda() as device:
        engine = engine_on(device, cuda_graphs=cuda_graphs, on_token=lambda _, token, __: found[-1].append(token))
        for request_id, layer in enumerate(layers):
            found.append([])
            # The weights stay where they are: prompts need the block, and only decodes drop its KV.
            engine.apply(replace(dense, decode=drop(tiny_spec(), mha=[layer])))
            engine.submit([Request(request_id=request_id, arrival_s=now_s, prompt_tokens=9, output_tokens=24)])
            while not engine.drained:
                now_s += 0.5
                engine.run_until(now_s)
                if found[-1]:
                    engine.apply(dense)
        assert cuda_graphs == (device.replays > 8)
    return found


def test_requests_that_lack_the_kv_of_other_layers_get_another_graph() -> None:
    assert tokens_without_kv_of(1, 2, cuda_graphs=True) == tokens_without_kv_of(1, 2, cuda_graphs=False)
