"""SharedBuffer: mapped memory."""

from __future__ import annotations

import errno
import functools
import mmap
import operator
import struct
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, SupportsIndex, overload

from ._backends import platform
from ._mappings import map_memory
from .errors import SealedError
from .locks import RangeLock
from .memory import Memory, Seal, check_range, flat_view
from .reduction import Shareable

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray
    from typing_extensions import Buffer  # collections.abc.Buffer, from 3.12 on

PAGE_SIZE: int = mmap.PAGESIZE
"""The size of a page in bytes: what is mapped, and becomes resident, at a time."""

CACHE_LINE_SIZE: int = platform.cache_line_size()
"""The size of a cache line in bytes. What different processes write often should not share one."""

_FILL_CHUNK = 1 << 18  # fits the cache: filling then runs at the speed of writing

_ACCESS = {mmap.ACCESS_WRITE: "write", mmap.ACCESS_READ: "read", mmap.ACCESS_COPY: "copy"}


def align(offset: SupportsIndex, alignment: SupportsIndex = CACHE_LINE_SIZE) -> int:
    """Return the least multiple of `alignment` that is not below `offset` (both in bytes).

    Raises ValueError if `offset` is negative or `alignment` is not positive.
    """
    start, unit = operator.index(offset), operator.index(alignment)
    if start < 0 or unit <= 0:
        raise ValueError(f"expected an offset from 0 and an alignment from 1 on, found {start} and {unit}")
    return -(-start // unit) * unit


class SharedBuffer(Shareable):
    """A range of shared memory, mapped into this process; pickles through multiprocessing as Memory does.

    Access to one byte, or to an aligned value of up to 8 bytes in native format through `view`, is as
    atomic as the processor makes it; nothing else is: use a lock where writers meet.

    `close()` gives up the mapping and never fails: views, arrays and slices stay valid, and the memory is
    unmapped with the last of them. Any use of the buffer itself after it is a ValueError. From Python 3.12
    on a buffer has the buffer protocol (`memoryview(b)`, `sock.recv_into(b)`); on 3.11 use `.buf`.

    Can be used from several threads. After fork, parent and child share what is mapped.
    """

    __slots__ = ("_access", "_memory", "_offset", "_size", "_view")

    _memory: Memory | None  # this buffer's own handle; None once closed
    _view: memoryview | None  # the mapped range; None until mapped, and once closed

    def __init__(self, size: SupportsIndex, *, name: str = "mpmemory", reserve: bool = False) -> None:
        """Create memory of `size` bytes and map it: `Memory(size, name=name, reserve=reserve).map()`.

        Raises ValueError if `size` is not positive; otherwise as `Memory` and `Memory.map`.
        """
        size = operator.index(size)
        self._put(Memory(size, name=name, reserve=reserve), 0, size, mmap.ACCESS_WRITE)
        self._map()

    @classmethod
    def from_bytes(cls, data: Buffer, *, name: str = "mpmemory") -> Self:
        """Create and map memory that holds a copy of `data`, which must not be empty; `name` is a label for people.

        Raises as `Memory.from_bytes`.
        """
        return cls._of(Memory.from_bytes(data, name=name), None, 0, None)

    @classmethod
    def _of(cls, memory: Memory, length: SupportsIndex | None, offset: SupportsIndex, access: int | None) -> Self:
        self = cls.__new__(cls)
        self._set_up(memory, length, offset, access)
        return self

    def _set_up(self, memory: Memory, length: SupportsIndex | None, offset: SupportsIndex, access: int | None) -> None:
        size = memory.size
        offset, length = check_range(offset, length, size)
        readonly = memory.readonly
        if access is None:
            access = mmap.ACCESS_READ if readonly else mmap.ACCESS_WRITE
        if access not in _ACCESS:
            raise ValueError(f"access must be mmap.ACCESS_WRITE, ACCESS_READ or ACCESS_COPY, found {access!r}")
        if access == mmap.ACCESS_WRITE and readonly:
            asked = f"cannot map memory {memory.name!r} for writing"
            if seals := memory.seals & (Seal.WRITE | Seal.FUTURE_WRITE):
                raise SealedError(errno.EPERM, f"{asked}: seal {seals.name} is on it")
            raise PermissionError(errno.EACCES, f"{asked}: it is read-only")
        self._put(memory._share(), offset, length, access)
        self._map()

    def _put(self, memory: Memory, offset: int, size: int, access: int) -> None:
        self._memory = memory
        self._offset = offset
        self._size = size
        self._access = access
        self._view = None

    def _map(self) -> memoryview:
        """Map the range. A buffer that was unpickled does it at its first use, where an error can be raised."""
        memory = self._held()
        if self._size == 0:
            raise ValueError(f"cannot map 0 bytes of memory {memory.name!r}, at offset {self._offset} of {memory.size}")
        before = self._offset % mmap.ALLOCATIONGRANULARITY
        mapping = map_memory(memory, before + self._size, self._offset - before, self._access)
        # The view holds the mapping, which is never closed, only dropped: so it goes with its last view.
        self._view = view = memoryview(mapping)[before:]
        if self._memory is None:  # closed by another thread meanwhile
            self._view = None
            self._held()
        return view

    def _open(self) -> memoryview:
        view = self._view
        return self._map() if view is None else view

    # --- what it is ---

    def _held(self) -> Memory:
        if self._memory is None:
            raise ValueError("buffer is closed")
        return self._memory

    @property
    def memory(self) -> Memory:
        """A handle on the memory under this buffer, closed with it."""
        return self._held()

    @property
    def size(self) -> int:
        """The length of the mapped range in bytes; it stays so when the memory grows."""
        self._held()
        return self._size

    @property
    def offset(self) -> int:
        """Where the range starts in the memory, in bytes."""
        self._held()
        return self._offset

    @property
    def readonly(self) -> bool:
        """Whether this mapping can only be read."""
        self._held()
        return self._access == mmap.ACCESS_READ

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._memory is None

    @property
    def buf(self) -> memoryview:
        """A new memoryview of the bytes (format "B", shape `(size,)`), valid also after `close`."""
        return self._open()[:]

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        kind = type(self).__name__
        if self._memory is None:
            return f"<{kind} closed>"
        return f"<{kind} size={self._size} offset={self._offset} access={_ACCESS[self._access]} of {self._memory!r}>"

    def __buffer__(self, flags: int) -> memoryview:
        # PEP 688, Python 3.12. A writable view of a readonly buffer is refused by the view itself.
        return self._open()

    def __iter__(self) -> Iterator[int]:
        return iter(self._open())

    def __bytes__(self) -> bytes:
        return bytes(self._open())

    # --- bytes ---

    @overload
    def __getitem__(self, key: SupportsIndex) -> int: ...
    @overload
    def __getitem__(self, key: slice) -> memoryview: ...
    def __getitem__(self, key: SupportsIndex | slice) -> int | memoryview:
        """`b[i]` is an int, `b[i:j]` a memoryview (no copy)."""
        view = self._open()
        try:
            return view[key]
        except IndexError:
            raise self._no_index(key) from None

    @overload
    def __setitem__(self, key: SupportsIndex, value: SupportsIndex) -> None: ...
    @overload
    def __setitem__(self, key: slice, value: Buffer) -> None: ...
    def __setitem__(self, key: SupportsIndex | slice, value: Any) -> None:
        """`b[i] = 7`, or `b[i:j] = data` of exactly that length; otherwise ValueError, and nothing is written."""
        view = self._open()
        if isinstance(key, slice):
            data = flat_view(value)
            length = len(range(*key.indices(len(view))))
            if len(data) != length:
                raise ValueError(f"slice {key} of {len(view)} bytes has length {length}, found {len(data)} bytes")
            view[key] = data
        else:
            try:
                view[key] = operator.index(value)
            except IndexError:
                raise self._no_index(key) from None
            except ValueError:
                raise ValueError(f"a byte is 0 to 255, found {value!r}") from None

    def _no_index(self, key: Any) -> IndexError:
        return IndexError(f"index {operator.index(key)} is not within a size of {self.size} bytes")

    def get_bytes(self, offset: SupportsIndex = 0, length: SupportsIndex | None = None) -> bytes:
        """Return a copy of `length` bytes from `offset` on (to the end if None). Raises ValueError beyond the end."""
        view = self._open()
        offset, length = check_range(offset, length, len(view))
        return bytes(view[offset : offset + length])

    def set_bytes(self, data: Buffer, offset: SupportsIndex = 0) -> int:
        """Write all of `data` at `offset` and return its length in bytes. Raises ValueError beyond the end."""
        view = self._open()
        source = flat_view(data)
        offset, length = check_range(offset, len(source), len(view))
        view[offset : offset + length] = source
        return length

    def get_string(
        self, offset: SupportsIndex = 0, length: SupportsIndex | None = None, encoding: str = "utf-8"
    ) -> str:
        """Return `length` bytes from `offset` on (to the end if None), NULs and all, decoded by `encoding`.

        Raises ValueError beyond the end, UnicodeDecodeError (a ValueError) if the bytes are not such text.
        """
        return self.get_bytes(offset, length).decode(encoding)

    def set_string(self, text: str, offset: SupportsIndex = 0, encoding: str = "utf-8") -> int:
        """Write `text` at `offset`, encoded by `encoding`, without a NUL behind it. Return how many bytes that took.

        Raises ValueError beyond the end, UnicodeEncodeError (a ValueError) for what the encoding does not have.
        """
        return self.set_bytes(text.encode(encoding), offset)

    def clear(self, value: SupportsIndex = 0) -> None:
        """Set every byte to `value` (0 to 255, otherwise ValueError)."""
        byte = operator.index(value)
        if not 0 <= byte <= 255:
            raise ValueError(f"a byte is 0 to 255, found {byte}")
        view = self._open()
        chunk = memoryview(bytes([byte]) * min(_FILL_CHUNK, len(view)))
        for start in range(0, len(view), len(chunk)):
            part = view[start : start + len(chunk)]
            part[:] = chunk[: len(part)]

    # --- values ---

    def get_value(self, fmt: str, offset: SupportsIndex) -> Any:
        """Return the value at `offset` (bytes), of the one that the `struct` format `fmt` names (`"<q"`, `"8s"`).

        Raises ValueError if the format is bad or is not of exactly one value, or beyond the end.
        """
        values = self.get_values(fmt, offset)
        if len(values) != 1:
            raise ValueError(f"expected a struct format of one value, found {fmt!r} of {len(values)}")
        return values[0]

    def set_value(self, fmt: str, offset: SupportsIndex, value: Any) -> None:
        """Write one value at `offset` (bytes) in the `struct` format `fmt`. Raises as `set_values`."""
        self.set_values(fmt, offset, (value,))

    def get_values(self, fmt: str, offset: SupportsIndex) -> tuple[Any, ...]:
        """Return the values at `offset` (bytes), in the `struct` format `fmt`.

        Raises ValueError if the format is bad, or beyond the end.
        """
        layout = _struct(fmt)
        view = self._open()
        offset, _ = check_range(offset, layout.size, len(view))
        return layout.unpack_from(view, offset)

    def set_values(self, fmt: str, offset: SupportsIndex, values: Iterable[Any]) -> None:
        """Write `values` at `offset` (bytes), in the `struct` format `fmt`; all or none.

        Raises ValueError if the format is bad, does not fit the values, or reaches beyond the end.
        """
        # Packed first: pack_into would have written the first values when the last one turns out wrong.
        values = tuple(values)
        try:
            data = _struct(fmt).pack(*values)
        except (struct.error, OverflowError) as error:
            raise ValueError(f"cannot write {values!r} in struct format {fmt!r}: {error}") from None
        self.set_bytes(data, offset)

    def view(
        self, format: str = "B", shape: SupportsIndex | Iterable[SupportsIndex] | None = None, offset: SupportsIndex = 0
    ) -> memoryview[Any]:
        """Return a memoryview of items in native `format` (one character of `struct`), without a copy.

        Args:
            format: "B", "i", "q", "d" and so on.
            shape: an int or several, in items, all from 1 on; None is as many items as fit, in one dimension.
            offset: in bytes from the start of the buffer.

        Raises ValueError if the format is not such a one, or the shape reaches beyond the end.
        """
        view = self._open()
        try:
            itemsize = memoryview(b"").cast(format).itemsize  # type: ignore[call-overload]
        except ValueError:
            raise ValueError(f"format must be one native struct character, found {format!r}") from None
        offset, rest = check_range(offset, None, len(view))
        dimensions = (rest // itemsize,) if shape is None else _dimensions(shape)
        if shape is not None and min(dimensions, default=0) < 1:
            raise ValueError(f"shape must have numbers from 1 on, found {shape!r}")
        count = itemsize
        for number in dimensions:
            count *= number
        check_range(offset, count, len(view))
        part = view[offset : offset + count]
        if len(dimensions) == 1:
            return part.cast(format)  # type: ignore[call-overload, no-any-return]
        return part.cast(format, dimensions)  # type: ignore[call-overload, no-any-return]

    def ndarray(
        self,
        shape: SupportsIndex | Iterable[SupportsIndex],
        dtype: DTypeLike = float,
        offset: SupportsIndex = 0,
        order: Literal["C", "F"] = "C",
    ) -> NDArray[Any]:
        """Return a NumPy array on this memory, without a copy; it stays valid after `close`.

        Sent through multiprocessing it arrives on the same memory; see `mpmemory.arrays`.

        Args:
            shape: an int or several, in items.
            dtype: any but those that hold Python objects.
            offset: in bytes from the start of the buffer.
            order: "C" (rows together) or "F" (columns together).

        Raises:
            ImportError: NumPy is not installed.
            TypeError: the dtype holds Python objects, which mean nothing in another process.
            ValueError: the array would reach beyond the end; `shape` has a negative number; `order` is another.
        """
        from ._references import on_view  # imported late: NumPy is optional

        return on_view(self._open(), shape, dtype, offset, order)

    def lock(
        self, offset: SupportsIndex = 0, length: SupportsIndex | None = None, *, shared: bool = False
    ) -> RangeLock:
        """Return a lock on `length` bytes from `offset` on (to the end of the buffer if None), exclusive or `shared`.

        It is not acquired yet.

        See `mpmemory.locks.RangeLock`. Raises ValueError if the range is empty or not within the buffer.
        """
        memory = self._held()
        start, count = check_range(offset, length, self._size)
        return RangeLock(memory, self._offset + start, count, shared=shared)

    # --- its end ---

    def close(self) -> None:
        """Give up the mapping: memory is unmapped at once, or with the last view on it. Closing twice is fine."""
        memory, self._memory, self._view = self._memory, None, None
        if memory is not None:
            memory.close()

    def __enter__(self) -> Self:
        self._held()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _reduce(self) -> tuple[Callable[..., Self], tuple[Any, ...]]:
        memory = self._held()
        if self._access == mmap.ACCESS_COPY:
            raise TypeError("a buffer mapped with ACCESS_COPY is private to this process and cannot be sent")
        return _rebuild_buffer, (type(self), memory, self._offset, self._size, self._access)


def _rebuild_buffer(cls: type[SharedBuffer], memory: Memory, offset: int, size: int, access: int) -> Any:
    self = cls.__new__(cls)
    self._put(memory, offset, size, access)
    return self


@functools.lru_cache(maxsize=128)
def _struct(fmt: str) -> struct.Struct:
    try:
        return struct.Struct(fmt)
    except struct.error as error:
        raise ValueError(f"bad struct format {fmt!r}: {error}") from None


def _dimensions(shape: SupportsIndex | Iterable[SupportsIndex]) -> tuple[int, ...]:
    if isinstance(shape, Iterable):
        return tuple(operator.index(number) for number in shape)
    return (operator.index(shape),)
