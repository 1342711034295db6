"""Plans for disaggregated prefill and decode: PDTrim's two mechanisms, each alone, and baselines.

Each kind is a sequence of ever stronger plans. The policy runs the strongest plan that keeps a quality, or the first
that sends few enough bytes, so that kinds are compared at equal quality or at equal bytes.

| kind | plan n of its sequence |
|---|---|
| `dense` | drops nothing |
| `unified` | drops the first n blocks of the order, in prefill and decode |
| `blocks` | drops n blocks in decode, the first n / 2 also in prefill (PDTrim, arXiv 2509.04467; n / 2 is ours) |
| `searched` | drops the n-th nested pair of sets that PDTrim's two-stage search found (`hw.score kind=pdtrim`) |
| `kv` | sends and keeps only the first and last tokens in the n layers whose attention concentrates most on them |
| `both` | drops n blocks as in `blocks`, and cuts KV in n layers as in `kv` |
| `streaming` | keeps in all layers the first 4 and ever fewer last tokens, as StreamingLLM (arXiv 2309.17453) |
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sim.config import CONF_DIR
from sim.cost.kv_format import stored_kv_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan, check_plan, dense_plan
from sim.cost.quality import load_quality
from sim.errors import ConfigError, nearest
from sim.json_file import read_json_object
from sim.policies.base import PolicyContext
from sim.policies.fixed import Fixed, static_plan

KINDS = ("dense", "unified", "blocks", "searched", "kv", "both", "streaming")


def pdtrim(
    served: PolicyContext,
    *,
    kind: str,
    order: str,
    attention: str,
    quality: str,
    most_perplexity: float | None = None,
    most_sent: float | None = None,
    prompt_tokens: int = 128,
    first_tokens: int = 4,
    last_tokens: int = 32,
    kv_bits: int = 16,
) -> Fixed:
    """Build the policy that always runs one plan of a kind, chosen by quality or by bytes.

    Args:
        served: what the policy knows of the server.
        kind: see the table of this module.
        order, attention: files of conf/score with the order of blocks and of layers. quality: a file of conf/quality.
        most_perplexity: the highest allowed ratio of predicted perplexity to dense; takes the strongest such plan.
        most_sent: the highest allowed ratio of a prompt's KV bytes to dense; takes the first such plan.
        prompt_tokens: length of that prompt.
        first_tokens, last_tokens: tokens that stay in a shortened layer.
        kv_bits: 16, 8 or 4: at how many bits KV is sent and kept, in every plan of the kind.
    Raises:
        ConfigError: for an unknown kind or file, for none or both of the targets, or for a target that no plan meets.
    """
    if kind not in KINDS:
        raise ConfigError(f"unknown policy.kind {kind!r}; {nearest(kind, KINDS)}")
    if kind != "dense" and (most_perplexity is None) == (most_sent is None):
        raise ConfigError("policy.most_perplexity and most_sent: set exactly one of them, the other to null")
    model, dense = served.model, dense_plan(served.model)
    bits = (kv_bits,) * model.num_layers
    fewer_bits = replace(dense, kv_bits=bits)
    check_plan(model, fewer_bits)
    if kind == "dense":
        return Fixed(fewer_bits)
    layers = [int(layer) for layer in _score(attention, model)["order"]]
    if kind == "searched":
        row = list(_searched(model, _score(order, model).get("searches", [])))
    else:
        row = list(_plans(model, kind, _score(order, model)["order"], layers, first_tokens, last_tokens))
    row = [replace(plan, kv_bits=bits) for plan in row]
    if kv_bits < 16:
        row.insert(0, fewer_bits)
    dense_bytes = stored_kv_bytes(model, dense, prompt_tokens)
    if most_perplexity is not None:
        table = load_quality(quality)
        most_nll = table.nll(dense) + math.log(most_perplexity)
        good = [plan for plan in row if table.nll(plan) <= most_nll]
        if good:
            return Fixed(good[-1])
    for plan in row:
        if most_sent is not None and stored_kv_bytes(model, plan, prompt_tokens) <= most_sent * dense_bytes:
            return Fixed(plan)
    raise ConfigError(
        f"no plan of policy.kind={kind} meets most_perplexity={most_perplexity}, most_sent={most_sent}; raise the limit"
    )


def _plans(
    model: ModelSpec, kind: str, order: Sequence[str], layers: Sequence[int], first_tokens: int, last_tokens: int
) -> Iterator[Plan]:
    """Yield a kind's plans, from the weakest after dense to the strongest."""
    if kind == "streaming":
        for last in (512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16, 12, 8, 4, 2, 1):
            yield static_plan(model, kv_first_tokens=first_tokens, kv_last_tokens=last)
        return
    for n in range(1, max(len(order), len(layers)) + 1):
        dropped = order[:n] if kind != "kv" else []
        early = dropped if kind == "unified" else dropped[: n // 2]
        shortened = layers[:n] if kind in ("kv", "both") else []
        yield static_plan(
            model,
            drop_mha=_blocks(dropped, "MHA"),
            drop_ffn=_blocks(dropped, "FFN"),
            prefill_drop_mha=_blocks(early, "MHA"),
            prefill_drop_ffn=_blocks(early, "FFN"),
            kv_first_tokens=first_tokens if shortened else None,
            kv_last_tokens=last_tokens if shortened else None,
            kv_layers=shortened if shortened else None,
        )


def _searched(model: ModelSpec, searches: Sequence[Mapping[str, Sequence[str]]]) -> Iterator[Plan]:
    """Yield the plans of the searched pairs, ordered by the blocks that they drop in decode and prefill together."""
    for pair in sorted(searches, key=lambda pair: (len(pair["decode"]) + len(pair["prefill"]), len(pair["decode"]))):
        yield static_plan(
            model,
            drop_mha=_blocks(pair["decode"], "MHA"),
            drop_ffn=_blocks(pair["decode"], "FFN"),
            prefill_drop_mha=_blocks(pair["prefill"], "MHA"),
            prefill_drop_ffn=_blocks(pair["prefill"], "FFN"),
        )


def _blocks(names: Sequence[str], kind: str) -> list[int]:
    return [int(name[3:]) for name in names if name.startswith(kind)]


def _score(name: str, model: ModelSpec) -> dict[str, Any]:
    path = CONF_DIR / "score" / f"{name}.json"
    if not path.is_file():
        raise ConfigError(f"there is no score {name!r}; {nearest(name, [p.stem for p in path.parent.glob('*.json')])}")
    content = read_json_object(path, ConfigError, "measure it again with hw.score")
    if not isinstance(content.get("order", []), list) or not isinstance(content.get("searches", []), list):
        raise ConfigError(f"{path} has no lists of order or searches; measure it again with hw.score")
    if content.get("model") != model.name:
        raise ConfigError(
            f"{path.name} was measured on {content.get('model')}, not on {model.name}; name a file of this model "
            "(policy.order=, policy.attention=; python -m hw.score kind=pdtrim and kind=attention measure them)"
        )
    return content
