"""NumPy arrays that live in shared memory, and pickle by reference.

    a = mpmemory.arrays.zeros((10_000, 1_000))  # a plain numpy.ndarray
    pool.map(work, [a[i : i + 1000] for i in range(0, 10_000, 1000)])

What the functions here return are plain arrays. Sent through multiprocessing, they arrive on the same memory:
what one process writes, the others see. So does every array over shared memory, however it was made: slices,
transposes, reshapes, views of another type, those of `SharedBuffer.ndarray`, and of `numpy.frombuffer` on a
`SharedBuffer` or `SharedMemory`. All other arrays pickle as ever, and so do subclasses of numpy.ndarray and
arrays without items; and all do outside of multiprocessing (plain pickle, joblib's loky): as copies.

Importing this module has one effect: it tells multiprocessing's pickler how to pickle a numpy.ndarray.

Arrays in shared memory cannot hold Python objects. Access is not synchronised: use a lock where writers
meet. After fork, parent and child share the arrays there are.
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

from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import _mappings
from ._fds import LostFd
from ._mappings import Mapping
from ._slabs import slabs
from .memory import Memory, Seal, check_range
from .reduction import in_message

__all__ = [
    "array",
    "empty",
    "empty_like",
    "frozen",
    "full",
    "is_shared",
    "memory_of",
    "ones",
    "zeros",
    "zeros_like",
]

Shape = SupportsIndex | Iterable[SupportsIndex]
Order = Literal["C", "F"]
LikeOrder = Literal["C", "F", "A", "K"]


# --- making them ----------------------------------------------------------------------------------


def zeros(shape: Shape, dtype: DTypeLike = float, order: Order = "C") -> NDArray[Any]:
    """Return a new array of zeros in shared memory.

    Args:
        shape: the length in each dimension, or an int for one dimension.
        dtype: any but those that hold Python objects.
        order: "C" (rows together) or "F" (columns together).

    Raises:
        TypeError: the dtype holds Python objects.
        ValueError: a length is negative, or the order is another.
        OSError: no descriptor is left (EMFILE), so much cannot be mapped (EFBIG, ENOMEM), or, where the backend is
            not memfd, there is no memory (ENOSPC).
    """
    dimensions, kind, nbytes = _layout(shape, dtype, order)
    mapping, offset = slabs.allocate(nbytes)
    return np.ndarray(dimensions, kind, _bytes_of(mapping), offset, order=order)


def empty(shape: Shape, dtype: DTypeLike = float, order: Order = "C") -> NDArray[Any]:
    """Return a new array in shared memory: fresh memory is zeros, so this is `zeros`."""
    return zeros(shape, dtype, order)


def ones(shape: Shape, dtype: DTypeLike = float, order: Order = "C") -> NDArray[Any]:
    """Return a new array of ones in shared memory. Arguments and errors are those of `zeros`."""
    return full(shape, 1, dtype, order)


def full(shape: Shape, fill_value: ArrayLike, dtype: DTypeLike | None = None, order: Order = "C") -> NDArray[Any]:
    """Return a new array in shared memory that is full of `fill_value`: a number, or an array to be broadcast.

    The dtype is that of the value if None. Other arguments and errors are those of `zeros`.
    """
    if dtype is None:
        fill_value = np.asarray(fill_value)
        dtype = fill_value.dtype
    result = zeros(shape, dtype, order)
    np.copyto(result, fill_value, casting="unsafe")  # as NumPy does: an int that does not fit is an OverflowError
    return result


def zeros_like(
    prototype: ArrayLike, dtype: DTypeLike | None = None, order: LikeOrder = "K", shape: Shape | None = None
) -> NDArray[Any]:
    """Return a new array of zeros in shared memory, of the shape and dtype of `prototype`.

    Args:
        prototype: an array, or what becomes one.
        dtype: another dtype; any but those that hold Python objects.
        order: "C", "F", "A" (that of the prototype if it is one of these), or "K" (as close to it as can be).
        shape: another shape.

    Raises as `zeros`.
    """
    source = np.asarray(prototype)
    _check(np.dtype(source.dtype if dtype is None else dtype))
    # Never touched, so that it takes no memory. NumPy alone knows what its orders mean.
    template: NDArray[Any] = np.empty_like(source, dtype, order, False, shape)  # type: ignore[arg-type, misc]
    mapping, offset = slabs.allocate(template.nbytes)
    return np.ndarray(template.shape, template.dtype, _bytes_of(mapping), offset, template.strides)


def empty_like(
    prototype: ArrayLike, dtype: DTypeLike | None = None, order: LikeOrder = "K", shape: Shape | None = None
) -> NDArray[Any]:
    """Return a new array in shared memory like `prototype`: fresh memory is zeros, so this is `zeros_like`."""
    return zeros_like(prototype, dtype, order, shape)


def array(object: ArrayLike, dtype: DTypeLike | None = None, *, order: LikeOrder = "K") -> NDArray[Any]:
    """Return a copy of `object`, an array or what becomes one, in shared memory.

    Arguments and errors are those of `zeros_like`.
    """
    source = np.asarray(object, dtype)
    result = empty_like(source, order=order)
    np.copyto(result, source)
    return result


def frozen(a: NDArray[Any]) -> NDArray[Any]:
    """Return a view of `a` that cannot be written to: not here, and by no process that it is sent to.

    The kernel sees to that, by a seal on the memory (F_SEAL_FUTURE_WRITE, Linux 5.1): no process can map it for
    writing any more. Writable arrays that exist stay so, with the forked children that inherit them, and what
    is written through them is seen in the view. Sent from now on, they arrive read-only, as does all that is in
    the same memory.

    If `a` is in private memory, shares its memory with other small arrays, or has no items, it is copied first.

    Raises:
        TypeError: `a` is no array, or holds Python objects.
        OSError: the memory cannot be sealed, since it is no memfd (ENOTSUP) or was opened read-only (EACCES);
            otherwise as `zeros`.
    """
    _check(_check_array(a).dtype)
    # An array without items may have the address of other memory, which is not to be sealed.
    place = _place_of(a) if a.size else None
    if place is None or slabs.is_slab(place[0]):
        template = np.empty_like(a, subok=False)
        mapping, offset = slabs.allocate_own(a.nbytes), 0
        strides = template.strides
        np.copyto(np.ndarray(a.shape, a.dtype, _bytes_of(mapping), offset, strides), a)
    else:
        mapping, offset = place
        strides = a.strides
    memory = mapping.memory
    if not memory.seals & (Seal.WRITE | Seal.FUTURE_WRITE):
        # Who can shrink and grow it, could write zeros.
        memory.seal(Seal.FUTURE_WRITE | Seal.SHRINK)
    readonly = _mappings.map_whole(memory, write=False)
    return np.ndarray(a.shape, a.dtype, _bytes_of(readonly), offset, strides)


def on_view(view: memoryview, shape: Shape, dtype: DTypeLike, offset: SupportsIndex, order: Order) -> NDArray[Any]:
    """Return an array on the bytes of `view` from `offset` on: what `SharedBuffer.ndarray` does."""
    dimensions, kind, nbytes = _layout(shape, dtype, order)
    start, _ = check_range(offset, nbytes, len(view))
    return np.ndarray(dimensions, kind, np.frombuffer(view, np.uint8), start, order=order)


def _layout(shape: Shape, dtype: DTypeLike, order: Order) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Return the dimensions, the dtype and how many bytes they take. Raises TypeError, ValueError."""
    kind = _check(np.dtype(dtype))
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


