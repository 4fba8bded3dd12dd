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

from typing import Any, Literal, TypeVar, overload

from ._references import Order, Shape, bytes_of, check_array, check_dtype, layout, place_of

# isort: split
# After that, which says what to install.
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import _mappings
from ._slabs import slabs
from .memory import Memory, Seal

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

LikeOrder = Literal["C", "F", "A", "K"]

S = TypeVar("S", bound=np.generic)
DTypeOf = type[S] | np.dtype[S]


# --- making them ----------------------------------------------------------------------------------


@overload
def zeros(shape: Shape, dtype: type[float] = float, order: Order = "C") -> NDArray[np.float64]: ...
@overload
def zeros(shape: Shape, dtype: DTypeOf[S], order: Order = "C") -> NDArray[S]: ...
@overload
def zeros(shape: Shape, dtype: DTypeLike, order: Order = "C") -> NDArray[Any]: ...
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
    dimensions, kind, nbytes = layout(shape, dtype, order)
    mapping, offset = slabs.allocate(nbytes)
    return np.ndarray(dimensions, kind, bytes_of(mapping), offset, order=order)


@overload
def empty(shape: Shape, dtype: type[float] = float, order: Order = "C") -> NDArray[np.float64]: ...
@overload
def empty(shape: Shape, dtype: DTypeOf[S], order: Order = "C") -> NDArray[S]: ...
@overload
def empty(shape: Shape, dtype: DTypeLike, order: Order = "C") -> NDArray[Any]: ...
def empty(shape: Shape, dtype: DTypeLike = float, order: Order = "C") -> NDArray[Any]:
    """Return a new array in shared memory: fresh memory is zeros, so this is `zeros`."""
    return zeros(shape, dtype, order)


@overload
def ones(shape: Shape, dtype: type[float] = float, order: Order = "C") -> NDArray[np.float64]: ...
@overload
def ones(shape: Shape, dtype: DTypeOf[S], order: Order = "C") -> NDArray[S]: ...
@overload
def ones(shape: Shape, dtype: DTypeLike, order: Order = "C") -> NDArray[Any]: ...
def ones(shape: Shape, dtype: DTypeLike = float, order: Order = "C") -> NDArray[Any]:
    """Return a new array of ones in shared memory. Arguments and errors are those of `zeros`."""
    return full(shape, 1, dtype, order)


@overload
def full(shape: Shape, fill_value: ArrayLike, dtype: DTypeOf[S], order: Order = "C") -> NDArray[S]: ...
@overload
def full(shape: Shape, fill_value: ArrayLike, dtype: DTypeLike | None = None, order: Order = "C") -> NDArray[Any]: ...
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


@overload
def zeros_like(
    prototype: NDArray[S], dtype: None = None, order: LikeOrder = "K", shape: Shape | None = None
) -> NDArray[S]: ...
@overload
def zeros_like(
    prototype: ArrayLike, dtype: DTypeOf[S], order: LikeOrder = "K", shape: Shape | None = None
) -> NDArray[S]: ...
@overload
def zeros_like(
    prototype: ArrayLike, dtype: DTypeLike | None = None, order: LikeOrder = "K", shape: Shape | None = None
) -> NDArray[Any]: ...
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
    check_dtype(np.dtype(source.dtype if dtype is None else dtype))
    # Never touched, so that it takes no memory. NumPy alone knows what its orders mean.
    template: NDArray[Any] = np.empty_like(source, dtype, order, False, shape)  # type: ignore[arg-type, misc]
    mapping, offset = slabs.allocate(template.nbytes)
    return np.ndarray(template.shape, template.dtype, bytes_of(mapping), offset, template.strides)


@overload
def empty_like(
    prototype: NDArray[S], dtype: None = None, order: LikeOrder = "K", shape: Shape | None = None
) -> NDArray[S]: ...
@overload
def empty_like(
    prototype: ArrayLike, dtype: DTypeOf[S], order: LikeOrder = "K", shape: Shape | None = None
) -> NDArray[S]: ...
@overload
def empty_like(
    prototype: ArrayLike, dtype: DTypeLike | None = None, order: LikeOrder = "K", shape: Shape | None = None
) -> NDArray[Any]: ...
def empty_like(
    prototype: ArrayLike, dtype: DTypeLike | None = None, order: LikeOrder = "K", shape: Shape | None = None
) -> NDArray[Any]:
    """Return a new array in shared memory like `prototype`: fresh memory is zeros, so this is `zeros_like`."""
    return zeros_like(prototype, dtype, order, shape)


@overload
def array(object: NDArray[S], dtype: None = None, *, order: LikeOrder = "K") -> NDArray[S]: ...
@overload
def array(object: ArrayLike, dtype: DTypeOf[S], *, order: LikeOrder = "K") -> NDArray[S]: ...
@overload
def array(object: ArrayLike, dtype: DTypeLike | None = None, *, order: LikeOrder = "K") -> NDArray[Any]: ...
def array(object: ArrayLike, dtype: DTypeLike | None = None, *, order: LikeOrder = "K") -> NDArray[Any]:
    """Return a copy of `object`, an array or what becomes one, in shared memory.

    Arguments and errors are those of `zeros_like`.
    """
    source = np.asarray(object, dtype)
    result = empty_like(source, order=order)
    np.copyto(result, source)
    return result


def frozen(a: NDArray[S]) -> NDArray[S]:
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
    check_dtype(check_array(a).dtype)
    # An array without items may have the address of other memory, which is not to be sealed.
    place = place_of(a) if a.size else None
    if place is None or slabs.is_slab(place[0]):
        template = np.empty_like(a, subok=False)
        mapping, offset = slabs.allocate_own(a.nbytes), 0
        strides = template.strides
        np.copyto(np.ndarray(a.shape, a.dtype, bytes_of(mapping), offset, strides), a)
    else:
        mapping, offset = place
        strides = a.strides
    memory = mapping.memory
    if not memory.seals & (Seal.WRITE | Seal.FUTURE_WRITE):
        # Who can shrink and grow it, could write zeros.
        memory.seal(Seal.FUTURE_WRITE | Seal.SHRINK)
    readonly = _mappings.map_whole(memory, write=False)
    return np.ndarray(a.shape, a.dtype, bytes_of(readonly), offset, strides)


# --- where they are -------------------------------------------------------------------------------


def is_shared(a: object) -> bool:
    """Return whether `a` is an array over shared memory of this package, so that it is sent by reference.

    An array of a subclass of numpy.ndarray, or without items, is sent as a copy all the same.
    """
    return isinstance(a, np.ndarray) and place_of(a) is not None


def memory_of(a: NDArray[Any]) -> Memory:
    """Return a handle on the memory that `a` is in, perhaps with other arrays.

    Raises ValueError if it is not in shared memory.
    """
    place = place_of(check_array(a))
    if place is None:
        raise ValueError(f"expected an array in shared memory, found {type(a).__name__} in private memory")
    return place[0].memory._share()
