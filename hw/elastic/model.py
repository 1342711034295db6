"""A real model that takes Plans: blocks bypassed, weights moved out and back, layers swapped for quantised copies.

    elastic = ElasticModel(model)                   # any Hugging Face model of a family below; it is changed in place
    elastic.apply(plan)                             # the next forward runs it
    request = RequestKV()
    logits = elastic.forward([prompt], [request], "prefill")
    elastic.end_prefill(request)
    logits = elastic.forward([[token]], [request], "decode")

What a block needs lives in one of two places. Resident: on the device, in the parameters of the model's own modules.
Stored: on CUDA in pinned host memory, from where a side stream brings it back; on CPU, where host memory and device
memory are the same, in an unlinked file on disk, so that a dropped block really frees its bytes.

The KV hole (DESIGN section 2, rule 4) is kept by ``RequestKV.holds``: the MHA blocks that a request can run, a set that
only shrinks. ``restore=recompute`` is a new RequestKV, prefilled with the prompt and what was produced so far.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hw.elastic.quantize import ElasticLinear, QuantWeight, quantize
from sim.cost.memory import Stage, resident_mask
from sim.cost.model_spec import ModelSpec, model_from_hf_config
from sim.cost.plan import KV_KEEP_ALL, KeepMask, KVKeep, Plan, check_plan, dense_plan
from sim.errors import ModelError, PlanError, nearest

# Shapes: b rows of a batch, t new tokens, k keys, h KV heads, d head_dim, e hidden size.

Kind = Literal["mha", "ffn"]
KINDS: tuple[Kind, Kind] = ("mha", "ffn")
ABSENT = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Where a model class of transformers keeps the parts that a Plan speaks of.

    stack: from the causal model to the module that holds ``layers``. Names of a layer: its two norms, the attention,
    and the modules of the FFN. final_norm belongs to the stack.
    """

    stack: str
    mha_norm: str
    ffn_norm: str
    ffn: tuple[str, ...]
    attention: str = "self_attn"
    final_norm: str = "norm"


_LLAMA = Family(stack="model", mha_norm="input_layernorm", ffn_norm="post_attention_layernorm", ffn=("mlp",))
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "opt": Family(
        stack="model.decoder",
        mha_norm="self_attn_layer_norm",
        ffn_norm="final_layer_norm",
        ffn=("fc1", "fc2"),
        final_norm="final_layer_norm",
    ),
}
"""Every supported ``model_type`` of a Hugging Face config."""


