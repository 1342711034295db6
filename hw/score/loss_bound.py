"""A lower bound of the loss of a window under a changed model, at a few percent of the cost of the output head."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from hw.elastic.model import ElasticModel

# Shapes: m changed models, t tokens of the window, e hidden size, v vocabulary.

LIKELY_TOKENS = 1024
"""Size of A below. With a larger A the bound costs more; with a smaller one more candidates need the head."""


class LossBound:
    """Bounds the loss of one window from below, for any model that shares the head of a reference model.

        log sum over v of exp(l_v)  >=  log( sum over v in A of exp(l_v)
                                             + exp( sum over v not in A of q_v l_v + H(q) ) )

    for any distribution q over the tokens outside of A, by Jensen's inequality; l are logits and H is the entropy. A
    holds the tokens that the reference model finds likeliest in this window, and q is its distribution over all others.
    The bound misses the share of these others times their relative entropy, which is little if the models are alike.
    sum q_v l_v is a single product with the mean of the head's rows.
    """

    def __init__(self, elastic: ElasticModel, logits: Tensor, tokens: Tensor) -> None:
        """Take the logits [t - 1, v] of the reference model, and the window [t]."""
        self._elastic = elastic
        weight = elastic.head_weight()
        logs = logits.float().log_softmax(-1)
        self.loss = -float(logs.gather(-1, tokens[1:, None]).double().sum())
        shares = logs.exp()
        likely = shares.sum(0).topk(min(LIKELY_TOKENS, logs.shape[1])).indices
        part = torch.unique(torch.cat((likely, tokens)))
        self._weight = weight[part]
        self._target = torch.searchsorted(part, tokens[1:])
        self._exact = part.numel() == logs.shape[1]
        if self._exact:
            return
        shares[:, part] = 0.0
        rounded_shares = shares.to(weight.dtype)  # q is what the product below really weighs with
        total = rounded_shares.sum(-1, keepdim=True, dtype=torch.float32).clamp_min_(1e-30)
        self._mean = (rounded_shares @ weight).float() / total
        self._entropy = (total.log() - (shares.mul_(logs)).sum(-1, keepdim=True) / total)[:, 0]

    def bound(self, hidden: Tensor) -> Tensor:
        """Return the lower bounds [m], in nats and FP64, of the losses of last hidden states [m, t, e]."""
        normed = self._elastic.normed(hidden[:, :-1])
        logits = functional.linear(normed, self._weight).float()
        mass = logits.logsumexp(-1)
        if not self._exact:
            mass = torch.logaddexp(mass, (normed.float() * self._mean).sum(-1) + self._entropy)
        target = logits.gather(-1, self._target.expand(len(hidden), -1)[..., None])[..., 0]
        return (mass - target).double().sum(-1)
