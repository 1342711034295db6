"""A real model that runs Plans: it skips blocks, frees and restores their weights, and swaps in quantized copies.

elastic = ElasticModel(model)                   # a Hugging Face model of a supported family, changed in place
elastic.apply(plan)                             # takes effect in the next forward pass
request = RequestKV()
logits = elastic.forward([prompt], [request], "prefill")
elastic.end_prefill(request)
logits = elastic.forward([[token]], [request], "decode")
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hw.elastic.blocks import ABSENT, KINDS, Block, DiskStore, Kind, PinnedStore, Store
from hw.elastic.device import Accelerator, Device, device_of
from hw.elastic.families import FAMILIES, find_part
from hw.elastic.kv import BatchKV, KVView, RequestKV
from hw.elastic.kv_compression.lorc import Directions, key_and_value_directions
from hw.elastic.kv_compression.packing import check_compression, kept_directions
from hw.elastic.layers import Layer, read_ends, read_layer
from hw.elastic.rotation import find_rotations
from hw.elastic.weight_streams import WeightStreams
from sim.cost.ffn_width import FULL_WIDTH
from sim.cost.memory import Stage, ffn_weight_bytes, mha_weight_bytes, resident_mask
from sim.cost.model_spec import ModelSpec, model_from_hf_config
from sim.cost.plan import KeepMask, Plan, check_plan, dense_plan, describe
from sim.errors import ModelError, PlanError, nearest

# Shapes: b rows of a batch, t new tokens, k keys, h KV heads, d head_dim, e hidden size.

Rope = tuple[tuple[Tensor, Tensor], ...]
"""Cosines and sines of a batch's positions: one pair for each rotation of the model, none for learned positions."""


