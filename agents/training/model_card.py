"""A page about an exported policy, NAME.md next to NAME.json: what it decides, what it saw in training, its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sim.pages.render import table
from sim.policies.learned_files import SERVING_TERMS

DECIDES = {
    "PruneToBudget": "which blocks to drop, one after another, until a load fits a memory budget",
    "ServeTrace": "every {tick} s which weights a server runs and what it admits",
    "ServeCluster": "every {tick} s and for each replica which weights it runs and what it admits",
    "ServeRoles": "every {tick} s how many replicas prefill while the others decode",
}
ASSUMED = "transferred"
"""Part of the names of quality tables that are assumed, not measured."""


def model_card(name: str, about: Mapping[str, Any], command: str) -> str:
    """Return the page as Markdown.

    Args:
        name: of the file. about: its content. command: a line that runs the policy.
    """
    task, environment = str(about["task"]), about.get("environment", {})
    decides = DECIDES.get(task, "").format(tick=_number(about.get("tick_s", 1)))
    rows = [
        ("model that it serves", about["model"]),
        ("actions", f"{len(about['actions'])}{_pairs(about)}"),
        ("observation", f"{_inputs(about)} entries; names and scales are in {name}.json"),
        ("network", _network(about)),
        *_slo(about),
        *_training(about),
        *_environment(environment),
        ("commit of RAP Lab", f"`{about.get('commit', 'unknown')}`"),
    ]
    cells = table([{"": key, "value": value} for key, value in rows], {}, left=2)
    return "\n".join(
        [
            f"# {name}\n",
            "<!-- Written with the policy. Do not edit. -->\n",
            f"A policy that decides {decides}.\n",
            f"    {command}\n",
            cells + "\n",
            "## Limits\n",
            *_limits(about, environment),
            "",
        ]
    )


def _inputs(about: Mapping[str, Any]) -> int:
    return int(about["layers"][0][-1])


def _pairs(about: Mapping[str, Any]) -> str:
    heads = about.get("heads")
    return f": {heads[0]} sets of weights x {heads[1]} limits of admission" if heads else ""


def _network(about: Mapping[str, Any]) -> str:
    sizes = " - ".join(map(str, [_inputs(about), *(layer[0] for layer in about["layers"])]))
    members = int(about.get("members", 1))
    kind = f"average of {members} perceptrons" if members > 1 else "perceptron"
    guard = "; a guard keeps greedy_stop's plan unless another is clearly better" if "guard" in about else ""
    pace, run = about.get("pace_share"), about.get("run_share")
    meet = "of the target per output token"
    paced = "" if pace is None else f"; no more requests run than meet {pace:g} {meet}"
    paced += "" if run is None else f"; as many requests run as meet {run:g} {meet}, whatever the network chose"
    wait = about.get("wait_share")
    left = "(target of the first token - measured time to start)"
    waits = "" if wait is None else f"; a request waits for at most {wait:g} x {left}"
    weight = about.get("room_weight")
    half = "half of the demanded tokens"
    roomy = "" if weight is None else f"; a plan with room for less than {half} loses {weight:g} x ln({half} / room)"
    return f"{kind} {sizes}, {about['parameters']:,} parameters{guard}{paced}{waits}{roomy}"


def _slo(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    slo = about.get("slo", {})
    targets = [f"{word} {slo[key]:g} s" for key, word in SLO.items() if slo.get(key) is not None]
    return [("SLO", ", ".join(targets))] if targets else []


SLO = {"ttft_s": "first token within", "tpot_s": "then each token within", "e2e_s": "complete within"}


def _training(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the trainings were, and the utility that chose their best states."""
    trainings: Sequence[Mapping[str, Any]] = about.get("trainings") or [about.get("training", {})]
    named = {str(one.get("algorithm", {}).get("_target_", "")).rpartition(".")[2] for one in trainings} - {""}
    labels = sorted({str(one["label"]) for one in trainings if one.get("label")})
    seeds = sorted({int(one["seed"]) for one in trainings if "seed" in one})
    of = about.get("training", {})
    rows = [("trained by", ", ".join(sorted(named)))] if named else []
    rows += [("labels and seeds", f"{', '.join(labels)}; seeds {', '.join(map(str, seeds))}")] if labels else []
    if "seconds" in of:
        rows.append(("time to the best states", f"{of['seconds']:,.0f} s in all"))
    if "validation_utility" in of:
        without = " of the networks alone" if about.keys() & set(SERVING_TERMS) else ""
        rows.append(("validation utility", f"{of['validation_utility']:.4f}{without}"))
    return rows


def _environment(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    named = {
        "sources": "traces (their training part)",
        "traffic": "streams of traces (their training part)",
        "gpu": "device",
        "tp": "GPUs that divide the model",
        "prefix_caching": "prefix cache",
        "latency": "calibration",
        "engine": "engine",
        "quality": "quality table",
        "budget": "memory, as shares of the dense weights",
        "randomize": "varied in training, from and to",
        "reward": "reward",
    }
    return [(words, _text(environment[key])) for key, words in named.items() if environment.get(key)]


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {_text(one)}" for key, one in value.items() if one is not None)
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return _number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _number(value: Any) -> str:
    return f"{float(value):g}"


def _limits(about: Mapping[str, Any], environment: Mapping[str, Any]) -> list[str]:
    lines = [f"- Another model than {about['model']}, or another table of observations or actions, is refused."]
    if "seconds" in about.get("training", {}):
        lines.append(
            "- The validation utility chose the best state of each training, so it is too high. What the policies that "
            "ship reach on held-out data stands in docs/results/agents."
        )
    if ASSUMED in str(environment.get("quality", "")):
        lines.append(f"- The quality in `{environment['quality']}` is an assumption: this model was not measured.")
    if str(about.get("commit", "")).endswith("-dirty"):
        lines.append("- It was trained from files that differed from the commit.")
    return lines
