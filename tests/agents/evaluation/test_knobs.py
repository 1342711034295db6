"""Ways to free memory: steps that free more and more, what they cost, and the choice on validation windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.envs.serve import ServeSetting
from agents.evaluation import knob_search, knobs, knobs_page
from sim.cost.memory import ffn_weight_bytes, layer_weight_bytes, weight_bytes
from sim.cost.model_spec import load_model
from sim.cost.plan import Plan, check_plan, dense_plan
from sim.engine.server_spec import ServerSpec, named_quality
from sim.engine.steady_decode import steady_decode_s
from sim.paths import RESULTS
from sim.policies.observation.serve import serve_actions
from tests.commands import exit_status

SERVER = ServerSpec.from_names(model="llama2_7b", gpu="a100_80gb", latency="llama2_7b_a100_trtllm")
MODEL = SERVER.model
REQUESTS, CONTEXT = 32, 512
TOKENS = REQUESTS * CONTEXT


def test_the_steps_of_a_knob_are_legal_and_free_more_and_more() -> None:
    assert not knobs.all_steps(load_model("smollm2_135m"))[knobs.HIDDEN]
    for name, steps in knobs.all_steps(MODEL).items():
        for step in steps:
            check_plan(MODEL, step.plan)
        freed = [knobs.freed_bytes(MODEL, step.plan, REQUESTS, CONTEXT) for step in steps]
        assert freed == sorted(freed), name
        assert freed[-1] > 0
    assert knobs.freed_bytes(MODEL, dense_plan(MODEL), REQUESTS, CONTEXT) == 0


def test_bytes_freed_by_hand() -> None:
    assert knobs.freed_bytes(MODEL, knobs.streaming(MODEL, 10), REQUESTS, CONTEXT) == 8 * layer_weight_bytes(MODEL)
    eight = knobs.low_kv(MODEL, 0)
    # 16,384 bytes a token and layer at 16 bits; at 8 bits half, and 4 bytes for the keys and the values of 32 heads.
    assert knobs.freed_bytes(MODEL, eight, REQUESTS, CONTEXT) == TOKENS * 32 * (16384 - (8192 + 2 * 4 * 32))
    narrow = knobs.narrow_ffn(MODEL, 6, 2)
    lost = [ffn_weight_bytes(MODEL) - ffn_weight_bytes(MODEL, width=width) for width in (7, 6)]
    assert knobs.freed_bytes(MODEL, narrow, REQUESTS, CONTEXT) == 30 * lost[0] + 2 * lost[1]
    four = knobs.low_weights(MODEL, 3)
    assert knobs.freed_bytes(MODEL, knobs.keeping_hidden(MODEL), REQUESTS, CONTEXT) == TOKENS * 32 * (16384 - 8192)
    of_a_layer = layer_weight_bytes(MODEL) - layer_weight_bytes(MODEL, 4)
    assert knobs.freed_bytes(MODEL, four, REQUESTS, CONTEXT) == 3 * of_a_layer


def test_seconds_of_a_decode_iteration_by_hand() -> None:
    dense = dense_plan(MODEL)
    assert steady_decode_s(SERVER, dense, 32, 512) == pytest.approx(
        SERVER.priced().iteration_s(dense, [], 32, TOKENS, 32)
    )
    # Twelve layers of 405 MB over 25 GB/s take longer than computing.
    slow = steady_decode_s(knobs.with_link(SERVER, 25e9), knobs.streaming(MODEL, 12), 32, 512)
    assert slow == pytest.approx(12 * layer_weight_bytes(MODEL) / 25e9)
    # Over a fast link their bytes take memory bandwidth from computing, and nothing else.
    fast = steady_decode_s(knobs.with_link(SERVER, 1e15), knobs.streaming(MODEL, 12), 32, 512)
    written_s = 12 * layer_weight_bytes(MODEL) / SERVER.gpu.memory_bandwidth_bytes_per_s
    assert fast == pytest.approx(steady_decode_s(SERVER, dense, 32, 512) + written_s, rel=0.01)
    assert steady_decode_s(SERVER, knobs.low_kv(MODEL, 32), 32, 512) < steady_decode_s(SERVER, dense, 32, 512)
    # Keys and values of all contexts, computed again in every layer.
    computed_s = 32 * 0.5 * SERVER.priced().linear_s("mha", 16, TOKENS)
    again = steady_decode_s(SERVER, knobs.keeping_hidden(MODEL), 32, 512)
    assert again == pytest.approx(steady_decode_s(SERVER, dense, 32, 512) + computed_s)
    saved_s = 32 * 3 / 8 * SERVER.priced().linear_s("ffn", 16, 32)
    narrow_s = steady_decode_s(SERVER, knobs.narrow_ffn(MODEL, 5, 32), 32, 512)
    assert narrow_s == pytest.approx(steady_decode_s(SERVER, dense, 32, 512) - saved_s)


def test_served_steps_are_different_legal_plans() -> None:
    steps = knobs.served_steps(MODEL)
    assert len({step.plan for step in steps}) == len(steps) == len({(step.knob, step.amount) for step in steps})
    for step in steps:
        check_plan(MODEL, step.plan)
    assert steps[0].plan == dense_plan(MODEL)


def test_the_step_is_chosen_on_validation_windows_and_reported_on_test_windows() -> None:
    steps = [knobs.Step(knob="W4", amount=f"{n} layers", plan=knobs.low_weights(MODEL, n)) for n in (8, 16)]
    steps.append(knobs.Step(knob="streamed", amount="4 layers", plan=knobs.streaming(MODEL, 4)))
    validation = {("", 0): np.array([0.9]), ("", 1): np.array([0.5]), ("PCIe", 2): np.array([0.3])}
    test = {("", 0): np.array([0.2, 0.4]), ("", 1): np.array([0.9, 0.9]), ("PCIe", 2): np.array([0.1, 0.5])}
    found = knobs.best_steps(validation, test, steps)
    assert found["W4"]["step"] == "8 layers"
    assert found["W4"]["utility"] == pytest.approx(0.3)
    assert found["streamed, PCIe"]["by_window"] == [0.1, 0.5]


def test_a_budget_without_room_for_a_plan_is_worth_nothing() -> None:
    setting = ServeSetting(sources=["gamma"])
    windows = knobs.windows_of(setting, "validation", ["gamma"], 0.1, 2, 3)
    assert [window.source for window in windows] == ["gamma", "gamma"]
    budget = round(0.8 * weight_bytes(MODEL, dense_plan(MODEL)))
    graph = knobs.PlanGraph(setting.model)
    by_plan = {
        name: knobs.attained(setting.server, setting, knobs.Step(knob="", amount="", plan=plan), budget, windows, graph)
        for name, plan in (("dense", dense_plan(MODEL)), ("W4", knobs.low_weights(MODEL, 32)))
    }
    assert by_plan["dense"].tolist() == [0.0, 0.0]
    assert by_plan["W4"].min() > 0.0


def a_cell(**utility: list[float]) -> dict[str, Any]:
    found = {
        name.replace("_", " "): {"step": "s", "validation": 0.0, "by_window": u, "utility": float(np.mean(u))}
        for name, u in utility.items()
    }
    return {"quality": "q", "budget_bytes": 2e10, "load": 0.5, "windows": {}, "knobs": found}


def test_knobs_are_compared_with_dropping_blocks_window_by_window() -> None:
    cells = [a_cell(dense=[0.1, 0.1], dropped_blocks=[0.5, 0.6], W4=[0.7, 0.8]),
             a_cell(dense=[0.9, 0.9], dropped_blocks=[0.5, 0.6], W4=[0.5, 0.6])]  # fmt: skip
    figures = {"by_load": cells}
    assert knobs_page.wins(figures, "q") == {"W4": 1, "dense": 1}
    gain, error = knobs_page.difference(cells[0], "dense", "dropped blocks")
    assert (gain, error) == pytest.approx((-0.45, 0.05))
    lines = knobs_page.against_dropping(figures, "q").splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["dense", "1", "1", "0", "-0.050"]
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["W4", "1", "0", "1", "+0.100"]


def test_any_one_plan_is_the_best_step_of_all_that_need_no_link() -> None:
    steps = [knobs.Step(knob="W4", amount=f"{n} layers", plan=knobs.low_weights(MODEL, n)) for n in (8, 16)]
    steps += [knobs.Step(knob=knob, amount="-", plan=dense_plan(MODEL)) for knob in ("dense", knobs.ADAPTING)]
    steps += [knobs.Step(knob="streamed", amount="4 layers", plan=knobs.streaming(MODEL, 4))]
    values = {("", 0): 0.5, ("", 1): 0.6, ("", 2): 0.3, ("", 3): 0.9, ("PCIe", 4): 0.8}
    found = knobs.best_steps(
        {key: np.array([value]) for key, value in values.items()},
        {key: np.array([value / 2]) for key, value in values.items()},
        steps,
    )
    assert found[knobs.ANY]["step"] == "W4: 16 layers"
    assert found[knobs.ANY]["utility"] == pytest.approx(0.3)
    assert found[knobs.ADAPTING]["utility"] == pytest.approx(0.45)


def test_no_combination_within_both_bounds_loses_less() -> None:
    quality = named_quality("llama2_7b_transferred")
    dense_nll = quality.nll(dense_plan(MODEL))

    def loss(plan: Plan) -> float:
        return quality.nll(plan) - dense_nll

    rows = knob_search.combined({"PCIe": knobs.with_link(SERVER, 25e9)}, {"q": loss}, [32], 512, [4.0, 40.0])
    assert [row["times_dense"] for row in rows] == 2 * list(knob_search.TIMES_DENSE)
    dense_s = steady_decode_s(SERVER, dense_plan(MODEL), 32, 512)
    options = knob_search.grid_options(
        MODEL, streaming=False, hidden=True
    )  # streaming is too slow here for all of these bounds
    for row in rows[:3]:
        within = [
            loss(plan)
            for plan in serve_actions(MODEL, **options).plans
            if knobs.freed_bytes(MODEL, plan, 32, 512) >= 4e9
            and steady_decode_s(SERVER, plan, 32, 512) <= row["times_dense"] * dense_s
        ]
        assert row["best"]["q"]["loss_nats"] <= min(within) + 1e-12
        assert row["best"]["q"]["times_dense"] <= row["times_dense"]
    assert rows[0]["best"]["q"]["plan"] == "KV8"
    assert all(row["best"]["q"] is None and row["allowed"] == 0 for row in rows[3:])  # 40 GB are more than there are


def test_the_command_writes_its_figures_a_page_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["sources=[gamma]", "windows=1", "shares=[1.187]", "loads=[0.5]", f"out={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["knobs", *options, "qualities=[llama2_7b_transferred]"])
    knobs.main()
    figures = json.loads((tmp_path / "knobs.json").read_text(encoding="utf-8"))
    (cell,) = figures["by_load"]
    assert {"dense", "dropped blocks", "W4", "KV bits", "compressed KV", "streamed, PCIe 4.0"} <= set(cell["knobs"])
    assert {"any one plan", "least loss, adapting", "narrow FFN"} <= set(cell["knobs"])
    assert cell["knobs"]["least loss, adapting"]["utility"] > cell["knobs"]["dense"]["utility"]
    assert knobs_page.page(figures) == (tmp_path / "index.md").read_text(encoding="utf-8")
    assert (tmp_path / "knobs.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("qualities=[]", "links or qualities is empty"),
        ("windows=0", "windows is 0; it must be at least 1"),
        ("qualities=[llama3_8b]", "quality"),
    ],
)
def test_bad_input_is_one_line(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(knobs.main, option, "sources=[gamma]") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_published_page_is_that_of_its_figures() -> None:
    folder = RESULTS / "knobs"
    figures = json.loads((folder / "knobs.json").read_text(encoding="utf-8"))
    assert knobs_page.page(figures) == (folder / "index.md").read_text(encoding="utf-8")