# --- KV of requests --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class RequestKV:
    """The keys and values of one request, and the MHA blocks that it can run.

    tokens: how many tokens were computed; the position of the next.
    holds: the layers whose MHA block this request runs; None before its first token, then it only shrinks.
    kv_keep: which tokens each layer keeps; None until prefill has ended.
    """

    tokens: int = 0
    holds: frozenset[int] | None = None
    kv_keep: tuple[KVKeep, ...] | None = None
    _keys: dict[int, Tensor] = field(default_factory=dict)  # [h, k, d]
    _values: dict[int, Tensor] = field(default_factory=dict)
    _positions: dict[int, Tensor] = field(default_factory=dict)  # [k], of each key

    def restrict(self, running: frozenset[int]) -> None:
        """Give up the MHA blocks that no longer run, and their keys and values."""
        self.holds = running if self.holds is None else self.holds & running
        for layer in [layer for layer in self._keys if layer not in self.holds]:
            del self._keys[layer], self._values[layer], self._positions[layer]

    def end_prefill(self, kv_keep: tuple[KVKeep, ...]) -> None:
        """Keep from here on only the tokens that ``kv_keep`` names (PDTrim's token-aware cache pruning)."""
        self.kv_keep = kv_keep
        for layer in self._keys:
            self._truncate(layer)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values [h, t, d] of new tokens; return all that the layer keeps."""
        positions = torch.arange(self.tokens, self.tokens + key.shape[1], device=key.device)
        if layer in self._keys:
            key = torch.cat((self._keys[layer], key), dim=1)
            value = torch.cat((self._values[layer], value), dim=1)
            positions = torch.cat((self._positions[layer], positions))
        self._keys[layer], self._values[layer], self._positions[layer] = key, value, positions
        if self.kv_keep is not None:
            self._truncate(layer)
        return self._keys[layer], self._values[layer]

    def positions_with(self, layer: int, new_tokens: int, device: torch.device) -> Tensor:
        """Return the positions that the layer keeps once ``new_tokens`` more are appended."""
        new = torch.arange(self.tokens, self.tokens + new_tokens, device=device)
        positions = torch.cat((self._positions[layer], new)) if layer in self._positions else new
        kept = self._kept(layer, positions.numel())
        return positions if kept is None else positions[kept]

    def kv_tokens(self, layer: int) -> int:
        """Return how many tokens the layer keeps."""
        return self._keys[layer].shape[1] if layer in self._keys else 0

    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(t.nbytes for tensors in (self._keys, self._values) for t in tensors.values())

    def _kept(self, layer: int, count: int) -> Tensor | None:
        keep = self.kv_keep[layer] if self.kv_keep is not None else KV_KEEP_ALL
        if keep.first_tokens is None or keep.last_tokens is None or keep.tokens(count) == count:
            return None
        first = torch.arange(keep.first_tokens)
        return torch.cat((first, torch.arange(count - keep.last_tokens, count)))

    def _truncate(self, layer: int) -> None:
        kept = self._kept(layer, self._keys[layer].shape[1])
        if kept is None:
            return
        kept = kept.to(self._keys[layer].device)
        self._keys[layer] = self._keys[layer][:, kept]
        self._values[layer] = self._values[layer][:, kept]
        self._positions[layer] = self._positions[layer][kept]


class KVView(Protocol):
    """The KV cache of one batch, as the attention of a layer meets it; a paged pool fits as well as ``BatchKV``."""

    def rows(self, layer: int) -> Tensor | None:
        """Return the rows of the batch that run this layer's MHA block; None stands for all of them."""
        ...

    def mask(self, layer: int, window: int | None) -> Tensor:
        """Return which keys each new token sees, bool [b, 1, t, k], for these rows; ``window`` is a sliding one."""
        ...

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Store the keys and values [b, h, t, d] of the new tokens; return all, [b, h, k, d]."""
        ...


class BatchKV:
    """The KVView of a few RequestKVs. It copies all keys at every step: plain and exact, not fast."""

    def __init__(self, requests: Sequence[RequestKV], lengths: Sequence[int], device: torch.device) -> None:
        self._requests = requests
        self._lengths = lengths
        self._device = device

    def _row_list(self, layer: int) -> list[int]:
        return [row for row, request in enumerate(self._requests) if request.holds and layer in request.holds]

    def rows(self, layer: int) -> Tensor | None:
        """Return the rows whose request holds the KV of this layer."""
        rows = self._row_list(layer)
        return None if len(rows) == len(self._requests) else torch.tensor(rows, device=self._device, dtype=torch.long)

    def mask(self, layer: int, window: int | None) -> Tensor:
        """Return which keys each new token sees; padding tokens see the first key, so that no row is empty."""
        rows = self._row_list(layer)
        longest = max(self._lengths)
        keys = pad_sequence(
            [self._requests[row].positions_with(layer, self._lengths[row], self._device) for row in rows],
            batch_first=True,
            padding_value=-1,
        )[:, None, :]
        start = torch.tensor([self._requests[row].tokens for row in rows], device=self._device)
        queries = (start[:, None] + torch.arange(longest, device=self._device))[:, :, None]
        seen = (keys <= queries) & (keys >= 0)
        if window is not None:
            seen &= keys > queries - window
        padding = ~seen.any(-1, keepdim=True)
        seen[..., :1] |= padding
        return seen[:, None]

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append to each request; return the keys and values padded to the longest."""
        keys, values = [], []
        for index, row in enumerate(self._row_list(layer)):
            new = self._lengths[row]
            all_keys, all_values = self._requests[row].append(layer, key[index, :, :new], value[index, :, :new])
            keys.append(all_keys.transpose(0, 1))
            values.append(all_values.transpose(0, 1))
        padded = [pad_sequence(tensors, batch_first=True).transpose(1, 2) for tensors in (keys, values)]
        return padded[0], padded[1]


