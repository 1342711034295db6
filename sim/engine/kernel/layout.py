"""Arrays that Python and compiled code share, each declared once, as in sim/engine/kernel/state.py.

A `Layout` lists the arrays of one kind of state. A declaration states an array's name, its row type and its size. From
it follow the empty state, the snapshot, and the function by which compiled code accesses the array:

    REPLICA = Layout()
    counters_of = REPLICA.record("counters", COUNTERS)        # n = counters_of(s); n.clock += 1
    requests_of = REPLICA.array("requests", REQUEST, rows=0)  # requests_of(s)[r].computed_tokens

Compiled code receives a state as one argument, a `Table` of addresses. Functions with one argument call each other in
nanoseconds; with forty arrays as arguments, compilation would take many times longer.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic
from numba.np import arrayobj
from numpy.typing import NDArray

Table = NDArray[np.int64]
"""int64[arrays, 3]: address, rows and columns of each array of a state."""

Size = Callable[[Any], int] | int
"""A number of rows or columns, or a function that returns it for the sizes of one state."""

INT64, FLOAT64 = np.dtype(np.int64), np.dtype(np.float64)
_numba: Any = arrayobj  # Numba has no type annotations


@dataclass(frozen=True, slots=True)
class Declared:
    """One array of a state.

    row: its row of the table. dtype: type of a row of the array; every field has 8 bytes.
    rows, columns: its shape in an empty state; columns None is a one-dimensional array.
    saved: whether a snapshot copies the array.
    """

    row: int
    dtype: np.dtype[Any]
    rows: Size
    columns: Size | None
    saved: bool

    def shape(self, sizes: Any) -> list[int]:
        """Return the shape of the array in an empty state."""
        shape = [self.rows] if self.columns is None else [self.rows, self.columns]
        return [size if isinstance(size, int) else size(sizes) for size in shape]


class Layout:
    """The arrays of one kind of state, in the order of their declarations."""

    def __init__(self) -> None:
        self.arrays: dict[str, Declared] = {}

    def record(self, name: str, dtype: np.dtype[Any], *, saved: bool = False) -> Any:
        """Declare a single record; return the function by which compiled code accesses it.

        In compiled code the record is a bare pointer: reading a field is one load, without an index check.
        """
        row, record = self._declare(name, dtype, 1, None, saved).row, numba.from_dtype(dtype)

        def find(typing: Any, table: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                address, _, _ = _entry(context, builder, signature, arguments, row)
                return builder.inttoptr(address, context.get_value_type(record))

            return record(table), generate

        return _found_by(find, name)

    def array(
        self, name: str, dtype: Any = INT64, *, rows: Size = 0, columns: Size | None = None, saved: bool = False
    ) -> Any:
        """Declare an array; return the function by which compiled code accesses it."""
        declared = self._declare(name, np.dtype(dtype), rows, columns, saved)
        return _found_by(_finder(declared.row, declared.dtype, 1 if columns is None else 2), name)

    def words(self, name: str) -> Any:
        """Return a function by which compiled code accesses a declared array of records as int64[rows, fields].

        For copying records without naming their fields, for example between replicas; floats are copied bit by bit.
        """
        declared = self.arrays[name]
        return _found_by(_finder(declared.row, INT64, 2, columns=declared.dtype.itemsize // 8), f"{name}_words")

    def _declare(self, name: str, dtype: np.dtype[Any], rows: Size, columns: Size | None, saved: bool) -> Declared:
        if dtype.itemsize % 8:
            raise TypeError(f"a row of {name} has {dtype.itemsize} bytes; declare fields of 8 bytes only")
        declared = self.arrays[name] = Declared(len(self.arrays), dtype, rows, columns, saved)
        return declared


def _entry(context: Any, builder: Any, signature: Any, arguments: Any, row: int) -> list[Any]:
    """Load address, rows and columns of an array from its row of the table."""
    entries = _numba.make_array(signature.args[0])(context, builder, arguments[0]).data
    return [builder.load(builder.gep(entries, [context.get_constant(types.intp, 3 * row + k)])) for k in range(3)]


def _finder(row: int, dtype: np.dtype[Any], dimensions: int, columns: int | None = None) -> Any:
    array_type = types.Array(numba.from_dtype(dtype), dimensions, "C")

    def find(typing: Any, table: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, rows, width = _entry(context, builder, signature, arguments, row)
            if columns is not None:
                width = context.get_constant(types.intp, columns)
            size = context.get_constant(types.intp, dtype.itemsize)
            array = _numba.make_array(array_type)(context, builder)
            _numba.populate_array(
                array,
                data=builder.inttoptr(address, array.data.type),
                shape=[rows, width][:dimensions],
                strides=[size] if dimensions == 1 else [builder.mul(width, size), size],
                itemsize=size,
                meminfo=None,  # the array belongs to Python
            )
            return array._getvalue()

        return array_type(table), generate

    return find


def _found_by(find: Any, name: str) -> Any:
    find.__name__ = f"{name}_of"
    return intrinsic(find)


class State:
    """The arrays of one state, an attribute each, and the `Table` that compiled code receives."""

    def __init__(self, layout: Layout, sizes: Any, **arrays: NDArray[Any]) -> None:
        """Make an empty state.

        Args:
            layout: the declared arrays. sizes: the argument of the declarations' size functions.
            arrays: arrays to use instead of empty ones.
        """
        self._layout = layout
        self.table: Table = np.zeros((len(layout.arrays), 3), dtype=np.int64)
        self._make_empty({name: declared for name, declared in layout.arrays.items() if name not in arrays}, sizes)
        if arrays:
            self.replace(**arrays)

    def _make_empty(self, missing: Mapping[str, Declared], sizes: Any) -> None:
        """Make arrays of zeros as parts of one piece of memory, which is faster than to allocate each."""
        shapes = [declared.shape(sizes) for declared in missing.values()]
        lengths = [
            math.prod(shape) * declared.dtype.itemsize for shape, declared in zip(shapes, missing.values(), strict=True)
        ]
        ends = list(accumulate(lengths))
        memory = np.zeros(ends[-1] // INT64.itemsize, dtype=INT64)
        address, begin, entries = memory.__array_interface__["data"][0], 0, []
        for (name, declared), shape, end in zip(missing.items(), shapes, ends, strict=True):
            part = memory[begin // INT64.itemsize : end // INT64.itemsize]
            vars(self)[name] = part.view(declared.dtype).reshape(shape)
            entries.append((address + begin, shape[0], shape[1] if len(shape) == 2 else 1))
            begin = end
        self.table[[declared.row for declared in missing.values()]] = entries

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> NDArray[Any]: ...

    def replace(self, **arrays: NDArray[Any]) -> None:
        """Use other arrays from now on, usually longer ones, and update the table."""
        declared = self._layout.arrays
        entries = [_table_entry(name, declared[name].dtype, array) for name, array in arrays.items()]
        vars(self).update(arrays)
        self.table[[declared[name].row for name in arrays]] = entries

    def saved(self) -> dict[str, NDArray[Any]]:
        """Return copies of the arrays that a snapshot keeps."""
        return {name: vars(self)[name].copy() for name, declared in self._layout.arrays.items() if declared.saved}


def _table_entry(name: str, dtype: np.dtype[Any], array: NDArray[Any]) -> tuple[int, int, int]:
    """Return address, rows and columns of an array."""
    if not array.flags.c_contiguous or (array.dtype is not dtype and array.dtype != dtype):
        raise TypeError(f"{name} is {array.dtype}; compiled code needs a contiguous array of {dtype}")
    # As words, because the interface of an array of records is slow: it describes every field each time.
    words = array if dtype.names is None else array.view(INT64)
    return words.__array_interface__["data"][0], len(array), array.shape[1] if array.ndim == 2 else 1


@cache
def _fields_type(dtype: np.dtype[Any]) -> type[ctypes.Structure]:
    kinds = {INT64: ctypes.c_int64, FLOAT64: ctypes.c_double}
    fields = [(name, kinds[dtype[name]]) for name in dtype.names or ()]
    return type("Fields", (ctypes.Structure,), {"_fields_": fields, "__slots__": ()})


def fields_of(record: NDArray[Any]) -> Any:
    """Return the fields of an array of one record as attributes, for Python to read and write.

    An attribute access takes about 30 ns, ``record["name"][0]`` 200 ns or more.
    """
    return _fields_type(record.dtype).from_buffer(record.data)


_A = TypeVar("_A", bound=np.generic)


def longer(array: NDArray[_A], rows: int, *, log: bool = False) -> NDArray[_A]:
    """Return a copy with this many rows; the new rows are zero, or anything in a log, which writes before it reads."""
    made = (np.empty if log else np.zeros)((rows, *array.shape[1:]), dtype=array.dtype)
    # As words, because NumPy copies records field by field, which is slow.
    made[: len(array)].view(INT64)[...] = array.view(INT64)
    return made
