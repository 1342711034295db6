"""``python -m sim.results``: write docs/results/simulation/index.md from its JSON files.

With ``measure=true``, repeat all or the comparisons of ``only`` first.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sim.config import run_command
from sim.cost.latency import load_calibration
from sim.cost.latency_tables import KV_SHARE
from sim.cost.model_spec import load_model
from sim.pages.comparison import Comparison, means, read, shown, wins, write_page
from sim.pages.render import render, table
from sim.paths import RESULTS

FOLDER = RESULTS / "simulation"
TEMPLATE = Path(__file__).parent / "templates" / "simulation.md.j2"

LLAMA3 = "sim.compare experiment=morphserve_l4 model=llama3_8b"
LOADED = "workload.steps.1.factor=0.25 windows=[52,60,70,78,86,94,102,110,118,126]"
COMPARISONS = {
    "moving_budget": Comparison(command="sim.compare experiment=moving_budget", plot=True),
    "morphserve_llama2_7b": Comparison(command="sim.compare experiment=morphserve_l4", plot=True),
    "morphserve_llama3_8b": Comparison(command=LLAMA3),
    "morphserve_llama3_8b_loaded": Comparison(command=f"{LLAMA3} {LOADED}"),
    "morphserve_llama3_8b_burstgpt": Comparison(command=f"{LLAMA3} trace=burstgpt workload=spread_ties windows=[]"),
    "kv_hole": Comparison(command="sim.compare experiment=kv_hole", plot=True),
    "preemption": Comparison(command="sim.compare experiment=preemption"),
    "kv_precision": Comparison(command="sim.compare experiment=kv_precision"),
    "hidden_cache": Comparison(command="sim.compare experiment=hidden_cache"),
    "admission_order": Comparison(command="sim.compare experiment=admission_order"),
    "compute_bits": Comparison(command="sim.compare experiment=compute_bits"),
    "tensor_parallel": Comparison(command="sim.compare experiment=tensor_parallel"),
}
"""Name of a JSON file in docs/results/simulation: how it is made."""

HIDDEN_RULES = ("hidden", "hidden_cache", "hidden_cache 50 ms", "apt_serve")
HIDDEN_RATES = ("4 req/s", "6 req/s", "rejecting 8 req/s")
MODES = ("morphserve accuracy", "morphserve default", "morphserve performance")
PAPER = {  # Llama3-8B, BurstGPT: P95 TTFT in s, share of requests that missed the SLO (arXiv 2506.02006)
    "fp16": (5.65, 0.127),
    "w4 first 8": (2.61, 0.042),
    "w4 first 16": (1.74, 0.0),
    "w4 all": (1.62, 0.0),
    "morphserve default": (1.77, 0.0),
}
PAPER_TTFT_GAIN = ("2.2 to 3.9x", "2.9 to 15.7x", "3.4 to 19.5x")

Means = Mapping[str, Mapping[str, float]]


def page(folder: Path = FOLDER) -> str:
    """Return the page, in Markdown.

    Raises:
        ConfigError: if a result is missing, with the command that makes it.
    """
    found = {name: read(folder, name, "sim.results") for name in COMPARISONS}
    mean = {name: means(content) for name, content in found.items()}
    budget = mean["moving_budget"]
    return render(
        TEMPLATE,
        results={name: shown(content) for name, content in found.items()},
        mean=mean,
        wins={
            size: wins(found["moving_budget"], f"greedy_stop {size}", f"dense {size}") for size in ("55 GB", "63.5 GB")
        },
        adaptive_gain=max(
            budget[f"greedy_stop {size}"]["slo_attainment"] - budget[f"rap_80 {size}"]["slo_attainment"]
            for size in ("55 GB", "63.5 GB")
        ),
        checks={name: paper_checks(mean[name]) for name in COMPARISONS if name.startswith("morphserve")},
        against_fp16={
            name: against_fp16(found[name], mean[name])
            for name in ("morphserve_llama2_7b", "morphserve_llama3_8b_loaded")
        },
        next_to_paper=next_to_paper(mean["morphserve_llama3_8b_loaded"]),
        kv_hole_wins=wins(found["kv_hole"], "new_requests", "recompute"),
        swap_wins={
            link: wins(found["preemption"], f"greedy_stop, swap {link}", "greedy_stop, recompute", ties=True)
            for link in ("25 GB/s", "450 GB/s")
        },
        divided_wins={
            (policy, size): wins(found["tensor_parallel"], f"{policy} {size}", f"dense {size}")
            for policy in ("greedy_stop", "morphserve")
            for size in ("39.5 GB", "42 GB")
        },
        nested_wins={
            label: wins(found["compute_bits"], "H100 nestedfp", f"H100 {label}") for label in ("dense", "nested 8")
        },
        kv4_wins=wins(found["kv_precision"], "kv4 55 GB", "greedy_stop 55 GB"),
        hidden_wins=dense_wins(found["hidden_cache"], HIDDEN_RULES),
        kv8_wins=dense_wins(found["hidden_cache"], ["kv8"]),
        value_wins={
            rate: wins(found["admission_order"], f"dense by value {rate}", f"dense fcfs {rate}")
            for rate in HIDDEN_RATES
        },
        apt_wins={
            rate: wins(found["admission_order"], f"apt_serve by value {rate}", f"dense fcfs {rate}")
            for rate in ("4 req/s", "6 req/s")
        },
        hidden_ms={name: read_and_projected_ms(name) for name in ("llama2_7b_a100_trtllm", "llama2_7b_h100")},
    )


def dense_wins(content: Mapping[str, Any], rules: Sequence[str]) -> str:
    """Return in how many replays a rule of ``hidden_cache`` attains more than dense at the same rate: ``0 of 60``."""
    pairs = [(f"{rule} {rate}", f"dense {rate}") for rule in rules for rate in HIDDEN_RATES]
    rows = content["summaries"]
    more = [
        one["slo_attainment"] > other["slo_attainment"]
        for label, dense in pairs
        for one, other in zip(rows[label], rows[dense], strict=True)
    ]
    return f"{sum(more)} of {len(more)}"


def read_and_projected_ms(calibration: str) -> tuple[float, float]:
    """Return how long 40 decodes of Llama-2-7B after 1,000 tokens each attend, and how long computing their KV takes.

    Returns:
        Milliseconds over all layers of an iteration: attention over stored keys and values, and the products that
        compute as many from hidden states.
    """
    latency, layers, tokens = load_calibration(calibration), load_model("llama2_7b").num_layers, 40_000
    seconds = latency.decode_attention_s(40, tokens), KV_SHARE * latency.linear_s("mha", 16, tokens)
    return 1e3 * layers * seconds[0], 1e3 * layers * seconds[1]


def paper_checks(mean: Means) -> dict[str, bool]:
    """Return which of the MorphServe paper's orders hold."""
    misses = {label: 1.0 - row["slo_attainment"] for label, row in mean.items()}
    tail_s = {label: row["ttft_s.p95"] for label, row in mean.items()}
    static, modes = ("fp16", "w4 first 8", "w4 first 16", "w4 all"), ("fp16", *MODES)

    def falls(values: Mapping[str, float], labels: Sequence[str]) -> bool:
        return all(values[b] <= values[a] for a, b in itertools.pairwise(labels))

    best = misses["morphserve performance"]
    return {
        "static_order": falls(misses, static),
        "mode_order": falls(misses, modes),
        "tail_order": falls(tail_s, modes) and falls(tail_s, static),
        "modes_keep_quality": max(mean[m]["perplexity_ratio"] for m in modes) < mean["w4 all"]["perplexity_ratio"],
        "as_few_as_16_layers": best <= misses["w4 first 16"],
        "as_few_as_all_layers": best <= misses["w4 all"] + 0.005,
    }


