"""``python -m sim.compare``: the same requests, several policies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from sim.compare import compare_command, hardest, servers, variants
from sim.config import CONF_DIR
from sim.errors import ConfigError
from sim.replay.sweep import replay_case
from sim.results.report import SUMMARY_COLUMNS, cells, markdown
from tests.commands import exit_status

QUICK = ("trace.duration_s=40", "budget.mean_away_s=8", "budget.mean_stay_s=8", "budget.cotenant_bytes=58e9")


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("compare", overrides=[*QUICK, *overrides])


def test_policies_see_the_same_requests_and_differ_only_in_what_is_said() -> None:
    extra = ("+policies.a={policy: dense}", "+policies.b={policy: greedy_stop, engine.restore: recompute}")
    made = variants(composed(*extra, "only=[a,b]"))
    assert list(made) == ["a", "b"]
    assert made["a"].trace == made["b"].trace
    assert made["a"].budget == made["b"].budget
    assert (made["a"].engine.restore, made["b"].engine.restore) == ("new_requests", "recompute")
    a, b = map(replay_case, made.values())
    assert a.records.arrival_s.tolist() == b.records.arrival_s.tolist()
    assert a.summary["transitions"] == 0 < b.summary["transitions"]


def test_the_title_names_every_model_and_device_that_is_compared() -> None:
    other = "+policies.b={policy: dense, model: llama3.1_8b, gpu: h100_80gb}"
    made = variants(composed("+policies.a={policy: dense}", other, "+policies.c={policy: random}", "only=[b,a,c]"))
    assert servers(made.values()) == "llama2_7b, a100_80gb and llama3.1_8b, h100_80gb"
    assert servers([made["a"], made["c"]]) == "llama2_7b, a100_80gb"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+policies.a={policy: greedy_stp}", "did you mean 'greedy_stop'"),
        ("+policies.a={policy: dense, engine.restor: recompute}", "did you mean 'restore'"),
        ("only=[greedy]", "did you mean 'greedy_stop'"),
    ],
)
def test_a_difference_that_names_nothing_is_an_error_with_the_nearest(override: str, message: str) -> None:
    cfg = composed(override)
    with pytest.raises(ConfigError, match=message):
        variants(cfg)


def test_a_row_is_one_replay_or_the_mean_and_standard_deviation_of_several() -> None:
    names = {key.split(".")[0] for key, *_ in SUMMARY_COLUMNS.values()} - {"ttft_s", "tpot_s"}
    low, high = ({**dict.fromkeys(names, x), "ttft_s": {"p95": x}, "tpot_s": {"p50": None}} for x in (1.0, 3.0))
    one, both = cells([low]), cells([low, high])
    assert (one[0], both[0]) == ("100.0 %", "200.0 ± 141.4 %")
    assert (one[2], both[2]) == ("-", "-")
    assert markdown({"a": [low], "b": [low, high]}).count("\n") == 4


def test_the_picture_is_of_the_case_that_is_hardest_for_the_first_policy() -> None:
    shares = {"dense": (0.9, 0.2, 0.5), "other": (0.1, 0.9, 0.9)}
    assert hardest({label: [{"slo_attainment": share} for share in row] for label, row in shares.items()}) == 1


def test_one_table_and_one_picture_the_same_for_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 5 over processes."""
    monkeypatch.chdir(tmp_path)
    chosen = "only=[dense,greedy_stop,learned_serve,random]"
    for workers in (1, 2):
        more = ("seeds=[3,4]", chosen, f"workers={workers}", f"hydra.run.dir=w{workers}")
        assert exit_status(compare_command, *QUICK, *more) == 0
    table = (tmp_path / "w1" / "compare.md").read_text()
    assert table == (tmp_path / "w2" / "compare.md").read_text()
    assert all(heading in table for heading in SUMMARY_COLUMNS)
    compared = json.loads((tmp_path / "w1" / "compare.json").read_text())
    assert "seeds=[3,4]" in compared["provenance"]["command"]
    labels = list(compared["summaries"])
    assert labels == ["dense", "random", "greedy_stop", "learned_serve"]
    assert compared["cases"] == ["seed 3", "seed 4"]
    for label in labels:
        attainments = [summary["slo_attainment"] for summary in compared["summaries"][label]]
        assert f"| {label} | {100 * sum(attainments) / 2:.1f} ± " in table
        for seed in (3, 4):
            one, two = (tmp_path / f"w{w}" / label / f"seed_{seed}" / "records.parquet" for w in (1, 2))
            assert one.read_bytes() == two.read_bytes()
    assert (tmp_path / "w1" / "compare.png").stat().st_size > 10_000
