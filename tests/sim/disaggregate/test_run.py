"""``python -m sim.disaggregate``, and the plans that PDTrim's experiment compares."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from sim.config import CONF_DIR
from sim.cost.kv_format import stored_kv_bytes
from sim.cost.model_spec import load_model
from sim.cost.plan import check_plan, dense_plan
from sim.cost.quality import load_quality
from sim.disaggregate.run import disaggregate_command, plan_of, run
from sim.errors import ConfigError, PlanError
from sim.policies import PolicyContext
from sim.policies.pdtrim import KINDS, pdtrim

SMOL = load_model("smollm2_135m")
SERVED = PolicyContext(model=SMOL)
FILES = {"order": "smollm2_135m_pdtrim", "attention": "smollm2_135m_attention", "quality": "smollm2_135m"}
SHORT = ["trace.duration_s=20"]


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("disaggregate", overrides=[*SHORT, *overrides])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("dense", "searched")])
def test_a_kind_is_as_strong_as_its_quality_allows_and_no_stronger(kind: str) -> None:
    table, dense = load_quality("smollm2_135m"), dense_plan(SMOL)
    weak, strong = (pdtrim(SERVED, kind=kind, most_perplexity=most, **FILES).first_plan for most in (1.1, 1.6))
    for plan, most in ((weak, 1.1), (strong, 1.6)):
        check_plan(SMOL, plan)
        assert 1.0 < table.perplexity(plan) / table.perplexity(dense) <= most
    sent = [stored_kv_bytes(SMOL, plan, 128) for plan in (strong, weak, dense)]
    assert sent[0] < sent[1] <= sent[2]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("dense", "searched")])
def test_a_kind_sends_no_more_than_it_may(kind: str) -> None:
    plan = pdtrim(SERVED, kind=kind, most_sent=0.5, **FILES).first_plan
    assert 0.3 < stored_kv_bytes(SMOL, plan, 128) / stored_kv_bytes(SMOL, dense_plan(SMOL), 128) <= 0.5
    assert plan.prefill.contains(plan.decode)
    if kind == "blocks":
        assert plan.prefill != plan.decode


def test_quantized_kv_lets_a_kind_send_as_few_bytes_at_a_higher_quality() -> None:
    table = load_quality("smollm2_135m")
    plain, quantized = (
        pdtrim(SERVED, kind="both", most_sent=0.5, kv_bits=bits, **FILES).first_plan for bits in (16, 8)
    )
    assert stored_kv_bytes(SMOL, quantized, 128) <= 0.5 * stored_kv_bytes(SMOL, dense_plan(SMOL), 128)
    assert table.nll(quantized) < table.nll(plain)
    for kind in ("both", "dense"):
        with pytest.raises(PlanError, match="kv_bits of layer 0 is 5"):
            pdtrim(SERVED, kind=kind, most_sent=0.5, kv_bits=5, **FILES)
    fewer_bits = replace(dense_plan(SMOL), kv_bits=(8,) * SMOL.num_layers)
    assert pdtrim(SERVED, kind="dense", kv_bits=8, **FILES).first_plan == fewer_bits
    assert pdtrim(SERVED, kind="blocks", kv_bits=8, most_sent=0.6, **FILES).first_plan == fewer_bits
    assert pdtrim(SERVED, kind="blocks", kv_bits=8, most_perplexity=1.002, **FILES).first_plan == fewer_bits


def test_the_strongest_searched_pair_of_sets_within_a_quality_is_taken() -> None:
    searches = json.loads((CONF_DIR / "score" / "smollm2_135m_pdtrim.json").read_text(encoding="utf-8"))["searches"]
    table, dense = load_quality("smollm2_135m"), dense_plan(SMOL)
    found = {
        most: pdtrim(SERVED, kind="searched", most_perplexity=most, **FILES).first_plan for most in (1.3, 1.5, 9.0)
    }
    for most, plan in found.items():
        assert plan.prefill.contains(plan.decode)
        assert table.perplexity(plan) / table.perplexity(dense) <= most
        dropped = [sum(not kept for kept in (*mask.mha, *mask.ffn)) for mask in (plan.prefill, plan.decode)]
        assert dropped in [[len(pair["prefill"]), len(pair["decode"])] for pair in searches]
    assert found[1.5].prefill != found[1.5].decode
    assert sum(dropped) == max(len(pair["prefill"]) + len(pair["decode"]) for pair in searches)
    with pytest.raises(ConfigError, match=r"no plan of policy\.kind=searched meets"):
        pdtrim(SERVED, kind="searched", most_sent=0.5, **FILES)


def test_what_pdtrim_cannot_do_is_an_error_that_says_what_it_can() -> None:
    with pytest.raises(ConfigError, match=r"unknown policy\.kind 'block'; did you mean 'blocks'"):
        pdtrim(SERVED, kind="block", most_sent=0.5, **FILES)
    with pytest.raises(ConfigError, match="set exactly one of them, the other to null"):
        pdtrim(SERVED, kind="kv", **FILES)
    with pytest.raises(ConfigError, match=r"meets most_perplexity=None, most_sent=0\.0"):
        pdtrim(SERVED, kind="kv", most_sent=0.0, **FILES)
    with pytest.raises(ConfigError, match="there is no score 'x'"):
        pdtrim(SERVED, kind="kv", most_sent=0.5, **{**FILES, "order": "x"})
    with pytest.raises(ConfigError, match="choose a fixed policy"):
        plan_of(config("policy=greedy_stop"))


def test_a_run_folder_says_what_was_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sim.disaggregate", *SHORT, f"hydra.run.dir={tmp_path}"])
    disaggregate_command()
    records = pd.read_parquet(tmp_path / "records.parquet")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["finished"] == len(records) == summary["requests"]
    sent = records.sent_bytes[records.sent_bytes > 0]
    assert (sent == records.prompt_tokens[sent.index] * 16384 * 32).all()  # Llama-2-7B: 16,384 bytes a token a layer
    assert summary["sent_bytes_mean"] == sent.mean()
    assert summary["transfer_reduction"] == 1.0


def test_a_run_folder_says_what_happened_to_replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["outages=schedule", "outages.rows=[[0,5,9],[3,6,null]]", "start_s=1", "load_bytes_per_s=1e10"]
    monkeypatch.setattr(sys, "argv", ["sim.disaggregate", *SHORT, *overrides, f"hydra.run.dir={tmp_path}"])
    disaggregate_command()
    records, events = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("records", "events"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    seen = list(zip(events.time_s, events.replica, events.role, events.phase, strict=True))
    assert seen[:3] == [(5.0, 0, "prefill", "down"), (6.0, 3, "decode", "down"), (9.0, 0, "prefill", "loading")]
    assert seen[3][1:] == (0, "prefill", "serving")
    assert summary["moved"] == (records.moves > 0).sum() > 0
    assert summary["finished"] == len(records)
    assert summary["role_changes"] == 0
    assert set(records.decode_replica[records.arrival_s > 6]) <= {-1, 0}


def test_replicas_that_do_both_stages_serve_sessions_and_say_which_turn_each_record_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["prefill_replicas=0", "trace=chat_users", "workload=none", "trace.users=3"]
    monkeypatch.setattr(sys, "argv", ["sim.disaggregate", *overrides, f"hydra.run.dir={tmp_path}"])
    disaggregate_command()
    records = pd.read_parquet(tmp_path / "records.parquet")
    assert sorted(records.trace_row) == list(range(len(records)))
    for _, turns in records.groupby("session"):
        assert turns.turn.tolist() == list(range(len(turns)))
        assert turns.arrival_s.is_monotonic_increasing


def test_roles_by_load_are_counted_and_need_two_sides() -> None:
    overrides = ["prefill_replicas=1", "decode_replicas=3", "trace.rate_rps=20", "roles=by_load", "roles.period_s=1",
             "roles.most_wait_s=0.2"]  # fmt: skip
    records, summary = run(config(*overrides))
    assert summary["role_changes"] > 0
    assert records.prefill_replica.max() > 0
    with pytest.raises(ConfigError, match="with prefill_replicas=0 all replicas do both stages"):
        run(config("prefill_replicas=0", "roles=by_load"))
    with pytest.raises(ConfigError, match=r"outages\.rows names replica 4; the cluster has 4 replicas"):
        run(config("outages=schedule", "outages.rows=[[4,1,2]]"))
    with pytest.raises(ConfigError, match="start_s is -1"):
        run(config("start_s=-1"))
    with pytest.raises(ConfigError, match="turn_s is -1"):
        run(config("prefill_replicas=0", "turn_s=-1"))
    with pytest.raises(ConfigError, match="prefill_replicas is -1 and decode_replicas 2; decode needs at least one"):
        run(config("prefill_replicas=-1"))
    with pytest.raises(ConfigError, match="link_bytes_per_s must be at least 1"):
        run(config("link_bytes_per_s=1e-300"))


def test_the_learned_roles_serve_six_replicas_of_their_model_and_no_other_system() -> None:
    six = ["prefill_replicas=3", "decode_replicas=3", "roles=learned", "trace.rate_rps=30"]
    records, summary = run(config(*six))
    assert summary["finished"] == len(records)
    assert summary["role_changes"] > 0
    with pytest.raises(ConfigError, match="was trained for 6 replicas of llama2_7b, not 4 of llama2_7b"):
        run(config("roles=learned"))
    with pytest.raises(ConfigError, match="with prefill_replicas=0 all replicas do both stages"):
        run(config("prefill_replicas=0", "roles=learned"))
    with pytest.raises(ConfigError, match="it was trained for 'ServeCluster'; expected 'ServeRoles'"):
        run(config(*six, "roles.path=learned_cluster_llama2"))


def test_replicas_that_do_both_stages_fail_too() -> None:
    records, summary = run(config("prefill_replicas=0", "outages=schedule", "outages.rows=[[0,5,9]]"))
    assert summary["moved"] > 0
    assert summary["finished"] == len(records)


def test_clients_wait_for_the_front_end_as_well() -> None:
    _, summary = run(config("frontend=vllm", "frontend.front_s=0.25", "frontend.back_s=0.125", "trace.duration_s=20"))
    for name in ("ttft_s", "e2e_s"):
        assert summary[f"client_{name}"]["p50"] == pytest.approx(summary[name]["p50"] + 0.375)


def test_disaggregated_decode_is_not_held_up_by_prompts() -> None:
    together = run(config("prefill_replicas=0", "decode_replicas=4", "trace.rate_rps=16"))[1]
    disaggregated = run(config("trace.rate_rps=16"))[1]
    assert together["sent_bytes_mean"] is None
    assert disaggregated["requests"] == together["requests"] == disaggregated["finished"]
    assert disaggregated["itl_s"]["p99"] < together["itl_s"]["p99"]


def test_a_pruned_plan_is_charged_for_both_stages() -> None:
    overrides = ["model=smollm2_135m", "gpu=cpu_epyc_1thread", "engine=small", "trace=small", "budget.share=0.3",
             "workspace_bytes=1e8", "policy=pdtrim", "link_bytes_per_s=1e7"]  # fmt: skip
    records, summary = run(config(*overrides))
    plan = plan_of(config(*overrides))
    assert 1.0 < summary["perplexity_ratio"] <= 1.3
    assert summary["transfer_reduction"] > 1.0
    assert np.isfinite(records.quality_nll).all()
    assert "decode" in summary["plan"]
    assert plan.prefill != plan.decode
    assert summary["quality_outside_share"] == 0.0
    assert summary["quality_note"] is None


def test_a_plan_beyond_the_fitted_range_is_reported_as_an_upper_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["model=smollm2_135m", "gpu=cpu_epyc_1thread", "engine=small", "trace=small", "budget.share=0.3",
             "workspace_bytes=1e8", "policy=fixed", "policy.drop_mha=[0,1,2,3,4,5,6,7,8,9]", "link_bytes_per_s=1e7",
             "seeds=[1,2]", "trace.duration_s=20", f"hydra.run.dir={tmp_path}"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["sim.disaggregate", *overrides])
    disaggregate_command()
    for summary in json.loads((tmp_path / "compare.json").read_text())["summaries"]["cluster"]:
        assert summary["quality_outside_share"] == 1.0
    assert "note: cluster: 100.0 % of tokens ran under plans outside the range" in capsys.readouterr().out