def _check_array(a: Any) -> NDArray[Any]:
    if isinstance(a, np.ndarray):
        return a
    if isinstance(a, LostArray):
        _fail(a)
    raise TypeError(f"expected a numpy.ndarray, found {type(a).__name__}")


def _check(kind: np.dtype[Any]) -> np.dtype[Any]:
    if kind.hasobject:
        raise TypeError(f"an array in shared memory cannot hold Python objects, found dtype {kind!r}")
    return kind


def _bytes_of(mapping: Mapping) -> NDArray[np.uint8]:
    # Not np.ndarray(buffer=mapping), which does not hold the mapping and dangles when it is closed.
    return np.frombuffer(mapping, np.uint8)


# --- where they are -------------------------------------------------------------------------------


def is_shared(a: object) -> bool:
    """Return whether `a` is an array over shared memory of this package, so that it is sent by reference.

    An array of a subclass of numpy.ndarray, or without items, is sent as a copy all the same.
    """
    return isinstance(a, np.ndarray) and _place_of(a) is not None


def memory_of(a: NDArray[Any]) -> Memory:
    """Return a handle on the memory that `a` is in, perhaps with other arrays.

    Raises ValueError if it is not in shared memory.
    """
    place = _place_of(_check_array(a))
    if place is None:
        raise ValueError(f"expected an array in shared memory, found {type(a).__name__} in private memory")
    return place[0].memory._share()


def _place_of(a: NDArray[Any]) -> tuple[Mapping, int] | None:
    """Return the mapping that the first item of `a` is in, and its offset in the memory; None if it is not shared."""
    base: Any = a.base
    while isinstance(base, np.ndarray):
        base = base.base
    # What begins with an array that has its own memory is private: nearly all are, and this is fast.
    return None if base is None else _mappings.find(a.ctypes.data)


# --- how they travel ------------------------------------------------------------------------------


def _reduce(a: NDArray[Any]) -> Any:
    place = _place_of(a)
    # An array without items refers to nothing: its address may be that of other memory, behind the end of its own.
    if place is None or a.size == 0 or a.dtype.hasobject:
        # As NumPy pickles it, and by the protocol that is used: that of messages is 5, with buffers beside the pickle.
        return a.__reduce_ex__(5 if in_message.outgoing is not None else pickle.DEFAULT_PROTOCOL)
    mapping, offset = place
    return _rebuild, (mapping.memory, offset, a.shape, a.strides, a.dtype, a.flags.writeable)


ForkingPickler.register(np.ndarray, _reduce)


def _rebuild(
    memory: Memory,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: np.dtype[Any],
    writeable: bool,
) -> Any:
    """Return the array there, or what stands for one that cannot be had. Never raises an Exception."""
    try:
        # What is sealed arrives read-only, also where there is a mapping from before that could be written to.
        mapping = _mappings.map_whole(memory, write=not memory.readonly, keep_warm=True)
        result = np.ndarray(shape, dtype, _bytes_of(mapping), offset, strides)
    except Exception as error:
        return LostArray(LostFd.because(error, "the array cannot be had"), shape, dtype)
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