# --- Stores ----------------------------------------------------------------------------------------------------------


class _DiskStore:
    """Tensors in an unlinked temporary file: on a CPU the only place that is not the memory to be freed."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="rap-lab-weights-")  # noqa: SIM115 - lives as long as the store
        self._index: dict[object, list[tuple[int, torch.dtype, torch.Size]]] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._index

    def put(self, key: object, tensors: Iterable[Tensor]) -> None:
        entries = []
        for tensor in tensors:
            offset = self._file.seek(0, 2)
            self._file.write(_raw(tensor.detach().contiguous()))
            entries.append((offset, tensor.dtype, tensor.shape))
        self._index[key] = entries

    def get(self, key: object) -> tuple[list[Tensor], None]:
        tensors = []
        for offset, dtype, shape in self._index[key]:
            tensor = torch.empty(shape, dtype=dtype)
            self._file.seek(offset)
            raw = _raw(tensor)
            if self._file.readinto(raw) != len(raw):
                raise ModelError(f"the file of moved-out weights lost block {key}: is the disk of TMPDIR full?")
            tensors.append(tensor)
        return tensors, None


def _raw(tensor: Tensor) -> memoryview:
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


class _PinnedStore:
    """Tensors in pinned host memory; ``get`` starts their copy on a side stream and returns the event of its end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._tensors: dict[object, list[Tensor]] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._tensors

    def put(self, key: object, tensors: Iterable[Tensor]) -> None:
        self._tensors[key] = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t.detach()) for t in tensors]

    def get(self, key: object) -> tuple[list[Tensor], torch.cuda.Event]:
        with torch.cuda.stream(self.stream):
            tensors = [t.to(self._device, non_blocking=True) for t in self._tensors[key]]
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self.stream)
        return tensors, event


# --- Blocks ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Copy:
    """A copy on its way to the device: which precision, its tensors, and the events that end it (none on CPU)."""

    bits: int
    weights: list[Tensor]
    rest: list[Tensor] | None
    events: list[torch.cuda.Event]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.weights) + sum(t.nbytes for t in self.rest or [])

    def whole(self) -> bool:
        return all(event.query() for event in self.events)  # type: ignore[no-untyped-call]