def against_fp16(content: Mapping[str, Any], mean: Means) -> str:
    """Return the table of what each MorphServe mode gains over FP16, here and in the paper."""
    fp16 = mean["fp16"]
    rows = [
        {
            "mode": mode.split()[1],
            "fewer SLO misses": 1.0 - (1.0 - mean[mode]["slo_attainment"]) / (1.0 - fp16["slo_attainment"]),
            "windows with no more misses": wins(content, mode, "fp16", ties=True),
            "TTFT P95 gain": f"{fp16['ttft_s.p95'] / mean[mode]['ttft_s.p95']:.1f}x",
            "perplexity": mean[mode]["perplexity_ratio"] - 1.0,
            "TTFT P95 gain, paper": paper,
        }
        for mode, paper in zip(MODES, PAPER_TTFT_GAIN, strict=True)
    ]
    return table(rows, {"fewer SLO misses": ".0%", "perplexity": "+.2%"})


def next_to_paper(mean: Means) -> str:
    """Return the table of TTFT and missed SLOs next to the paper's."""
    rows = [
        {
            "policy": label,
            "TTFT P95 (s)": row["ttft_s.p95"],
            "SLO missed": 1.0 - row["slo_attainment"],
            "TTFT P95 (s), paper": PAPER.get(label, (None,))[0],
            "SLO missed, paper": PAPER.get(label, (None,))[-1],
        }
        for label, row in mean.items()
    ]
    specs = {"TTFT P95 (s)": ".2f", "SLO missed": ".1%", "TTFT P95 (s), paper": ".2f", "SLO missed, paper": ".1%"}
    return table(rows, specs)


def _write(cfg: DictConfig) -> None:
    write_page(cfg, COMPARISONS, FOLDER, page)


def main() -> None:
    """Run ``python -m sim.results``."""
    run_command(_write, "results")