class ElasticModel:
    """A Hugging Face causal language model that runs any legal Plan. It changes the model in place.

    The engine computes ``layers`` with the code of this package (``hw.elastic.forward``). Scoring, and tests of that
    code, compute with the modules of transformers over the same weights: ``forward``, ``attend``, ``feed``.

    most_context_tokens: of the requests that the engine serves. More than the original ones of a model with longrope
    select its frequencies for long contexts, for all requests. directions: of the key and the value weights of each
    layer, in which LoRC stores KV; None before ``find_directions``.
    """

    def __init__(
        self, model: Any, *, name: str = "", stage: Stage = "both", hardware: Device | None = None, note: str = ""
    ) -> None:
        """Take over a model.

        Args:
            model: a loaded causal language model of a family in ``hw.elastic.families``.
            name: name of the model description; empty takes the name of the model's own config.
            stage: whether this replica runs prefill, decode or both, which decides what must be resident.
            hardware: the device that holds the model; None finds it.
            note: what every output of a run has to say about the weights.
        Raises:
            ModelError: for an unsupported family, or parameters that the model description does not count.
        """
        parameter = next(model.parameters())
        self.device: torch.device = parameter.device
        self.hardware: Device = hardware or device_of(self.device)
        self.dtype: torch.dtype = parameter.dtype
        described = {**model.config.to_dict(), "dtype": str(self.dtype)}
        self.spec: ModelSpec = model_from_hf_config(described, name, keep_all_kv=True)
        self.most_context_tokens = self.spec.max_context_tokens
        config = model.config
        self._family = family = FAMILIES[config.model_type]
        self._model = model.eval()
        self._stack: Any = find_part(model, family.stack, config.model_type)
        self._layers: Any = find_part(self._stack, "layers", config.model_type)
        self._final_norm: Any = find_part(self._stack, family.final_norm, config.model_type)
        model.set_attn_implementation("sdpa")  # eager attention adds its mask, and ours is boolean
        self._store: Store = PinnedStore(self.hardware) if isinstance(self.hardware, Accelerator) else DiskStore()
        self._attention = self._parts(family.attention)
        self._norms = {"mha": self._parts(family.mha_norm), "ffn": self._parts(family.ffn_norm)}
        self._ffn = list(zip(*(self._parts(name) for name in family.ffn), strict=True))
        self._post_norms = {
            "mha": self._parts(family.mha_post_norm) if family.mha_post_norm is not None else None,
            "ffn": self._parts(family.ffn_post_norm) if family.ffn_post_norm is not None else None,
        }
        self.layers: list[Layer] = [read_layer(layer, family, config, i) for i, layer in enumerate(self._layers)]
        self.ends = read_ends(model, self._stack, self._final_norm, family)
        self._rotations = find_rotations(self._stack.rotary_emb, config) if not self.spec.learned_positions else []
        self.blocks: dict[Kind, list[Block]] = {
            "mha": [Block(f"MHA{i}", *layer.mha_parts, self._store) for i, layer in enumerate(self.layers)],
            "ffn": [Block(f"FFN{i}", *layer.ffn_parts, self._store) for i, layer in enumerate(self.layers)],
        }
        self.streams = WeightStreams(
            self.blocks["mha"], self.blocks["ffn"], self._store, self.hardware, self._layer_bytes
        )
        inside = {id(p) for layer in self._layers for p in layer.parameters()}
        self._fixed = [p for p in model.parameters() if id(p) not in inside]  # parameters() lists tied ones once
        self._stage: Stage = stage
        self.note = note
        self.directions: tuple[list[Directions], list[Directions]] | None = None
        self.plan: Plan = dense_plan(self.spec)
        self._nested = self.plan.nested
        if self.bytes() != self._expected_dense_bytes():
            raise ModelError(
                f"{self.spec.name} holds {self.bytes():,} bytes of parameters, but its config describes "
                f"{self._expected_dense_bytes():,}; add its other parts to sim.cost.model_spec.ModelSpec"
            )

    def _layer_bytes(self, mha_bits: int, ffn_bits: int) -> int:
        """Return the bytes of the blocks of a layer at these bits; ABSENT for a block that does not run."""
        mha = mha_weight_bytes(self.spec, mha_bits) if mha_bits != ABSENT else 0
        return mha + (ffn_weight_bytes(self.spec, ffn_bits) if ffn_bits != ABSENT else 0)

    def _parts(self, name: str) -> list[Any]:
        """Return the part of every layer under an attribute name."""
        return [find_part(layer, name, self._model.config.model_type) for layer in self._layers]

    def _expected_dense_bytes(self) -> int:
        return self.spec.total_params * self.spec.weight_dtype_bytes

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a text, by the generation config of the checkpoint."""
        found = getattr(getattr(self._model, "generation_config", None), "eos_token_id", None)
        return frozenset([] if found is None else [found] if isinstance(found, int) else found)

    # --- Plans

    def apply(self, plan: Plan, *, wait: bool = True) -> None:
        """Run ``plan`` from the next forward on.

        Weights that it drops are freed at once. Weights that it needs are copied in from the store. On CUDA with
        ``wait=False`` the copies run on a side stream, and a block joins at the first forward after its copy is
        complete. Until then an absent block stays skipped, and a block that changes precision runs at its old one.

        Raises:
            PlanError: if the plan is not legal for the model.
        """
        check_plan(self.spec, plan)
        self.check(plan)
        keep = resident_mask(plan, self._stage)
        for kind in KINDS:
            kept = keep.mha if kind == "mha" else keep.ffn
            widths = plan.ffn_width if kind == "ffn" else (FULL_WIDTH,) * len(kept)
            for block, bits, width, keeps, streamed in zip(
                self.blocks[kind], plan.weight_bits, widths, kept, plan.streamed, strict=True
            ):
                block.want(bits if keeps and not streamed else ABSENT, width)
                block.join(wait)
        self.streams.set(
            {
                layer: (bits if keep.mha[layer] else ABSENT, bits if keep.ffn[layer] else ABSENT)
                for layer, (bits, streamed) in enumerate(zip(plan.weight_bits, plan.streamed, strict=True))
                if streamed
            }
        )
        self.plan = plan
        self.read(plan.nested)

    def check(self, plan: Plan, *, hidden: bool | None = None) -> None:
        """Check that this model can run a plan, and store what it keeps of a prompt.

        Args:
            hidden: whether an engine stores hidden states in place of keys and values; None: that of the plan.
        Raises:
            PlanError: as ``check_real_plan``, and for compressed KV of which it cannot store enough to read it.
        """
        check_real_plan(plan, ordered=self.ordered, hidden=hidden)
        found = 0 if self.directions is None else self.directions[0][0].count
        check_compression(self.spec, plan, normed_keys=self._norms_keys, directions=found)

    @property
    def _norms_keys(self) -> bool:
        return any(layer.k_norm is not None for layer in self.layers)

    def find_directions(self, plans: Iterable[Plan]) -> None:
        """Find the directions of key and value weights in which LoRC stores KV, as many as these plans keep.

        They take 8 h d r bytes a layer for r directions, which no budget counts. The model runs dense if it finds any.

        Raises:
            PlanError: for a plan whose KV cannot be stored so.
        """
        wanted = 0
        for plan in plans:
            if (way := plan.kv_compression) is not None and way.method == "lorc":
                check_compression(self.spec, plan, normed_keys=self._norms_keys)
                wanted = max(wanted, kept_directions(self.spec, way))
        if wanted <= (0 if self.directions is None else self.directions[0][0].count):
            return
        self.apply(dense_plan(self.spec))
        self.directions = key_and_value_directions(self.layers, self.spec, wanted)

    def read(self, nested: tuple[bool, ...]) -> None:
        """Read half of the bits of the resident weights of these layers from now on, and all of the others'."""
        if nested == self._nested:
            return
        for kind in KINDS:
            for block, half in zip(self.blocks[kind], nested, strict=True):
                block.read(half=half)
        self._nested = nested

    @property
    def ordered(self) -> bool:
        """Whether the channels of the FFN blocks are in order of importance, so that plans may cut them."""
        return all(block.channels is not None for block in self.blocks["ffn"])

    def order_channels(self, order: Tensor | None = None, mean: Tensor | None = None) -> None:
        """Put the channels of all FFN blocks in order of importance, so that plans may cut them; only once.

        The model then computes the same sums in another order, so its values differ by their rounding. It runs dense.
        What was stored of these blocks before is of no use any more.

        Args:
            order: channels of each layer [l, f], the most important first; None keeps the order of the checkpoint.
            mean: of each channel's activation [l, f], in the order of the checkpoint; None for zeros.
        """
        assert not self.ordered
        self.apply(dense_plan(self.spec))
        for layer, block in enumerate(self.blocks["ffn"]):
            block.order(None if order is None else order[layer], None if mean is None else mean[layer])

    def prepare(self, bits: Iterable[int]) -> None:
        """Quantize and store all blocks at these precisions ahead of time, so that no ``apply`` has to."""
        for count in bits:
            for kind in KINDS:
                for block in self.blocks[kind]:
                    block.prepare(count)

    def prepare_for(self, plans: Iterable[Plan]) -> None:
        """Store what it takes to go from any of these plans to any other, so that no ``apply`` of them has to."""
        listed = list(plans)
        masks = [(plan.weight_bits, resident_mask(plan, self._stage), plan.streamed) for plan in listed]
        for kind in KINDS:
            for layer, block in enumerate(self.blocks[kind]):
                wanted = set()
                for bits, mask, streamed in masks:
                    keeps = (mask.mha if kind == "mha" else mask.ffn)[layer]
                    wanted |= {bits[layer] if keeps else ABSENT} | ({ABSENT} if streamed[layer] else set())
                block.prepare_for(wanted)
        for layer, block in enumerate(self.blocks["ffn"] if self.ordered else []):
            forms = {
                (bits[layer] if mask.ffn[layer] and not streamed[layer] else ABSENT, plan.ffn_width[layer])
                for plan, (bits, mask, streamed) in zip(listed, masks, strict=True)
            }
            block.prepare_forms(forms)

    def ready(self) -> bool:
        """Let complete copies take effect; return whether the plan now runs without any copy under way."""
        blocks = [block for kind in KINDS for block in self.blocks[kind]]
        for block in blocks:
            block.join(wait=False)
        return all(block.pending is None for block in blocks)

    @property
    def weights_version(self) -> int:
        """How often weights have moved to other addresses."""
        return sum(block.version for kind in KINDS for block in self.blocks[kind])

    @property
    def stored_bytes(self) -> int:
        """Bytes of weights off the device: of pinned host memory, or of a file on a CPU."""
        return self._store.nbytes

    def bytes(self) -> int:
        """Bytes of weights on the device; ``sim.cost.memory.weight_bytes`` of the plan once no copy is under way."""
        fixed: int = sum(parameter.nbytes for parameter in self._fixed)
        return fixed + self.streams.nbytes + sum(block.nbytes for kind in KINDS for block in self.blocks[kind])

    def resident_bytes(self) -> int:
        """Bytes of weights on the device that run: without a copy under way."""
        fixed: int = sum(parameter.nbytes for parameter in self._fixed)
        blocks = sum(block.resident_bytes for kind in KINDS for block in self.blocks[kind])
        return fixed + self.streams.nbytes + blocks

    def running(self, stage: Literal["prefill", "decode"]) -> KeepMask:
        """Return the blocks that a forward of this stage runs now: those in the plan that are resident or streamed."""
        mask = self.plan.prefill if stage == "prefill" else self.plan.decode
        streamed = self.streams.layers

        def runs(kept: tuple[bool, ...], kind: Kind) -> tuple[bool, ...]:
            return tuple(
                keep and (block.bits != ABSENT or layer in streamed)
                for layer, (keep, block) in enumerate(zip(kept, self.blocks[kind], strict=True))
            )

        return KeepMask(mha=runs(mask.mha, "mha"), ffn=runs(mask.ffn, "ffn"))

    # --- Running it

    @torch.inference_mode()
    def forward(
        self,
        tokens: Sequence[Sequence[int]] | Tensor,
        requests: Sequence[RequestKV] | None = None,
        stage: Literal["prefill", "decode"] = "prefill",
        *,
        all_logits: bool = False,
    ) -> Tensor:
        """Run new tokens, one row per request; return the logits of the last token of each row, [b, vocabulary].

        Args:
            tokens: the new tokens of each row; rows may differ in length.
            requests: the KV of each row, to which this appends; None keeps no KV.
            stage: which mask of the plan runs. A prompt may be split over several prefill calls.
            all_logits: return [b, t, vocabulary] instead; the logits of padding tokens are meaningless.
        Raises:
            PlanError: for an unknown stage, an empty row, or a number of requests that is not the number of rows.
        """
        if stage not in ("prefill", "decode"):
            raise PlanError(f"unknown stage {stage!r}; {nearest(stage, ('prefill', 'decode'))}")
        rows = [torch.as_tensor(row, dtype=torch.long, device=self.device) for row in tokens]
        lengths = [row.numel() for row in rows]
        if not rows or min(lengths) < 1 or (requests is not None and len(requests) != len(rows)):
            raise PlanError(
                f"a forward of {len(rows)} rows of {lengths} tokens and "
                f"{'no' if requests is None else len(requests)} requests; give one request a row, one token at least"
            )
        if stage == "prefill" and any(self.plan.kv_only):
            raise PlanError(
                f"the plan {describe(self.plan)!r} has layers that only write KV for most tokens of a prompt; "
                "hw.elastic.forward runs them, and hw.score measures them; leave kv_only out here"
            )
        if requests is not None and self.plan.kv_hidden:
            raise PlanError(
                "the plan keeps hidden states in place of keys and values; hw.elastic.forward does so. Leave kv_hidden "
                "out here"
            )
        if requests is not None and self.plan.kv_compression is not None:
            raise PlanError(
                f"the plan compresses KV by {self.plan.kv_compression.method}; hw.elastic.forward reads it in a paged "
                "pool, and hw.score measures what it loses. Leave kv_compression out here"
            )
        self.ready()
        running = self.running(stage)
        padded = pad_sequence(rows, batch_first=True)
        start = torch.tensor([r.tokens for r in requests] if requests else [0] * len(rows), device=self.device)
        positions = start[:, None] + torch.arange(padded.shape[1], device=self.device)
        view = None
        if requests is not None:
            held = frozenset(layer for layer, runs in enumerate(running.mha) if runs)
            for request in requests:
                request.restrict(held)
            view = BatchKV(requests, lengths, self.device)
        hidden = self._run(padded, positions, running, view)
        if requests is not None:
            for request, length in zip(requests, lengths, strict=True):
                request.tokens += length
        if not all_logits:
            last = torch.tensor(lengths, device=self.device) - 1
            hidden = hidden[torch.arange(len(rows), device=self.device), last]
        return self.head(hidden)

    def end_prefill(self, request: RequestKV) -> None:
        """End a request's prefill: free the KV that decode drops, and store the rest at the plan's bits."""
        request.restrict(frozenset(i for i, keep in enumerate(self.plan.decode.mha) if keep))
        request.end_prefill(self.plan.kv_keep, self.plan.kv_bits)

    def _run(self, tokens: Tensor, positions: Tensor, running: KeepMask, view: KVView | None) -> Tensor:
        """Return the hidden states [b, t, e] after the last layer, for tokens and positions [b, t]."""
        hidden = self.embed(tokens, positions)
        rope = self.rope(hidden, positions)
        for layer in range(self.spec.num_layers):
            self.streams.enter(layer)
            if running.mha[layer]:
                hidden = self._attend_rows(layer, hidden, rope, view)
            if running.ffn[layer]:
                hidden = hidden + self.feed(layer, hidden)
            self.streams.leave(layer)
        return hidden

    def _attend_rows(self, layer: int, hidden: Tensor, rope: Rope, view: KVView | None) -> Tensor:
        """Return ``hidden`` after the MHA block of a layer; rows without that layer's KV skip the block."""
        rows = view.rows(layer) if view is not None else None
        if rows is None:
            return hidden + self.attend(layer, hidden, rope, view)
        if not rows.numel():
            return hidden
        rope_of_rows = tuple((cos[rows], sin[rows]) for cos, sin in rope)
        return hidden.index_add(0, rows, self.attend(layer, hidden[rows], rope_of_rows, view))

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the hidden states [..., e] before the first layer, of tokens and positions [...]."""
        return self.ends.embed(tokens, positions)

    def rope(self, hidden: Tensor, positions: Tensor) -> Rope:
        """Return the rotary embeddings of positions [b, t], for contexts as long as the last of them."""
        context = int(positions.max()) + 1 if any(rotation.long is not None for rotation in self._rotations) else 0
        return tuple(rotation(positions, hidden.dtype, context) for rotation in self._rotations)

    def rotate(self, positions: Tensor) -> Rope:
        """Return the rotary embeddings of positions [n] in the engine; nothing waits for the device."""
        return tuple(rotation(positions, self.dtype, self.most_context_tokens) for rotation in self._rotations)

    def _rope_of(self, layer: int, rope: Rope) -> tuple[Tensor, Tensor] | None:
        """Return the pair that the attention module of a layer takes; it ignores that in a layer without rotation."""
        return rope[self.layers[layer].rotation or 0] if rope else None

    def attend(self, layer: int, hidden: Tensor, rope: Rope, view: KVView | None = None) -> Tensor:
        """Return what the MHA block of a layer adds to ``hidden`` [b, t, e].

        Without a view, attention is causal over these tokens alone.
        """
        window = self.layers[layer].window
        mask = None
        if view is not None:
            mask = view.mask(layer, window)
        elif window is not None and window < hidden.shape[1]:
            mask = _causal(hidden.shape[1], window, hidden.device)
        pair = self._rope_of(layer, rope)
        arguments = {"position_embeddings": pair} if pair is not None else {}
        output: Tensor = self._attention[layer](
            hidden_states=self._norms["mha"][layer](hidden), attention_mask=mask, past_key_values=view, **arguments
        )[0]
        return self._added("mha", layer, output)

    def _added(self, kind: Kind, layer: int, output: Tensor) -> Tensor:
        """Return what a block adds, from the output of its last module."""
        norms = self._post_norms[kind]
        if norms is not None:
            output = norms[layer](output)
        multiplier = self.layers[layer].multiplier
        return output if multiplier == 1.0 else output * multiplier

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many tokens the attention of each layer looks back; None for all of them."""
        return tuple(layer.window for layer in self.layers)

    def feed(self, layer: int, hidden: Tensor) -> Tensor:
        """Return what the FFN block of a layer adds to ``hidden``."""
        normed = self._norms["ffn"][layer](hidden)
        parts = self._ffn[layer]
        if len(parts) == 2:  # OPT: fc1 and fc2, with the activation between them held by the layer
            normed = self._layers[layer].activation_fn(parts[0](normed))
        output: Tensor = parts[-1](normed)
        return self._added("ffn", layer, output)

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., vocabulary] of hidden states [..., e], which the final norm has not seen yet."""
        logits: Tensor = self._model.lm_head(self.normed(hidden))
        return logits if self.ends.divisor == 1.0 else logits / self.ends.divisor

    def normed(self, hidden: Tensor) -> Tensor:
        """Return hidden states after the final norm: the input of the head."""
        output: Tensor = self._final_norm(hidden)
        return output

    def head_weight(self) -> Tensor:
        """Return the matrix [vocabulary, e] whose product with what ``normed`` returns is the logits."""
        weight: Tensor = self._model.lm_head.weight
        return weight if self.ends.divisor == 1.0 else weight / self.ends.divisor

    @torch.inference_mode()
    def attention_weights(self, tokens: Tensor) -> list[Tensor]:
        """Return the attention of every layer of the dense model, [b, heads, t, t] each."""
        positions = torch.arange(tokens.shape[1], device=self.device)[None]
        hidden = self.embed(tokens, positions)
        rope = self.rope(hidden, positions)
        weights = []
        try:
            for layer in range(self.spec.num_layers):
                seen = _causal(tokens.shape[1], self.layers[layer].window, self.device)
                additive = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
                additive.masked_fill_(~seen, torch.finfo(self.dtype).min)
                self._model.set_attn_implementation("eager")  # the only implementation that returns its weights
                pair = self._rope_of(layer, rope)
                arguments = {"position_embeddings": pair} if pair is not None else {}
                normed = self._norms["mha"][layer](hidden)
                output, shares = self._attention[layer](hidden_states=normed, attention_mask=additive, **arguments)
                weights.append(shares)
                hidden = hidden + self._added("mha", layer, output)
                hidden = hidden + self.feed(layer, hidden)
        finally:
            self._model.set_attn_implementation("sdpa")
        return weights


def check_real_plan(plan: Plan, *, ordered: bool = False, hidden: bool | None = None) -> None:
    """Check that the real engine can run a plan, and store what it keeps of a prompt.

    Args:
        ordered: whether the channels of FFN blocks are in order of importance.
        hidden: whether an engine stores hidden states in place of keys and values; None: that of the plan.
    Raises:
        PlanError: for cut FFN blocks whose channels are not in order, streamed layers where they are, and a plan that
            keeps the other of the two.
    """
    if plan.cuts_ffn and not ordered:
        raise PlanError(
            f"this real engine cannot run FFN blocks at fewer channels ({describe(plan)!r}): it stores their channels "
            "in the order of the checkpoint. python -m hw.replay, hw.serve and hw.loop put them in order of importance "
            "if the first plan, or one that the policy lists, cuts them: start with such a plan (policy=fixed "
            "policy.ffn_width=7). Otherwise drop FFN blocks, or simulate the plan"
        )
    if ordered and any(plan.streamed):
        raise PlanError(
            f"this real engine cannot stream layers ({describe(plan)!r}): plans of the run, or of an earlier one over "
            "the same model, cut FFN blocks, and it streams blocks with all channels only; use either in a run, or "
            "simulate the plan"
        )
    if hidden is not None and plan.kv_hidden != hidden:
        raise PlanError(
            f"the real engine starts with kv_hidden={str(hidden).lower()}, and cannot serve with "
            f"kv_hidden={str(plan.kv_hidden).lower()} later: it stores hidden states from the first token of a prompt "
            "on, or never; use policy=fixed with either, or simulate a policy that chooses"
        )


def _causal(tokens: int, window: int | None, device: torch.device) -> Tensor:
    """Return the causal mask, bool [1, 1, t, t], limited to a sliding window if there is one."""
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    return (seen if window is None else seen.triu(1 - window))[None, None]