class Block:
    """One MHA or FFN block: the parameters of its norm, biases and linear layers, resident or stored."""

    def __init__(self, name: str, modules: Sequence[nn.Module], store: _DiskStore | _PinnedStore) -> None:
        self.name = name
        self.bits = 16
        self.pending: _Copy | None = None
        self._store = store
        self.linears: list[ElasticLinear] = []
        self._rest: list[nn.Parameter] = []
        for module in (inner for outer in modules for inner in outer.modules()):
            if isinstance(module, nn.Linear):
                module.__class__ = ElasticLinear  # in place: the module tree stays the model's own
                assert isinstance(module, ElasticLinear)
                self.linears.append(module)
                if module.bias is not None:
                    self._rest.append(module.bias)
            else:
                self._rest.extend(parameter for parameter in module.parameters(recurse=False))
        for parameter in (*self._rest, *(linear.weight for linear in self.linears)):
            parameter.requires_grad_(False)
            # A parameter may be a view into the mapped checkpoint, which would stay whole while one view lives.
            parameter.data = parameter.data.clone()
        self._shapes = [linear.weight.shape for linear in self.linears]
        if isinstance(store, _PinnedStore):
            self._store_full()

    @property
    def nbytes(self) -> int:
        """Bytes on the device, those of a copy on its way included."""
        total = sum(parameter.nbytes for parameter in self._rest)
        for linear in self.linears:
            total += linear.weight.nbytes + (linear.quantized.nbytes if linear.quantized is not None else 0)
        return total + (self.pending.nbytes if self.pending is not None else 0)

    def _key(self, part: int | str) -> tuple[str, int | str]:
        return self.name, part

    def _store_full(self) -> None:
        if self._key("rest") not in self._store:
            self._store.put(self._key("rest"), [parameter.data for parameter in self._rest])
            self._store.put(self._key(16), [linear.weight.data for linear in self.linears])

    def prepare(self, bits: int) -> None:
        """Make the stored copy of so many bits, unless there is one."""
        self._store_full()
        if self._key(bits) in self._store:
            return
        if self.bits == 16:
            full = [linear.weight.data for linear in self.linears]
        else:
            full, event = self._store.get(self._key(16))
            if event is not None:
                event.synchronize()
        copies = [quantize(weight, bits) for weight in full]
        self._store.put(self._key(bits), [tensor for copy in copies for tensor in copy.tensors])

    def want(self, bits: int) -> None:
        """Start what brings the block to ``bits``; ABSENT takes effect at once."""
        if bits == ABSENT:
            self.pending = None
            if self.bits != ABSENT:
                self._store_full()
                self._free_weights()
                for parameter in self._rest:
                    parameter.data = parameter.data.new_empty(0)
                self.bits = ABSENT
            return
        if bits == self.bits:
            self.pending = None
            return
        if self.pending is not None and self.pending.bits == bits:
            return
        self.prepare(bits)
        weights, event = self._store.get(self._key(bits))
        rest, rest_event = (None, None) if self.bits != ABSENT else self._store.get(self._key("rest"))
        self.pending = _Copy(bits, weights, rest, [e for e in (event, rest_event) if e is not None])

    def join(self, wait: bool) -> None:
        """Put a copy that has arrived in its place; ``wait`` for one that has not."""
        copy = self.pending
        if copy is None or not (wait or copy.whole()):
            return
        for event in copy.events:
            torch.cuda.current_stream().wait_event(event)
        if copy.events:
            for tensor in (*copy.weights, *(copy.rest or [])):
                tensor.record_stream(torch.cuda.current_stream())
        self._free_weights()
        if copy.rest is not None:
            for parameter, tensor in zip(self._rest, copy.rest, strict=True):
                parameter.data = tensor
        if copy.bits == 16:
            for linear, tensor in zip(self.linears, copy.weights, strict=True):
                linear.weight.data = tensor
        else:
            for index, (linear, shape) in enumerate(zip(self.linears, self._shapes, strict=True)):
                packed, scales, zeros = copy.weights[3 * index : 3 * index + 3]
                linear.quantized = QuantWeight(copy.bits, shape[0], shape[1], packed, scales, zeros)
        self.bits = copy.bits
        self.pending = None

    def _free_weights(self) -> None:
        for linear in self.linears:
            linear.weight.data = linear.weight.data.new_empty(0)
            linear.quantized = None


# --- The model -------------------------------------------------------------------------------------------------------


