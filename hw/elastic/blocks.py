"""MHA and FFN blocks of a real model whose weights can be freed, restored, or swapped for quantized copies.

A block's weights are resident (on the device, in the matrices of ``hw.elastic.layers``) or only stored. On CUDA the
store is pinned host memory, and a side stream copies from it. On a CPU, host and device memory are the same, so the
store is an unlinked file on disk; otherwise dropping a block would free no memory. A block is stored when it is first
dropped, cut or quantized, or ahead of that by ``prepare``. FFN blocks are cut as ``hw.elastic.ffn_channels`` says.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hw.elastic.device import Accelerator, Event
from hw.elastic.device_memory import out_of_memory
from hw.elastic.ffn_channels import FFNChannels
from hw.elastic.layers import Matrix, Rows
from hw.elastic.quantize import ElasticLinear, QuantWeight, quantize
from sim.cost.ffn_width import FULL_WIDTH
from sim.errors import ModelError

Kind = Literal["mha", "ffn"]
KINDS: tuple[Kind, Kind] = ("mha", "ffn")
ABSENT = 0
"""The ``bits`` of a block whose weights are not resident."""
ALIGNMENT = 512
"""Bytes to whose multiples tensors in pinned memory are aligned, as the allocator of the device aligns them."""
LEAST_ARENA_BYTES, MOST_ARENA_BYTES = 1 << 20, 1 << 30


class Store(Protocol):
    """Tensors by key, off the device. nbytes: of the memory, or of the file, that holds them."""

    nbytes: int

    def __contains__(self, key: object) -> bool:
        """Return whether there are tensors under a key."""
        ...

    def put(self, key: object, tensors: Iterable[Tensor]) -> None:
        """Store tensors under a key."""
        ...

    def get(self, key: object) -> tuple[list[Tensor], list[Event]]:
        """Start to copy the tensors of a key to the device; return the copies and the events of their end."""
        ...

    def shapes(self, key: object) -> list[Tensor]:
        """Return tensors without content, of the type and shape of those under a key."""
        ...

    def load(self, key: object, targets: Sequence[Tensor]) -> list[Event]:
        """Start to copy the tensors of a key over tensors of the device, after all work started before."""
        ...

    def join(self, events: Iterable[Event], tensors: Sequence[Tensor]) -> None:
        """Let what is computed from now on wait for a copy."""
        ...


class DiskStore:
    """Tensors by key in an unlinked temporary file; the store of a CPU, where host memory is what has to be freed."""

    def __init__(self) -> None:
        """Open the file, in TMPDIR; it is gone when the process ends."""
        self.nbytes = 0
        self._writing = Lock()
        self._file = tempfile.TemporaryFile(prefix="rap-lab-weights-")  # noqa: SIM115 - lives as long as the store
        self._index: dict[object, list[tuple[int, torch.dtype, torch.Size]]] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._index

    def put(self, key: object, tensors: Iterable[Tensor]) -> None:
        """Store tensors under a key; several threads may do so at the same time.

        Raises:
            ModelError: if the disk has no room for them.
        """
        entries = []
        try:
            with self._writing:
                for tensor in tensors:
                    offset = self._file.seek(0, 2)
                    self._file.write(_raw(tensor.detach().contiguous()))
                    entries.append((offset, tensor.dtype, tensor.shape))
                    self.nbytes += tensor.nbytes
                self._file.flush()
        except OSError as error:
            raise ModelError(
                f"the weights do not fit into the temporary folder {tempfile.gettempdir()} ({error.strerror}); free "
                "space there, or set TMPDIR to another folder"
            ) from error
        self._index[key] = entries

    def get(self, key: object) -> tuple[list[Tensor], list[Event]]:
        """Read the tensors of a key; they are complete at once.

        Raises:
            ModelError: if the file is shorter than what was written.
        """
        tensors = [torch.empty(shape, dtype=dtype) for _, dtype, shape in self._index[key]]
        return tensors, self.load(key, tensors)

    def shapes(self, key: object) -> list[Tensor]:
        """Return tensors without content."""
        return [torch.empty(shape, dtype=dtype, device="meta") for _, dtype, shape in self._index[key]]

    def load(self, key: object, targets: Sequence[Tensor]) -> list[Event]:
        """Read the tensors of a key; they are complete at once. Several threads may read at the same time.

        Raises:
            ModelError: if the file is shorter than what was written.
        """
        for (offset, _, _), target in zip(self._index[key], targets, strict=True):
            left = _raw(target)
            while len(left):
                count = os.preadv(self._file.fileno(), [left], offset)
                if count == 0:
                    raise ModelError(
                        f"the file of stored weights ends within block {key}; free space in TMPDIR, or set another "
                        "TMPDIR"
                    )
                left, offset = left[count:], offset + count
        return []

    def join(self, events: Iterable[Event], tensors: Sequence[Tensor]) -> None:
        """Do nothing: what ``get`` returned is complete."""


def _raw(tensor: Tensor) -> memoryview:
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


class PinnedStore:
    """Tensors by key in pinned host memory; the store of an accelerator.

    The allocator of pinned memory rounds each size up to a power of two. An FFN block of Llama-2-7B has 258 MiB, so
    alone it would take 512 MiB. Tensors therefore lie one after another in large arenas, whose sizes are such powers.
    """

    def __init__(self, device: Accelerator) -> None:
        """Store tensors of this device."""
        self.nbytes = 0
        self._device = device
        self._arenas: list[tuple[Tensor, int]] = []  # each with the bytes that are used
        self._tensors: dict[object, list[Tensor]] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._tensors

    def put(self, key: object, tensors: Iterable[Tensor]) -> None:
        """Store tensors under a key."""
        self._tensors[key] = [self._place(tensor.detach()) for tensor in tensors]

    def get(self, key: object) -> tuple[list[Tensor], list[Event]]:
        """Start to copy the tensors of a key to the device."""
        tensors, event = self._device.copy_in(self._tensors[key])
        return tensors, [event]

    def shapes(self, key: object) -> list[Tensor]:
        """Return the stored tensors themselves."""
        return self._tensors[key]

    def load(self, key: object, targets: Sequence[Tensor]) -> list[Event]:
        """Start to copy the tensors of a key over tensors of the device, after all work started before."""
        return [self._device.copy_over(self._tensors[key], targets)]

    def join(self, events: Iterable[Event], tensors: Sequence[Tensor]) -> None:
        """Let what is computed from now on wait for a copy."""
        for event in events:
            self._device.join(event, tensors)

    def _place(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor in pinned memory."""
        size = tensor.nbytes
        at = next((i for i, (arena, used) in enumerate(self._arenas) if used + size <= len(arena)), None)
        if at is None:
            # As much again as there is so far: a small model takes little, and a large one has few arenas.
            least = min(max(self.nbytes, LEAST_ARENA_BYTES), MOST_ARENA_BYTES)
            self._arenas.append((self._device.pinned(1 << (max(size, least) - 1).bit_length()), 0))
            at = len(self._arenas) - 1
            self.nbytes += len(self._arenas[at][0])
        arena, start = self._arenas[at]
        self._arenas[at] = arena, -(-(start + size) // ALIGNMENT) * ALIGNMENT
        return arena[start : start + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)


@dataclass(slots=True)
class PendingCopy:
    """A copy to the device that is under way.

    bits: its precision. weights: of the matrices. rest: norms and biases; None if they are resident already.
    events: mark its completion; none on a CPU. width: of an FFN block after it, in eighths of the channels; of one that
    is resident at these bits, the weights are those of the channels that it lacks.
    """

    bits: int
    weights: list[Tensor]
    rest: list[Tensor] | None
    events: list[Event]
    width: int = FULL_WIDTH

    @property
    def nbytes(self) -> int:
        """Bytes that the copy takes on the device."""
        return sum(t.nbytes for t in self.weights) + sum(t.nbytes for t in self.rest or [])

    def complete(self) -> bool:
        """Return whether the copy is complete."""
        return all(event.query() for event in self.events)


class Block:
    """One MHA or FFN block: its matrices, biases and norms, resident or stored.

    bits: precision of the resident weights; ABSENT if there are none. width: of an FFN block, how many eighths of its
    channels are resident; all while it is absent. pending: the copy under way, if any. version: how often the resident
    weights have moved to other addresses. channels: of an FFN block, once they are in order of importance.
    """

    def __init__(self, name: str, matrices: Sequence[Matrix], rest: Sequence[Rows], store: Store) -> None:
        """Take over the matrices of a block, and its biases and norms; ``store`` keeps what is not resident."""
        self.name = name
        self.bits, self.width = 16, FULL_WIDTH
        self.version = 0
        self.channels: FFNChannels | None = None
        self.pending: PendingCopy | None = None
        self._store = store
        self.matrices = tuple(matrices)
        self._rest = tuple(rest)
        self._lent = False

    @property
    def linears(self) -> list[ElasticLinear]:
        """The linear layers of the Hugging Face model, whose weights are rows of the matrices."""
        return [linear for matrix in self.matrices for linear in matrix.linears]

    @property
    def nbytes(self) -> int:
        """Bytes on the device, including those of a copy under way."""
        return self.resident_bytes + (self.pending.nbytes if self.pending is not None else 0)

    @property
    def resident_bytes(self) -> int:
        """Bytes on the device that run and are its own."""
        if self._lent:
            return 0
        extra = self.channels.extra_bytes if self.channels is not None else 0
        return extra + sum(rows.nbytes for rows in self._rest) + sum(matrix.nbytes for matrix in self.matrices)

    def _key(self, part: object) -> tuple[str, bool, object]:
        return self.name, self.channels is not None, part

    def keys(self, bits: int) -> tuple[object, object]:
        """Return the keys under which its weights at ``bits``, and its norms and biases, are stored."""
        return self._key(bits), self._key("rest")

    def _store_full(self) -> None:
        if self._key("rest") not in self._store:
            self._store.put(self._key("rest"), [rows.value for rows in self._rest])
            self._store.put(self._key(16), [matrix.weight.value for matrix in self.matrices])

    def prepare_for(self, wanted: Collection[int]) -> None:
        """Store all copies that are needed to go from one of some states to any other of them.

        wanted: precisions, and ABSENT. A block that stays as it is needs none.
        """
        if set(wanted) != {self.bits}:
            self._store_full()
            for bits in wanted:
                if bits != ABSENT:
                    self.prepare(bits)

    def prepare(self, bits: int) -> None:
        """Store the copy at ``bits``, unless it is stored already."""
        self._store_full()
        if self._key(bits) in self._store:
            return
        if self.bits == 16 and self.width == FULL_WIDTH:
            full = [matrix.weight.value for matrix in self.matrices]
        else:
            full, events = self._store.get(self._key(16))
            self._store.join(events, full)
        copies = [quantize(weight, bits) for weight in full]
        self._store.put(self._key(bits), [tensor for copy in copies for tensor in copy.tensors])

    def read(self, *, half: bool) -> None:
        """Read half of the bits of its weights from now on, or all; nothing is copied."""
        for matrix in self.matrices:
            if matrix.half != half:
                matrix.read(half=half)

    def order(self, order: Tensor | None, mean: Tensor | None) -> None:
        """Put the channels of an FFN block at full precision in order of importance, as ``FFNChannels`` takes them."""
        assert (self.bits, self.width, self.pending) == (16, FULL_WIDTH, None)
        up, down = self.matrices
        self.channels = FFNChannels(up, down, order, mean)  # from now on, other keys of the store
        self.version += 1

    def prepare_forms(self, forms: Collection[tuple[int, int]]) -> None:
        """Store all that is needed to go from one of some (bits, width) of an FFN block to any other of them."""
        for have in (*forms, (self.bits, self.width)):
            for bits, width in forms:
                # A block is first cut, then copied: it has no more channels than it shall have.
                if bits != ABSENT and (bits, width) != (have[0], min(have[1], width)):
                    self._stored(bits, width, have[0], min(have[1], width))

    def _stored(self, bits: int, width: int, held_bits: int, held_width: int) -> object:
        """Return the key of what a block that holds some channels at some bits needs to hold others."""
        first = held_width if held_bits == bits else 0
        if not first and width == FULL_WIDTH:
            self.prepare(bits)
            return self._key(bits)
        key = self._key((bits, first, width))
        if key not in self._store:
            assert self.channels is not None
            self.prepare(bits)
            full, events = self._store.get(self._key(bits))
            self._store.join(events, full)
            per = len(full) // len(self.matrices)
            parts = [
                self.channels.part(index, full[per * index : per * (index + 1)], bits, FULL_WIDTH, first, width)
                for index in range(len(self.matrices))
            ]
            self._store.put(key, [tensor for part in parts for tensor in part])
        return key

    def narrow(self, width: int) -> None:
        """Free the channels that a smaller width of a resident FFN block lacks, at once.

        Where the device has no memory for those that stay as long as it holds all of them, they go by the host.
        """
        if width >= self.width:
            return
        self._store_full()
        place = self.matrices[0].tensors[0].device
        try:
            left = self._prefix(width, place)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            left = []
        left = left or self._prefix(width, torch.device("cpu"))  # outside of ``except``, whose traceback holds tensors
        self._free_weights()
        left = [tensor.to(place) for tensor in left]
        self._set(self.bits, left, None, width, self._biases(width, place))
        self.width = width

    def _prefix(self, width: int, place: torch.device) -> list[Tensor]:
        """Return the weights of the channels of a smaller width, made on a device or on the host."""
        assert self.channels is not None
        return [
            tensor
            for index, matrix in enumerate(self.matrices)
            for tensor in self.channels.part(
                index, [tensor.to(place) for tensor in matrix.tensors], self.bits, self.width, 0, width
            )
        ]

    def _biases(self, width: int, place: torch.device) -> list[Tensor | None] | None:
        """Return the biases of another width than the present one; None if it is the present one."""
        return None if self.channels is None or width == self.width else self.channels.biases(width, place)

    def _widened(self, copy: PendingCopy) -> list[Tensor]:
        """Return the weights with the channels that have arrived behind those that are resident."""
        assert self.channels is not None
        per = len(copy.weights) // len(self.matrices)
        return [
            tensor
            for index, matrix in enumerate(self.matrices)
            for tensor in self.channels.joined(
                index,
                matrix.tensors,
                copy.weights[per * index : per * (index + 1)],
                self.bits,
                self.width,
                copy.width,
            )
        ]

    def want(self, bits: int, width: int = FULL_WIDTH) -> None:
        """Start the copy that brings the block to ``bits``, and an FFN block to ``width`` eighths of its channels.

        ABSENT frees the weights at once, and so does a smaller width those of the channels that it lacks.
        """
        if bits == ABSENT:
            self.pending = None
            if self.bits != ABSENT:
                self._store_full()
                self._free_weights()
                self._forget_width()
                for rows in self._rest:
                    rows.free()
                self.bits = ABSENT
            return
        if self.bits != ABSENT and width < self.width:
            self.narrow(width)
        if (bits, width) == (self.bits, self.width):
            self.pending = None
            return
        if self.pending is not None and (self.pending.bits, self.pending.width) == (bits, width):
            return
        weights, events = self._store.get(self._stored(bits, width, self.bits, self.width))
        rest, rest_events = (None, []) if self.bits != ABSENT else self._store.get(self._key("rest"))
        self.pending = PendingCopy(bits, weights, rest, events + rest_events, width)

    def _forget_width(self) -> None:
        """Expect all channels again, and the biases of them."""
        if self.channels is not None and self.width != FULL_WIDTH:
            self.channels.resize(FULL_WIDTH)
            self.channels.forget_biases()
            self.width = FULL_WIDTH

    def join(self, wait: bool) -> None:
        """Let a complete copy take effect; with ``wait``, also one that is still under way."""
        copy = self.pending
        if copy is None or not (wait or copy.complete()):
            return
        self._store.join(copy.events, (*copy.weights, *(copy.rest or ())))
        self.take_back()  # what a pass that failed has left
        weights = self._widened(copy) if copy.bits == self.bits else copy.weights
        biases = self._biases(copy.width, weights[0].device)
        self._free_weights()  # all memory is there: nothing fails from now on
        self._set(copy.bits, weights, copy.rest, copy.width, biases)
        self.bits, self.width = copy.bits, copy.width
        self.pending = None

    def lend(self, bits: int, weights: Sequence[Tensor], rest: Sequence[Tensor]) -> None:
        """Let an absent block run from tensors that are not its own, until ``take_back``; it stays absent."""
        assert self.bits == ABSENT
        self._lent = True
        self._set(bits, weights, rest)

    def take_back(self) -> None:
        """End what ``lend`` began, if it has not ended."""
        if not self._lent:
            return
        self._lent = False
        for matrix in self.matrices:
            matrix.free()
        for rows in self._rest:
            rows.free()

    def _set(
        self,
        bits: int,
        weights: Sequence[Tensor],
        rest: Sequence[Tensor] | None,
        width: int = FULL_WIDTH,
        biases: Sequence[Tensor | None] | None = None,
    ) -> None:
        """Take tensors as the block's values; None leaves norms and biases as they are. biases: of another width."""
        if rest is not None:
            for rows, tensor in zip(self._rest, rest, strict=True):
                rows.set(tensor)
        if self.channels is not None and biases is not None:
            self.channels.resize(width)
            self.channels.set_biases(biases)
        for index, matrix in enumerate(self.matrices):
            if bits == 16:
                matrix.weight.set(weights[index])
                matrix.read(half=matrix.half)
            else:
                packed, scales, zeros = weights[3 * index : 3 * index + 3]
                matrix.quantize(QuantWeight(bits, *matrix.shape, packed, scales, zeros))

    def _free_weights(self) -> None:
        self.version += 1
        for matrix in self.matrices:
            matrix.free()
