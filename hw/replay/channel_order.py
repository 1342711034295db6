"""Puts the channels of a model's FFN blocks in order of importance before it serves, if plans of the run cut them.

FLAP scores the channels on the same calibration text as ``python -m hw.score kind=width``, so the channels that run are
those whose loss the quality charges. A model whose plans cut no FFN block stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch

from hw.elastic.channel_scores import channel_scores
from hw.elastic.model import ElasticModel
from hw.elastic.text import read_windows
from sim.cost.plan import dense_plan
from sim.policies import Policy, plans_of

CHANNEL_TEXT = "text/wikitext2_unk_valid.txt"
TOKENS, WINDOW_TOKENS, SEED = 8192, 128, 0
"""What conf/score.yaml takes of the text."""


def order_channels(elastic: ElasticModel, tokenizer: Any, policy: Policy, text: str | None) -> None:
    """Order the channels of a model if the first plan of a policy, or one that it lists, cuts FFN blocks.

    Args:
        elastic: the model; one whose channels are in order stays as it is.
        tokenizer: of the model. text: a path, or one under RAP_LAB_DATA. None keeps the order of the checkpoint.
    Raises:
        ConfigError: for a text that is missing or too short.
    """
    if elastic.ordered or not any(plan.cuts_ffn for plan in (policy.first_plan, *(plans_of(policy) or ()))):
        return
    if text is None or elastic.note:  # random weights: no channel is more important than another
        elastic.order_channels()
        return
    elastic.apply(dense_plan(elastic.spec))
    window = min(WINDOW_TOKENS, elastic.spec.max_context_tokens)
    windows = read_windows(text, tokenizer, tokens=TOKENS, window=window, seed=SEED)
    scores = channel_scores(elastic, windows.tokens.to(elastic.device))
    order = torch.stack([scores.order(layer) for layer in range(elastic.spec.num_layers)])
    elastic.order_channels(order, scores.mean)