class ElasticModel:
    """A Hugging Face causal model that runs whatever a Plan says. The model given is changed in place."""

    def __init__(self, model: Any, *, name: str = "", stage: Stage = "both") -> None:
        """Take over a model.

        Args:
            model: a causal language model of a family in FAMILIES, loaded and in evaluation mode.
            name: what to call it; its config's own name when empty.
            stage: whether this replica does prefill, decode or both, which decides what has to be resident.
        Raises:
            ModelError: for another family; the message says which there are and what was looked for.
        """
        config = model.config
        family = FAMILIES.get(config.model_type)
        if family is None:
            raise ModelError(
                f"model family {config.model_type!r} is not supported; {nearest(config.model_type, FAMILIES)}. "
                f"Looked for a stack of layers at model.{_LLAMA.stack}.layers, each with {_LLAMA.mha_norm}, "
                f"{_LLAMA.attention}, {_LLAMA.ffn_norm} and mlp; if it has them, add it to hw.elastic.model.FAMILIES "
                "and sim.cost.model_spec"
            )
        self._family = family
        self._model = model.eval()
        self._stack: Any = _part(model, family.stack, config.model_type)
        self._layers: Any = _part(self._stack, "layers", config.model_type)
        self._final_norm: Any = _part(self._stack, family.final_norm, config.model_type)
        parameter = next(model.parameters())
        self.device: torch.device = parameter.device
        self.dtype: torch.dtype = parameter.dtype
        described = {**config.to_dict(), "dtype": str(self.dtype)}
        self.spec: ModelSpec = model_from_hf_config(described, name)
        model.set_attn_implementation("sdpa")  # eager attention reads a mask as numbers to add
        self._store = _PinnedStore(self.device) if self.device.type == "cuda" else _DiskStore()
        self._attention = [_part(layer, family.attention, config.model_type) for layer in self._layers]
        self._norms = {
            kind: [_part(layer, norm, config.model_type) for layer in self._layers]
            for kind, norm in (("mha", family.mha_norm), ("ffn", family.ffn_norm))
        }
        self._ffn = [[_part(layer, part, config.model_type) for part in family.ffn] for layer in self._layers]
        self._windows = [_sliding_window(config, layer) for layer in range(self.spec.num_layers)]
        self.blocks: dict[Kind, list[Block]] = {
            "mha": [
                Block(f"MHA{i}", (norm, attention), self._store)
                for i, (norm, attention) in enumerate(zip(self._norms["mha"], self._attention, strict=True))
            ],
            "ffn": [
                Block(f"FFN{i}", (norm, *ffn), self._store)
                for i, (norm, ffn) in enumerate(zip(self._norms["ffn"], self._ffn, strict=True))
            ],
        }
        inside = {id(p) for layer in self._layers for p in layer.parameters()}
        self._fixed = [p for p in model.parameters() if id(p) not in inside]  # parameters() gives tied ones once
        self._stage: Stage = stage
        self.plan: Plan = dense_plan(self.spec)
        if self.bytes() != self._expected_dense_bytes():
            raise ModelError(
                f"{self.spec.name} holds {self.bytes():,} bytes of parameters, its config describes "
                f"{self._expected_dense_bytes():,}: it has parts that sim.cost.model_spec.ModelSpec does not know"
            )

    def _expected_dense_bytes(self) -> int:
        return self.spec.total_params * self.spec.weight_dtype_bytes

    # --- Plans

    def apply(self, plan: Plan, *, wait: bool = True) -> None:
        """Make ``plan`` what runs from the next forward on.

        What it drops leaves at once. What it brings is copied in from the store; with ``wait=False`` on CUDA the copies
        run on a side stream, and each block joins at the first forward after its copy is whole. Until then a block that
        was absent stays bypassed, and one that changes precision runs as before.

        Raises:
            PlanError: if the plan is not legal for the model.
        """
        check_plan(self.spec, plan)
        keep = resident_mask(plan, self._stage)
        for kind in KINDS:
            kept = keep.mha if kind == "mha" else keep.ffn
            for block, bits, keeps in zip(self.blocks[kind], plan.weight_bits, kept, strict=True):
                block.want(bits if keeps else ABSENT)
                block.join(wait)
        self.plan = plan

    def prepare(self, bits: Iterable[int]) -> None:
        """Make and store the quantised copies of all blocks ahead of time, so that no ``apply`` has to."""
        for count in bits:
            for kind in KINDS:
                for block in self.blocks[kind]:
                    block.prepare(count)

    def ready(self) -> bool:
        """Let copies that have arrived join; return whether the whole plan now runs."""
        blocks = [block for kind in KINDS for block in self.blocks[kind]]
        for block in blocks:
            block.join(wait=False)
        return all(block.pending is None for block in blocks)

    @property
    def copy_stream(self) -> torch.cuda.Stream | None:
        """The stream on which weights come back; None on a CPU, where whoever asks copies them itself."""
        return self._store.stream if isinstance(self._store, _PinnedStore) else None

    def bytes(self) -> int:
        """Bytes of the weights on the device: ``sim.cost.memory.weight_bytes`` of the plan, once all copies have joined."""
        blocks = sum(block.nbytes for kind in KINDS for block in self.blocks[kind])
        fixed: int = sum(parameter.nbytes for parameter in self._fixed)
        return fixed + blocks

    def running(self, stage: Literal["prefill", "decode"]) -> KeepMask:
        """Return the blocks that a forward of this stage runs now: those of the plan that are on the device."""
        mask = self.plan.prefill if stage == "prefill" else self.plan.decode
        return KeepMask(
            mha=tuple(k and b.bits != ABSENT for k, b in zip(mask.mha, self.blocks["mha"], strict=True)),
            ffn=tuple(k and b.bits != ABSENT for k, b in zip(mask.ffn, self.blocks["ffn"], strict=True)),
        )

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
        """Run new tokens, one row a request; return the logits of each row's last token, [b, vocabulary].

        Args:
            tokens: the new tokens of each row; rows may differ in length.
            requests: the KV of each row, which this grows; None runs rows on their own and keeps nothing.
            stage: which mask of the plan runs. A prompt may come in several calls of prefill.
            all_logits: return [b, t, vocabulary] instead; those of padding tokens mean nothing.
        Raises:
            PlanError: for an unknown stage, an empty row, or another number of requests than rows.
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
        hidden = self.run(padded, positions, running, view)
        if requests is not None:
            for request, length in zip(requests, lengths, strict=True):
                request.tokens += length
        if not all_logits:
            last = torch.tensor(lengths, device=self.device) - 1
            hidden = hidden[torch.arange(len(rows), device=self.device), last]
        return self.head(hidden)

    def end_prefill(self, request: RequestKV) -> None:
        """Say that a prompt is complete: KV that decode does not need goes, and so does what ``kv_keep`` leaves out."""
        request.restrict(frozenset(i for i, keep in enumerate(self.plan.decode.mha) if keep))
        request.end_prefill(self.plan.kv_keep)

    def run(self, tokens: Tensor, positions: Tensor, running: KeepMask, view: KVView | None) -> Tensor:
        """Return the hidden states [b, t, e] after the last layer, for tokens and positions [b, t]."""
        hidden = self.embed(tokens, positions)
        rope = self.rope(hidden, positions)
        for layer in range(self.spec.num_layers):
            if running.mha[layer]:
                hidden = self._attend_rows(layer, hidden, rope, view)
            if running.ffn[layer]:
                hidden = hidden + self.feed(layer, hidden)
        return hidden

    def _attend_rows(
        self, layer: int, hidden: Tensor, rope: tuple[Tensor, Tensor] | None, view: KVView | None
    ) -> Tensor:
        rows = view.rows(layer) if view is not None else None
        if rows is None:
            return hidden + self.attend(layer, hidden, rope, view)
        if not rows.numel():
            return hidden
        some = (rope[0][rows], rope[1][rows]) if rope is not None else None
        return hidden.index_add(0, rows, self.attend(layer, hidden[rows], some, view))

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the hidden states [b, t, e] before the first layer."""
        hidden: Tensor = self._stack.embed_tokens(tokens)
        if self.spec.learned_positions:
            mask = torch.ones_like(tokens)
            hidden = hidden + self._stack.embed_positions(mask, position_ids=positions)
        return hidden

    def rope(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the rotary embeddings of positions [b, t]; None where positions are learned."""
        if self.spec.learned_positions:
            return None
        cos, sin = self._stack.rotary_emb(hidden, position_ids=positions)
        return cos, sin

    def attend(
        self, layer: int, hidden: Tensor, rope: tuple[Tensor, Tensor] | None, view: KVView | None = None
    ) -> Tensor:
        """Return what the MHA block of a layer adds to ``hidden``; causal over the given tokens without a view."""
        window = self._windows[layer]
        mask = None
        if view is not None:
            mask = view.mask(layer, window)
        elif window is not None and window < hidden.shape[1]:
            mask = _causal(hidden.shape[1], window, hidden.device)
        arguments = {"position_embeddings": rope} if rope is not None else {}
        output: Tensor = self._attention[layer](
            hidden_states=self._norms["mha"][layer](hidden), attention_mask=mask, past_key_values=view, **arguments
        )[0]
        return output

    def attend_paged(self, layer: int, hidden: Tensor, rope: tuple[Tensor, Tensor] | None, pages: Any) -> Tensor:
        """Return what the MHA block of a layer adds to ``hidden`` where ``pages`` (hw.elastic.paged_attention) holds the KV.

        Only after ``use_attention`` was told the name under which the paged attention is registered.
        """
        arguments = {"position_embeddings": rope} if rope is not None else {}
        output: Tensor = self._attention[layer](
            hidden_states=self._norms["mha"][layer](hidden),
            attention_mask=None,
            past_key_values=pages,
            pages=pages,
            **arguments,
        )[0]
        return output

    def use_attention(self, name: str) -> None:
        """Let the model's own modules call the attention registered under a name; ``sdpa`` is what they begin with."""
        self._model.set_attn_implementation(name)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The tokens that each layer's attention looks back; None where it sees all."""
        return tuple(self._windows)

    def feed(self, layer: int, hidden: Tensor) -> Tensor:
        """Return what the FFN block of a layer adds to ``hidden``."""
        normed = self._norms["ffn"][layer](hidden)
        parts = self._ffn[layer]
        if len(parts) == 2:
            normed = self._layers[layer].activation_fn(parts[0](normed))
        output: Tensor = parts[-1](normed)
        return output

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states, the final norm included."""
        logits: Tensor = self._model.lm_head(self.normed(hidden))
        return logits

    def normed(self, hidden: Tensor) -> Tensor:
        """Return hidden states after the final norm, as the head sees them."""
        output: Tensor = self._final_norm(hidden)
        return output

    def head_weight(self) -> Tensor:
        """Return the weights of the head, [vocabulary, e]."""
        weight: Tensor = self._model.lm_head.weight
        return weight

    @torch.inference_mode()
    def attention_weights(self, tokens: Tensor) -> list[Tensor]:
        """Return the attention of every layer of the dense model, [b, heads, t, t] each."""
        positions = torch.arange(tokens.shape[1], device=self.device)[None]
        hidden = self.embed(tokens, positions)
        rope = self.rope(hidden, positions)
        arguments = {"position_embeddings": rope} if rope is not None else {}
        weights = []
        try:
            for layer in range(self.spec.num_layers):
                seen = _causal(tokens.shape[1], self._windows[layer], self.device)
                numbers = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
                numbers.masked_fill_(~seen, torch.finfo(self.dtype).min)
                self._model.set_attn_implementation("eager")  # the only one that shows its weights
                normed = self._norms["mha"][layer](hidden)
                added, shares = self._attention[layer](hidden_states=normed, attention_mask=numbers, **arguments)
                weights.append(shares)
                hidden = hidden + added
                hidden = hidden + self.feed(layer, hidden)
        finally:
            self._model.set_attn_implementation("sdpa")
        return weights


def _causal(tokens: int, window: int | None, device: torch.device) -> Tensor:
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    return (seen if window is None else seen.triu(1 - window))[None, None]


def _part(module: Any, path: str, family: str) -> Any:
    for name in path.split("."):
        found = getattr(module, name, None)
        if found is None:
            raise ModelError(
                f"a {family} model was expected to have {path!r} in {type(module).__name__}, which lacks {name!r}; "
                "hw.elastic.model knows the classes of transformers 5"
            )
        module = found
    return module


def _sliding_window(config: Any, layer: int) -> int | None:
    """Return the tokens that a layer's attention looks back; None where it sees all."""
    window: int | None = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    return None if types is not None and types[layer] != "sliding_attention" else window
