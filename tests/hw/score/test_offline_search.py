"""Searches of whole masks on a tiny random model: the losses, the command, its figures and its page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")
transformers = pytest.importorskip("transformers", reason="the real model needs transformers: pip install -e '.[hw]'")

from hw.elastic.model import ElasticModel  # noqa: E402
from hw.score import mask_nll  # noqa: E402
from hw.score.block_numbers import block_number, plan_without  # noqa: E402
from hw.score.gsi import gsi  # noqa: E402
from hw.score.mask_nll import MaskNll  # noqa: E402
from hw.score.mask_search import Mask, gsi_passes  # noqa: E402
from hw.score.nll import measure  # noqa: E402
from hw.score.offline_search import METHODS  # noqa: E402
from hw.score.offline_search_page import (  # noqa: E402
    drops_of,
    gap,
    gap_table,
    losses,
    lowest,
    page,
    verdict_counts,
    verdict_table,
)
from hw.score.run import main  # noqa: E402
from sim.paths import RESULTS  # noqa: E402
from tests.commands import exit_status  # noqa: E402
from tests.hw.serving import LAYERS, tiny  # noqa: E402
from tests.sim.pages.test_render import cells  # noqa: E402

BLOCKS, WORDS = 2 * LAYERS, 61


def some_masks(seed: int, count: int) -> list[Mask]:
    rng = np.random.default_rng(seed)
    return [frozenset(np.flatnonzero(rng.random(BLOCKS) < 0.4).tolist()) for _ in range(count)]


@pytest.mark.parametrize("batch_tokens", [24, 100, 10_000])
def test_masks_in_one_batch_have_the_loss_of_each_plan_alone(
    batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mask_nll, "BATCH_TOKENS", batch_tokens)
    elastic = ElasticModel(tiny())
    windows = torch.randint(1, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    masks = [frozenset(), frozenset(range(BLOCKS)), *some_masks(0, 9), frozenset({1, 2})]
    found = MaskNll(elastic, windows)(masks)
    assert found == pytest.approx([measure(elastic, plan_without(elastic.spec, m), windows).mean for m in masks])


def test_a_block_runs_once_for_all_masks_that_agree_up_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    run = mask_nll.block_output
    monkeypatch.setattr(mask_nll, "block_output", lambda e, b, h, r: rows.append(len(h)) or run(e, b, h, r))
    windows = torch.ones((1, 8), dtype=torch.long)
    MaskNll(ElasticModel(tiny()), windows)([frozenset({BLOCKS - 1}), frozenset({BLOCKS - 2}), frozenset()])
    assert rows == [1] * (BLOCKS - 1) + [2]  # at the last block two states differ, and one mask removes it


def test_gsi_has_as_many_candidates_as_a_search_has_passes() -> None:
    windows = torch.randint(1, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    rounds = gsi(ElasticModel(tiny()), windows, removals=3)
    assert sum(len(found.candidates) for found in rounds) == gsi_passes(BLOCKS, 3)


# --- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model, its tokenizer, and a text."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = {f"w{i}": i for i in range(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    tiny().save_pretrained(folder)
    rng = np.random.default_rng(0)
    rows = [" ".join(f"w{i}" for i in rng.integers(1, WORDS, 40)) for _ in range(10)]
    (folder / "text.txt").write_text("\n\n".join(rows), encoding="utf-8")
    return folder


Score = Callable[..., tuple[int, str]]


@pytest.fixture
def score(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> Score:
    """Return a function that runs the command on the tiny checkpoint; it returns the exit status and stderr."""

    def run(*arguments: str) -> tuple[int, str]:
        command = [f"model.path={checkpoint}", "model.name=tiny", "model.dtype=float32", "offline.tokens=40"]
        command += ["offline.window=20", "offline.samples=[0,1]", "offline.removals=[2,4]", "test.tokens=40"]
        command += ["test.window=20", *(f"{which}.path={checkpoint / 'text.txt'}" for which in ("calibration", "test"))]
        status = exit_status(main, f"hydra.run.dir={checkpoint / 'run'}", *command, *arguments)
        return status, capsys.readouterr().err

    return run


def test_the_command_compares_masks_of_equal_size_and_budget_and_writes_its_page(tmp_path: Path, score: Score) -> None:
    out = tmp_path / "tiny.json"
    status, error = score("kind=offline_search", f"out={out}")
    assert status == 0, error
    figures = json.loads(out.read_text(encoding="utf-8"))
    assert page(figures) == (tmp_path / "index.md").read_text(encoding="utf-8")
    elastic = ElasticModel(tiny())
    for sample in figures["samples"]:
        assert len(sample["searches"]) == len(METHODS) * 2
        for row in sample["searches"]:
            assert 0 < row["passes"] <= gsi_passes(BLOCKS, row["removals"])
            assert {len(one["drop"].split()) for one in row["incumbents"]} == {row["removals"]}
            assert row["incumbents"][-1]["cpu_s"] <= row["cpu_s"]
        measured = {row["drop"]: row for row in sample["measured"]}
        greedy = drops_of(sample, 4)["GSI", "passes"]
        assert greedy is not None
        assert measured[greedy]["calibration"] == pytest.approx(sample["gsi"][3]["nll"], rel=1e-5)
        assert elastic.spec.num_layers == LAYERS
    again, error = score("kind=offline_search", f"out={out}")
    assert (again, json.loads(out.read_text(encoding="utf-8"))) == (0, figures)
    assert "continuing from 12 searches" in error


def test_an_interrupted_search_continues_to_the_same_masks(tmp_path: Path, score: Score) -> None:
    out = tmp_path / "tiny.json"
    assert score("kind=offline_search", f"out={out}")[0] == 0
    full = json.loads(out.read_text(encoding="utf-8"))
    cut = json.loads(out.read_text(encoding="utf-8"))
    cut["samples"] = cut["samples"][:1]
    cut["samples"][0] |= {"searches": cut["samples"][0]["searches"][:2], "measured": []}
    out.write_text(json.dumps(cut), encoding="utf-8")
    assert score("kind=offline_search", f"out={out}")[0] == 0
    found = json.loads(out.read_text(encoding="utf-8"))

    def masks(figures: dict[str, Any]) -> list[tuple[str, int, list[tuple[int, float, str]]]]:
        return [
            (row["method"], row["removals"], [(one["passes"], one["nll"], one["drop"]) for one in row["incumbents"]])
            for sample in figures["samples"]
            for row in sample["searches"]
        ]

    assert masks(found) == masks(full)
    (tmp_path / "index.md").unlink()
    assert score("kind=offline_page", f"out={out}")[0] == 0
    assert (tmp_path / "index.md").read_text(encoding="utf-8") == page(found)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("offline.removals=[]", "name at least one of each"),
        ("offline.removals=[4,2]", "in ascending order"),
        ("offline.samples=[1,1]", "seeds that differ"),
        ("offline.removals=[99]", f"has {BLOCKS} blocks to remove"),
    ],
)
def test_bad_settings_are_one_line(argument: str, message: str, tmp_path: Path, score: Score) -> None:
    status, error = score("kind=offline_search", f"out={tmp_path / 'x.json'}", argument)
    assert status == 2
    assert message in error
    assert "Traceback" not in error


def test_figures_of_other_settings_are_not_continued(tmp_path: Path, score: Score) -> None:
    out = tmp_path / "tiny.json"
    assert score("kind=offline_search", f"out={out}", "offline.samples=[0]", "offline.removals=[1]")[0] == 0
    status, error = score("kind=offline_search", f"out={out}")
    assert status == 2
    assert "passes, removals, seeds differ" in " ".join(error.split())
    status, error = score("kind=offline_page", f"out={tmp_path / 'none.json'}")
    assert status == 2
    assert "run python -m hw.score kind=offline_search first" in " ".join(error.split())


def test_the_search_shows_progress_until_all_is_done(tmp_path: Path, score: Score, shown_progress: list[Any]) -> None:
    assert score("kind=offline_search", f"out={tmp_path / 'x.json'}", "offline.removals=[2]")[0] == 0
    task = next(task for task in shown_progress if task.what == "searching")
    assert task.done == task.total == 2 * (1 + len(METHODS)) * gsi_passes(BLOCKS, 2)


# --- The page --------------------------------------------------------------------------------------------------------


def a_sample(greedy: float, early: float, late: float) -> dict[str, Any]:
    """Return a sample of four blocks: GSI takes 3 CPU seconds, a search finds one mask within them and one after."""
    incumbents = [
        {"passes": 4, "cpu_s": 2.0, "nll": 2.0, "drop": "MHA0 MHA1"},
        {"passes": 6, "cpu_s": 5.0, "nll": 1.5, "drop": "FFN0 FFN1"},
    ]
    masks = {"": 1.0, "MHA0 FFN0": greedy, "MHA0 MHA1": early, "FFN0 FFN1": late, "FFN0 MHA1": 9.0}
    return {
        "gsi": [{"removed": "FFN0", "nll": 1.2, "cpu_s": 2.0}, {"removed": "MHA0", "nll": 1.4, "cpu_s": 1.0}],
        "singles": [3.0, 1.0, 2.0, 4.0],
        "searches": [{"method": "evolution", "removals": 2, "passes": 7, "cpu_s": 6.0, "incumbents": incumbents}],
        "measured": [{"drop": drop, "calibration": nll, "test": nll} for drop, nll in masks.items()],
    }


def figures_of(*samples: dict[str, Any]) -> dict[str, Any]:
    return {"removals": [2], "passes": [7], "methods": {"evolution": {}}, "samples": list(samples)}


def test_what_a_search_found_later_than_gsi_took_does_not_count_at_equal_cpu_seconds() -> None:
    sample = a_sample(1.4, 2.0, 1.1)
    found = drops_of(sample, 2)
    assert found["GSI", "passes"] == found["GSI", "cpu"] == "MHA0 FFN0"
    assert found["one-shot", "cpu"] == "FFN0 MHA1"
    assert (found["evolution", "passes"], found["evolution", "cpu"]) == ("FFN0 FFN1", "MHA0 MHA1")
    figures = figures_of(sample)
    assert lowest(figures, "passes", "test") == {"GSI": [], "evolution": [2]}
    assert lowest(figures, "cpu", "test") == {"GSI": [2], "evolution": []}
    sample["searches"][0]["incumbents"] = sample["searches"][0]["incumbents"][1:]
    assert drops_of(sample, 2)["evolution", "cpu"] is None
    assert math.isnan(losses(figures, 2, "evolution", "cpu", "test")[0])


def test_a_difference_counts_where_its_interval_over_samples_excludes_zero() -> None:
    figures = figures_of(a_sample(1.4, 2.0, 1.1), a_sample(1.5, 2.1, 1.3), a_sample(1.4, 2.0, 1.2))
    found = gap(figures, 2, "evolution", "passes", "test")
    # Differences -0.3, -0.2 and -0.2: standard deviation 0.0577, Student's t with two degrees of freedom 4.303.
    assert found.mean == pytest.approx(-0.7 / 3)
    assert found.half_width == pytest.approx(4.303 * 0.05774 / math.sqrt(3), rel=1e-3)
    assert (found.lower, found.higher, found.verdict) == (3, 0, "better")
    assert gap(figures, 2, "evolution", "cpu", "test").verdict == "worse"
    assert verdict_counts(figures, "passes", "test") == {"better": 1, "worse": 0}
    assert cells(verdict_table(figures)) == [
        ["text", "at equal", "search", "better than GSI at", "worse than GSI at", "undecided at"],
        ["held-out", "passes", "evolution", "2", "none", "none"],
        ["held-out", "CPU seconds", "evolution", "none", "2", "none"],
        ["calibration", "passes", "evolution", "2", "none", "none"],
    ]
    assert cells(gap_table(figures, "passes", "test"))[1][0::2] == ["2", "-0.233 ± 0.143 (3)"]
    one = gap(figures_of(a_sample(1.4, 2.0, 1.1)), 2, "evolution", "passes", "test")
    assert (one.verdict, math.isnan(one.half_width)) == ("-", True)  # one sample says nothing of others


def test_the_published_page_is_that_of_its_figures() -> None:
    folder = RESULTS / "offline_search"
    figures = json.loads((folder / "smollm2_135m.json").read_text(encoding="utf-8"))
    assert page(figures) == (folder / "index.md").read_text(encoding="utf-8")
    assert not figures["commit"].endswith("-dirty")
    assert all(block_number(row["removed"]) < figures["blocks"] for row in figures["samples"][0]["gsi"])
