"""A device whose tensors have shapes and no content: what a pass of a large model starts, moves and takes for a moment.

    device = MetaDevice()
    elastic = meta_model("llama2_7b", device)
    with Operations(device) as seen:
        ...                                         # seen.launches, seen.waits, seen.moved_bytes, seen.peak_bytes

Kernels of this package are only counted on it (hw/elastic/kernels/launch.py).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hw.elastic.device import Accelerator, Event
from hw.elastic.model import ElasticModel
from hw.elastic.quantize import quantize
from hw.elastic.virtual_memory import AddressRange
from sim.cost.model_spec import ModelSpec, load_model

META = torch.device("meta")
_NO_LAUNCH = ("aten.empty", "aten.new_empty", "aten.detach", "aten._unsafe_view", "aten.lift_fresh")
"""Operations that allocate or view, and start nothing on a GPU."""
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select")
_PICKS_ROWS = ("aten.embedding", "aten.index_select", "aten.index.Tensor", "aten.gather")


class _Range(AddressRange):
    def __init__(self, size: int) -> None:
        self.tensor = torch.empty(size, dtype=torch.uint8, device=META)
        self._backed_bytes = 0

    @property
    def backed_bytes(self) -> int:
        return self._backed_bytes

    def back(self, size: int) -> None:
        self._backed_bytes = size


class _Done:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Do nothing."""

    def elapsed_time(self, end: Any, /) -> float:
        return 1.0


class MetaDevice(Accelerator):
    """A device without memory.

    uploads, uploaded_bytes: asynchronous copies from pinned memory. waits: how often the host waited.
    """

    place = META

    def __init__(self) -> None:
        self.uploads = self.uploaded_bytes = self.waits = 0

    @property
    def name(self) -> str:
        return "a device without memory"

    def synchronize(self) -> None:
        self.waits += 1

    def give_back(self) -> None:
        """Do nothing."""

    def in_use_bytes(self) -> int:
        return 0

    def take_peak_bytes(self) -> int:
        return 0

    def reserve(self, size: int) -> AddressRange:
        return _Range(size)

    def pinned(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8)

    def copy_in(self, stored: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        return [torch.empty_like(tensor, device=META) for tensor in stored], _Done()

    def copy_over(self, stored: Sequence[Tensor], targets: Sequence[Tensor]) -> Event:
        return _Done()

    def join(self, event: Event, tensors: Sequence[Tensor]) -> None:
        """Do nothing."""

    def mark(self) -> Event:
        return _Done()

    def timed(self, work: Callable[[], object], ahead_s: float = 0.0) -> tuple[float, float]:
        work()
        return 0.0, 0.0

    def limit(self, most_bytes: int | None) -> None:
        """Do nothing."""

    def upload(self, source: Tensor, target: Tensor) -> None:
        self.uploads += 1
        self.uploaded_bytes += source.nbytes

    def download(self, source: Tensor, target: Tensor) -> None:
        """Do nothing: no test here swaps."""

    def read(self, tensor: Tensor) -> Tensor:
        self.waits += 1
        return torch.ones(tensor.shape, dtype=tensor.dtype)

    def record(self, step: Callable[[], Tensor]) -> Any:
        raise AssertionError("tensors without memory have no addresses for a graph; set cuda_graphs=False")


def meta_model(name: str, device: MetaDevice, *, bits: int = 16, layers: int | None = None) -> ElasticModel:
    """Return a model of conf/model without weights, its linear layers at some precision."""
    return meta_model_of(_config(load_model(name), layers), device, bits=bits, name=name)


def meta_model_of(config: Any, device: MetaDevice, *, bits: int = 16, name: str = "") -> ElasticModel:
    """Return a model of a configuration of transformers without weights, its linear layers at some precision."""
    with META:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    elastic = ElasticModel(model, name=name, hardware=device)
    if bits != 16:
        for block in (*elastic.blocks["mha"], *elastic.blocks["ffn"]):
            for matrix in block.matrices:
                copy = quantize(matrix.weight.value, bits)
                matrix.free()
                matrix.quantize(copy)
            block.bits = bits
    return elastic


def _config(spec: ModelSpec, layers: int | None) -> Any:
    return transformers.LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=layers or spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        max_position_embeddings=spec.max_context_tokens,
        tie_word_embeddings=False,
    )


class Operations(TorchDispatchMode):
    """Counts what a pass does on a device without memory.

    launches: operations that a GPU would start, by name; views and allocations are none. waits: for the device.
    host_copies: between the device and memory of the host that is not pinned. moved_bytes: read and written, of the KV
    cache only ``kv_bytes`` for each call of decode. peak_bytes: the most that new tensors took at a time.
    """

    def __init__(self, device: MetaDevice, kv_bytes: int = 0) -> None:
        super().__init__()
        self._device, self._kv_bytes = device, kv_bytes
        self.launches: Counter[str] = Counter()
        self.host_copies = self.moved_bytes = self.live_bytes = self.peak_bytes = self._scalars = 0
        self._waits_before = self._uploaded_before = self._uploads_before = 0
        self._live: set[int] = set()

    def __enter__(self) -> Operations:
        from hw.elastic.kernels.launch import WATCHERS

        WATCHERS.append(self._kernel)
        device = self._device
        self._waits_before, self._uploads_before = device.waits, device.uploads
        self._uploaded_before = device.uploaded_bytes
        super().__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        from hw.elastic.kernels.launch import WATCHERS

        super().__exit__(kind, error, at)
        WATCHERS.remove(self._kernel)
        device = self._device
        self.waits = device.waits - self._waits_before + self._scalars
        self.uploads = device.uploads - self._uploads_before
        self.uploaded_bytes = device.uploaded_bytes - self._uploaded_before

    @property
    def total(self) -> int:
        """All launches."""
        return sum(self.launches.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [tensor for tensor in inputs if tensor.is_meta]
        if on_device and any(waits in name for waits in _WAITS):
            self._scalars += 1
        out = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        meta_out = [tensor for tensor in outputs if tensor.is_meta]
        if any(not tensor.is_meta and tensor.dim() for tensor in inputs) and (on_device or meta_out):
            self.host_copies += 1
        self._note_new(on_device, meta_out)
        views = any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)
        if (on_device or meta_out) and not views and not name.startswith(_NO_LAUNCH):
            self.launches[name] += 1
            read = [] if name.startswith(_PICKS_ROWS) else on_device
            written = meta_out * (2 if name.startswith(_PICKS_ROWS) else 1)
            self.moved_bytes += sum(tensor.nbytes for tensor in (*read, *written))
        return out

    def _note_new(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        for tensor in outputs:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in known or key in self._live:
                continue
            self._live.add(key)
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.live_bytes -= size

    def _kernel(self, name: str, values: Sequence[Any]) -> None:
        self.launches[name] += 1
        pool = 5  # dimensions
        tensors = [value for value in values if isinstance(value, Tensor) and value.dim() != pool]
        # A kernel that needs one tensor less may get another one twice.
        once = {(tensor.untyped_storage()._cdata, tensor.storage_offset()): tensor.nbytes for tensor in tensors}
        self.moved_bytes += sum(once.values())
        if name == "_decode_kernel":
            self.moved_bytes += self._kv_bytes
