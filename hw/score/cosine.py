"""ShortGPT's Block Influence for half layers: how little each block turns the hidden state."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional

from hw.elastic.model import ElasticModel
from hw.score.candidate_states import block_output
from sim.progress import progress

# Shapes: n windows, t tokens of each.


@torch.inference_mode()
def block_cosines(elastic: ElasticModel, windows: Tensor, removed: Collection[int] = ()) -> dict[int, float]:
    """Return the mean cosine between input and output of every block, over all tokens of windows [n, t].

    A high cosine means a redundant block. ShortGPT's Block Influence is one minus the cosine of a full layer; PDTrim's
    redundancy is the cosine of the units that it removes. Here a unit is one MHA or FFN block with its residual
    connection.

    Args:
        elastic: with all blocks at full precision.
        windows: token ids of calibration text.
        removed: blocks that do not run; they have no entry in the result.
    Source:
        ShortGPT (arXiv 2403.03853), section 3.1, Block Influence; PDTrim (arXiv 2509.04467), block redundancy.
    """
    kept = [block for block in range(2 * elastic.spec.num_layers) if block not in removed]
    sums = dict.fromkeys(kept, 0.0)
    with progress("comparing", len(windows), "windows") as report:
        for number, window in enumerate(windows.to(elastic.device), start=1):
            positions = torch.arange(window.shape[0], device=window.device)[None]
            hidden = elastic.embed(window[None], positions)
            rope = elastic.rope(hidden, positions)
            for block in kept:
                after = hidden + block_output(elastic, block, hidden, rope)
                cosine = functional.cosine_similarity(hidden.float(), after.float(), dim=-1)
                sums[block] += float(cosine.sum())
                hidden = after
            report(number)
    return {block: total / windows.numel() for block, total in sums.items()}
