"""References to arrays: which array is over shared memory, how it travels, and how it is put on a buffer.

Importing this module tells multiprocessing's pickler how to pickle a numpy.ndarray.
"""

from __future__ import annotations

import math
import operator
import pickle
from collections.abc import Iterable
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal, NoReturn, SupportsIndex

try:
    import numpy as np
except ImportError as error:
    raise ImportError("arrays in shared memory need NumPy: pip install 'mpmemory[numpy]'") from error

from numpy.typing import DTypeLike, NDArray

from . import _mappings
from ._fds import LostFd
from ._mappings import Mapping
from .memory import Memory, check_range
from .reduction import in_message

Shape = SupportsIndex | Iterable[SupportsIndex]
Order = Literal["C", "F"]


# --- on a buffer ----------------------------------------------------------------------------------


def on_view(view: memoryview, shape: Shape, dtype: DTypeLike, offset: SupportsIndex, order: Order) -> NDArray[Any]:
    """Return an array on the bytes of `view` from `offset` on: what `SharedBuffer.ndarray` does."""
    dimensions, kind, nbytes = layout(shape, dtype, order)
    start, _ = check_range(offset, nbytes, len(view))
    return np.ndarray(dimensions, kind, np.frombuffer(view, np.uint8), start, order=order)


def layout(shape: Shape, dtype: DTypeLike, order: Order) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Return the dimensions, the dtype and how many bytes they take. Raises TypeError, ValueError."""
    kind = check_dtype(np.dtype(dtype))
    if order not in ("C", "F"):
        raise ValueError(f"order must be 'C' or 'F', found {order!r}")
    lengths = shape if isinstance(shape, Iterable) else (shape,)
    dimensions = tuple(operator.index(length) for length in lengths)
    if min(dimensions, default=0) < 0:
        raise ValueError(f"shape must not have negative numbers, found {shape!r}")
    if kind.subdtype is not None:  # each item is an array itself: more dimensions
        kind, inner = kind.subdtype
        dimensions += inner
    if not kind.itemsize:
        kind = np.empty(0, kind).dtype  # NumPy makes strings of one character from those without a length
    return dimensions, kind, math.prod(dimensions) * kind.itemsize


def check_array(a: Any) -> NDArray[Any]:
    if isinstance(a, np.ndarray):
        return a
    if isinstance(a, LostArray):
        _fail(a)
    raise TypeError(f"expected a numpy.ndarray, found {type(a).__name__}")


def check_dtype(kind: np.dtype[Any]) -> np.dtype[Any]:
    if kind.hasobject:
        raise TypeError(f"an array in shared memory cannot hold Python objects, found dtype {kind!r}")
    return kind


def bytes_of(mapping: Mapping) -> NDArray[np.uint8]:
    # Not np.ndarray(buffer=mapping), which does not hold the mapping and dangles when it is closed.
    return np.frombuffer(mapping, np.uint8)


# --- where they are -------------------------------------------------------------------------------


def place_of(a: NDArray[Any]) -> tuple[Mapping, int] | None:
    """Return the mapping that the first item of `a` is in, and its offset in the memory; None if it is not shared."""
    base: Any = a.base
    while isinstance(base, np.ndarray):
        base = base.base
    # What begins with an array that has its own memory is private: nearly all are, and this is fast.
    return None if base is None else _mappings.find(a.ctypes.data)


# --- how they travel ------------------------------------------------------------------------------


def _reduce(a: NDArray[Any]) -> Any:
    place = place_of(a)
    # An array without items refers to nothing: its address may be that of other memory, behind the end of its own.
    if place is None or a.size == 0 or a.dtype.hasobject:
        # As NumPy pickles it, and by the protocol that is used: that of messages is 5, with buffers beside the pickle.
        return a.__reduce_ex__(5 if in_message.outgoing is not None else pickle.DEFAULT_PROTOCOL)
    mapping, offset = place
    # As one character where that says all, which nearly always is so: a dtype takes longer.
    dtype: np.dtype[Any] | str = a.dtype
    if np.dtype(a.dtype.char) is a.dtype:
        dtype = a.dtype.char
    return _rebuild, (mapping.memory, offset, a.shape, a.strides, dtype, a.flags.writeable)


ForkingPickler.register(np.ndarray, _reduce)


def _rebuild(
    memory: Memory,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: np.dtype[Any] | str,
    writeable: bool,
) -> Any:
    """Return the array there, or what stands for one that cannot be had. Never raises an Exception."""
    try:
        # What is sealed arrives read-only, also where there is a mapping from before that could be written to.
        mapping = _mappings.map_whole(memory, write=not memory.readonly, keep_warm=True)
        result = np.ndarray(shape, dtype, bytes_of(mapping), offset, strides)
        check_dtype(result.dtype)
    except Exception as error:
        return LostArray(LostFd.because(error, "the array cannot be had"), shape, np.dtype(dtype))
    if not writeable:
        result.flags.writeable = False
    return result


class LostArray:
    """Stands where an array should be whose memory did not arrive: using it raises HandleLostError.

    Unpickling never raises, since that would hang the Pool of the standard library. While pandas unpickles a frame
    of numbers, it asks for shape, dtype and ndim, which are known.
    """

    def __init__(self, reason: LostFd, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        # Not by setattr: to set an attribute is to use it, too.
        vars(self).update(_reason=reason, shape=shape, dtype=dtype, ndim=len(shape))

    def __repr__(self) -> str:
        return "<LostArray>"

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):  # somebody wants to know what this is
            raise AttributeError(name)
        _fail(self)


def _fail(lost: LostArray, *_: object, **__: object) -> NoReturn:
    reason: LostFd = vars(lost)["_reason"]
    reason.fileno()


_OPERATIONS = (
    "setattr array len iter contains bool int float index round getitem setitem delitem eq ne lt le gt ge "
    "neg pos abs invert reduce add radd iadd sub rsub isub mul rmul imul matmul rmatmul truediv rtruediv itruediv "
    "floordiv rfloordiv mod rmod divmod rdivmod pow rpow and rand or ror xor rxor lshift rlshift rshift rrshift"
)
for _name in _OPERATIONS.split():
    setattr(LostArray, f"__{_name}__", _fail)
