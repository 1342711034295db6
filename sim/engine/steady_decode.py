"""How long a decode iteration of a load takes that recurs: by formula, without serving a request."""

from __future__ import annotations

import numpy as np

from sim.cost.ffn_width import FULL_WIDTH
from sim.cost.kv_format import kv_formats, saved_tokens
from sim.cost.plan import WEIGHT_BITS, Plan
from sim.cost.streaming import steady_pass_s
from sim.engine.server_spec import ServerSpec
from sim.engine.transition import resident_of


def steady_decode_s(server: ServerSpec, plan: Plan, batch: int, context_tokens: int) -> float:
    """Return the seconds of an iteration in which ``batch`` requests get their next token under a plan, and no prompt.

    Args:
        server: whose calibration prices it, as fast as calibrated. context_tokens: of each request, all of its prompt.
    """
    model, latency, link = server.model, server.priced(), server.copying()
    formats = kv_formats(model, plan, server.config.kv_block_tokens)
    stored_tokens = context_tokens - saved_tokens(plan, context_tokens)
    rows = []
    for layer, bits in enumerate(plan.product_bits):
        decodes, read = batch * plan.decode.mha[layer], stored_tokens
        if formats is not None:  # as many tokens at 16 bits have the bytes that a decode reads
            read = formats[layer].read_bytes(stored_tokens) // model.kv_bytes_per_token_layer
        hidden = decodes * stored_tokens if plan.kv_hidden else 0
        feeding, cut = batch * plan.decode.ffn[layer], FULL_WIDTH - plan.ffn_width[layer]
        rows.append((1, WEIGHT_BITS.index(bits), 0, 0, decodes, decodes * read, feeding, 0, cut, hidden))
    compute_s = latency.layered_iteration_s(np.array(rows, dtype=np.int64), batch, batch)
    if not any(plan.streamed):
        return compute_s
    resident = resident_of(plan)
    return steady_pass_s(
        resident.layer_bytes(model),
        resident.blocks(),
        resident.streamed,
        compute_s,
        link.host_to_device_bytes_per_s,
        link.layer_s,
        link.slowdown,
    )
