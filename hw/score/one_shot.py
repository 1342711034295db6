"""RAP's one-shot ranking, the ablation of GSI: blocks by what each costs when it is the only one removed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hw.elastic.model import ElasticModel
from hw.score.candidate_states import CandidateStates
from hw.score.nll import token_nll
from sim.progress import progress


@torch.inference_mode()
def single_removals(elastic: ElasticModel, windows: Tensor) -> dict[int, float]:
    """Return the NLL per token without each block in turn, all others kept, on windows [n, t].

    The blocks before a removed one run only once for all candidates.
    """
    windows = windows.to(elastic.device)
    states = CandidateStates(elastic, windows, (), cache_bytes=0)
    states.fill_base()
    sums = dict.fromkeys(states.kept, 0.0)
    with progress("removing each block", len(windows), "windows") as report:
        for index, window in enumerate(windows):
            states.fill(index, states.kept)
            for block in states.kept:
                sums[block] += float(token_nll(elastic, states.last(index, block), window[None]).double().sum())
            states.without[index].clear()
            report(index + 1)
    return {block: total / (windows.shape[0] * (windows.shape[1] - 1)) for block, total in sums.items()}


def one_shot(nll_without: Mapping[int, float]) -> list[int]:
    """Return the blocks by the NLL that each leaves when it alone is removed, the least harmful first.

    Source:
        RAP (arXiv 2505.17138): one-shot ranking, the ablation of GSI.
    """
    return sorted(nll_without, key=lambda block: (nll_without[block], block))
