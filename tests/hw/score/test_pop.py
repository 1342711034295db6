"""POP's scores of layers against differences of the loss of a plain model, and the file and page that they give."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")
pytest.importorskip("transformers", reason="the real model needs transformers: pip install -e '.[hw]'")

from hw.elastic.model import ElasticModel  # noqa: E402
from hw.score.nll import measure  # noqa: E402
from hw.score.pop import GateScores, gate_scores, kv_only_plan  # noqa: E402
from hw.score.pop_page import page, speed_up, within  # noqa: E402
from sim.cost.kv_only_loss import read_kv_only_loss  # noqa: E402
from sim.cost.latency import load_calibration  # noqa: E402
from sim.cost.model_spec import load_model  # noqa: E402
from sim.cost.plan import dense_plan  # noqa: E402
from sim.cost.quality import QUALITIES, load_quality  # noqa: E402
from sim.json_file import read_json_object  # noqa: E402
from sim.paths import RESULTS  # noqa: E402
from tests.hw.elastic.test_model import plain_logits, some_tokens  # noqa: E402
from tests.hw.score.test_score import LAYERS as CHECKPOINT_LAYERS  # noqa: E402
from tests.hw.score.test_score import Score, checkpoint, score  # noqa: E402, F401
from tests.hw.tiny_models import LAYERS, tiny  # noqa: E402

PROMPT, LENGTH, STEP = 7, 18, 1e-3


def loss(family: str, window: list[int], layer: int, stage: int, gate: float) -> float:
    """Return the loss after the prompt of a plain model, with a gate on what a layer adds in one stage."""
    gates = torch.ones(LAYERS, LENGTH, dtype=torch.float64)
    gates[layer, slice(0, PROMPT - 1) if stage == 0 else slice(PROMPT - 1, None)] = gate
    logits = plain_logits(tiny(family).double(), window, gates, gates)
    return float(torch.nn.functional.cross_entropy(logits[PROMPT - 1 : -1], torch.tensor(window[PROMPT:])))


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_a_score_is_half_the_squared_slope_of_the_loss_in_a_gate(family: str) -> None:
    windows = [some_tokens(LENGTH, seed=seed) for seed in (1, 2)]
    found = gate_scores(ElasticModel(tiny(family), name="tiny"), torch.tensor(windows), prompt_tokens=PROMPT)
    for stage, scores in enumerate((found.prefill, found.decode)):
        for layer in range(LAYERS):
            slopes = [
                (loss(family, window, layer, stage, 1 + STEP) - loss(family, window, layer, stage, 1 - STEP))
                / (2 * STEP)
                for window in windows
            ]
            assert scores[layer] == pytest.approx(sum(slope**2 / 2 for slope in slopes) / 2, rel=2e-2, abs=1e-7)


def test_prompts_do_not_need_the_last_layer() -> None:
    elastic = ElasticModel(tiny(), name="tiny")
    windows = torch.tensor([some_tokens(LENGTH, seed=3)])
    found = gate_scores(elastic, windows, prompt_tokens=PROMPT)
    assert found.prefill[-1] == 0.0
    assert found.order[0] == LAYERS - 1
    without = measure(elastic, kv_only_plan(elastic.spec, [LAYERS - 1]), windows, prompt_tokens=PROMPT)
    assert without.decode == measure(elastic, dense_plan(elastic.spec), windows, prompt_tokens=PROMPT).decode


def test_of_equal_layers_the_deepest_comes_first() -> None:
    assert GateScores([0.2, 0.1, 0.1, 0.3], [0.0] * 4).order == [2, 1, 0, 3]


def test_the_command_writes_losses_that_quality_reads(tmp_path: Path, score: Score) -> None:  # noqa: F811
    out = tmp_path / "tiny.json"
    done = score("kind=pop", f"out={out}")
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    costs = read_kv_only_loss(out, "test", "tiny", CHECKPOINT_LAYERS)
    assert list(costs.order) == figures["order"]
    assert len(costs.costs) == CHECKPOINT_LAYERS
    assert costs.costs[0] == pytest.approx(0.0, abs=1e-6)
    assert figures["deepest"]["numbers"] == [3]
    assert figures["deepest"]["losses"]["test"] == [costs.costs[-1]]  # the same set


# --- The page --------------------------------------------------------------------------------------------------------


def test_the_committed_page_is_what_the_committed_file_gives() -> None:
    figures = read_json_object(QUALITIES / "kv_only" / "smollm2_135m.json", ValueError, "")
    assert page(figures) == (RESULTS / "pop" / "index.md").read_text(encoding="utf-8")


def test_the_committed_losses_are_charged() -> None:
    figures = read_json_object(QUALITIES / "kv_only" / "smollm2_135m.json", ValueError, "")
    quality = load_quality("smollm2_135m")
    spec = load_model("smollm2_135m")
    dense = quality.nll(dense_plan(spec))
    for count in (1, 5, 10, 20):
        plan = kv_only_plan(spec, figures["order"][:count])
        assert quality.nll(plan) - dense == pytest.approx(max(0.0, *figures["losses"]["test"][:count]))


def test_speed_ups_are_ratios_of_prices_and_grow_with_layers() -> None:
    latency = load_calibration("llama2_7b_a100")
    assert speed_up("llama2_7b_a100", 0, 1024) == 1.0
    found = [speed_up("llama2_7b_a100", layers, 1024) for layers in range(0, 33, 4)]
    assert found == sorted(found)
    # Without layers, what is left is the fixed overhead, embedding, head, and the products with q, k and v.
    least_s = (
        latency.fixed_s + latency.token_s(1024) + latency.head_s(1) + 32 * 0.75 * latency.linear_s("mha", 16, 1024)
    )
    dense_s = latency.iteration_s(dense_plan(load_model("llama2_7b")), [(1024, 0)], 0, 0, 1)
    assert least_s < dense_s / found[-1] < 1.5 * least_s


def test_how_many_layers_stay_within_a_ratio_of_perplexity() -> None:
    losses = [0.0, math.log(1.005), math.log(1.02), math.log(1.2)]
    assert within(losses, 1.01) == 2
    assert within(losses, 1.1) == 3
    assert within(losses, 2.0) == 4
