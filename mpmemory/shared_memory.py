"""SharedMemory and ShareableList: drop-ins for those of `multiprocessing.shared_memory`.

`from mpmemory.shared_memory import SharedMemory` is all that changes. Without a name given, the memory is
anonymous: its `name` can be attached to from any process of the same user while its creator lives, and
nothing stays behind when processes are killed. With a name it is the POSIX object that the standard
library would open.

docs/migrating.md says what differs.
"""

from __future__ import annotations

import functools
import operator
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from typing import Any, Generic, Self, SupportsIndex, TypeVar

from . import _names
from ._backends import posix
from ._fds import LostFd, OwnedFd
from .buffer import SharedBuffer
from .memory import Memory
from .reduction import Shareable

__all__ = ["SharedMemory", "ShareableList"]

T = TypeVar("T", bound=int | float | bool | str | bytes | None)


class SharedMemory(Shareable):
    """A block of shared memory, created or attached to by its name.

    A block without a name of its own is gone when it is unlinked and the last process has closed it; or
    when all processes that have it, or the only one, have ended, in whatever way. Attaching processes
    never destroy it, and `close()` never fails: arrays and views stay valid.

    Pickles as a descriptor through multiprocessing, and by name through plain pickle. Unpickling the former
    never fails; a block that could not be had raises HandleLostError when it is used.

    Can be used from several threads. After fork, parent and child share the block.
    """

    __slots__ = ("__dict__", "_buf", "_buffer", "_fd", "_name", "_size")  # with attributes of the user's own

    _buffer: SharedBuffer | None  # None once closed
    _fd: OwnedFd | LostFd | None  # that of the buffer: another thread may close it
    _buf: memoryview | None  # None until it is asked for, and once closed

    def __init__(
        self, name: str | None = None, create: bool = False, size: SupportsIndex = 0, *, track: bool = True
    ) -> None:
        """Create a block (`create=True`), or attach to the one with this name.

        Args:
            name: of a POSIX shared memory object ("/" is put before it), or what `.name` of an anonymous block
                says. None, with `create`, is an anonymous one.
            create: whether to create it. Its bytes are zeros.
            size: in bytes, kept exactly; of those that are created only.
            track: whether a POSIX object is destroyed when the processes end that were started from this one,
                if it was not unlinked before. Of those that are created only: who attaches never destroys.
                A name that the resource tracker cannot read (not ASCII, ":", a line feed) is not tracked.

        Raises:
            ValueError: `size` is negative, or 0 for a new block; `name` is missing, has a NUL, or, for a new
                block, has the form of those of anonymous ones; or the object attached to is empty.
            TypeError: `size` is not an int, or `name` not a str.
            FileExistsError: there is an object of this name already.
            FileNotFoundError: there is none (any more).
            PermissionError: it is another user's.
            OSError: no descriptor is left (EMFILE), or there is not so much memory (ENOSPC, for POSIX objects).
        """
        size = operator.index(size)
        if size < 0:
            raise ValueError(f"'size' must be a positive integer, found {size}")
        if create:
            if size == 0:
                raise ValueError("'size' must be a positive number different from zero")
            self._put(*_create(name, size, track))
        elif name is None:
            raise ValueError("'name' can only be None if create=True")
        else:
            self._put(name, _attach(name))

    def _put(self, name: str, buffer: SharedBuffer) -> None:
        self._name = name
        self._fd = buffer.memory._open()
        self._buffer = buffer
        self._size = buffer.size
        self._buf = None

    @property
    def buf(self) -> memoryview | None:
        """The bytes; None once closed. Views on them stay valid."""
        buffer = self._buffer
        if buffer is None:
            return None
        if self._buf is None:
            self._buf = buffer.buf
        return self._buf

    @property
    def name(self) -> str:
        """What another process attaches by."""
        return self._name

    @property
    def size(self) -> int:
        """The size in bytes, exactly as it was asked for."""
        return self._size

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._name!r}, size={self._size})"

    def close(self) -> None:
        """Give up this access to the block, which itself stays. Never fails; closing twice is fine.

        The memory of an anonymous block stays until it is unlinked, also if nobody else has it: somebody may
        come and attach.
        """
        buffer, fd = self._buffer, self._fd
        self._buffer = self._fd = self._buf = None
        if fd is not None and _names.is_name(self._name):
            _names.keep(self._name, fd)
        if buffer is not None:
            buffer.close()

    # Bound early: when the interpreter ends, the modules' globals may be gone, and the kernel closes all.
    def __del__(self, _is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if hasattr(self, "_buf") and not _is_finalizing():  # set last: it was constructed
            self.close()  # that of a subclass, as in the standard library

    def unlink(self) -> None:
        """End the name: nobody can attach any more. The memory goes with the last that has it.

        Call it once, in any process, before `close` or after. Raises FileNotFoundError if the name has ended.
        """
        if _names.is_name(self._name):
            _names.withdraw(self._name, self._fd)
            return
        path = _path(self._name)
        try:
            posix.unlink(path)
        finally:  # also when an unrelated process has unlinked it: our tracker would complain that it is gone
            _untrack(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._name, False, self._size)

    def _reduce(self) -> tuple[Callable[..., Self], tuple[Any, ...]]:
        # A closed one can be sent as long as its name leads somewhere, as in the standard library.
        buffer = self._buffer or _attach(self._name)
        return _rebuild_memory, (type(self), self._name, buffer)


def _rebuild_memory(cls: type[SharedMemory], name: str, buffer: SharedBuffer) -> Any:
    self = cls.__new__(cls)
    self._put(name, buffer)
    return self


def _create(name: str | None, size: int, track: bool) -> tuple[str, SharedBuffer]:
    if name is not None:
        return name, _create_named(name, size, track)
    if _names.available():
        buffer = SharedBuffer(size, name="shared_memory")
        return _names.name_of(buffer.memory._open()), buffer
    while True:
        name = f"mpm-{os.urandom(4).hex()}"  # with its "/" less than 14 characters, which some systems allow
        try:
            return name, _create_named(name, size, track)
        except FileExistsError:
            continue


def _create_named(name: str, size: int, track: bool) -> SharedBuffer:
    path = _path(name)
    if _names.is_name(name):
        raise ValueError(f"{name!r} has the form of names that anonymous blocks have: choose another")
    fd = OwnedFd(posix.open_named(path, os.O_CREAT | os.O_EXCL))
    try:
        memory = Memory._own(fd, name)
        memory.grow(size)
        buffer = memory.map()
        if track and _is_trackable(path):
            resource_tracker.register(path, "shared_memory")
    except BaseException:
        posix.unlink(path)
        raise
    return buffer


def _attach(name: str) -> SharedBuffer:
    path = _path(name)
    fd = _names.find(name) if _names.is_name(name) else OwnedFd(posix.open_named(path))
    return Memory._own(fd, name).map()


def _path(name: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, found {type(name).__name__}")
    if "\0" in name:
        raise ValueError(f"name must not have a NUL character (embedded null character), found {name!r}")
    return f"/{name}"


def _is_trackable(path: str) -> bool:
    """Return whether the resource tracker can read this: lines of ASCII, with colons between their fields."""
    return path.isascii() and ":" not in path and "\n" not in path


def _untrack(path: str) -> None:
    """Tell the resource tracker, if these processes have one, that there is nothing to destroy."""
    if resource_tracker._resource_tracker._fd is not None and _is_trackable(path):  # type: ignore[attr-defined]
        # It complains about what it does not know, and is asked nothing: another process may have registered it.
        resource_tracker.register(path, "shared_memory")
        resource_tracker.unregister(path, "shared_memory")


# --- ShareableList --------------------------------------------------------------------------------

# Layout, that of the standard library; numbers are native and 8 bytes wide:
#
#     number of items N
#     N + 1 offsets: where each item starts in the data, and where the last one ends
#     data: each item in a multiple of 8 bytes
#     N formats of 8 bytes: of each item, for `struct`
#     N kinds of 1 byte
#
# Text is filled up with NULs, and what ends in NULs cannot be told from that. So it gets kinds of its own,
# which the standard library does not know (there, reading such an item is a KeyError).
_VALUE, _STR, _BYTES, _NONE = 0, 1, 2, 3
_STR_BEFORE_END, _BYTES_BEFORE_END = 4, 5  # a byte that is not NUL comes after the text
_WHOLE_STR, _WHOLE_BYTES = 6, 7  # the text takes all of its room
_IS_STR = {_STR, _STR_BEFORE_END, _WHOLE_STR}
_END = b"\x01"

_WORD = 8


class _Place:
    """Where in the block an item is, in bytes."""

    def __init__(self, start: int, end: int, format: int, kind: int) -> None:
        self.start = start
        self.end = end
        self.format = format
        self.kind = kind


class _Item:
    """An item as it is stored."""

    def __init__(self, room: int, format: str, kind: int, data: bytes) -> None:
        self.room = room  # bytes
        self.format = format
        self.kind = kind
        self.data = data


class ShareableList(Shareable, Generic[T]):
    """A list of fixed length in shared memory: of ints (64 bits), floats, bools, strs, bytes and None.

    An item can be replaced by any other value that fits its room: 8 bytes, or for str (as UTF-8) and bytes
    the next multiple of 8 beyond their length. Trailing NULs are kept.

    Access is not synchronised: who reads while another process writes may see half of each. Pickles as
    `SharedMemory` does. Close and unlink the block in `.shm`.
    """

    __slots__ = ("__dict__", "_offsets", "_shm")

    _offsets: memoryview[int] | None  # of N + 1 items; None until they are read

    def __init__(self, sequence: Iterable[T] | None = None, *, name: str | None = None) -> None:
        """Create a list with the items of `sequence`, or attach to the one of this name.

        Args:
            sequence: the items. None is an empty list, or, with a name, the one there is.
            name: as that of `SharedMemory`; None is an anonymous one.

        Raises:
            TypeError: an item is of another type.
            ValueError: an int takes more than 64 bits, a str or bytes more than 99,999,992 bytes; or there is
                no list in the memory attached to.
            OSError: as `SharedMemory`.
        """
        self._offsets = None
        if sequence is None and name is not None:
            self._shm = SharedMemory(name)
            self._layout()
            return
        items = [_encode(value, f"item {index}") for index, value in enumerate(sequence or ())]
        offsets = [0]
        for item in items:
            offsets.append(offsets[-1] + item.room)
        numbers = [len(items), *offsets]
        parts = [
            struct.pack(f"{len(numbers)}q", *numbers),
            *(item.data for item in items),
            *(struct.pack("8s", item.format.encode()) for item in items),
            bytes(item.kind for item in items),
        ]
        data = b"".join(parts)
        self._shm = SharedMemory(name, create=True, size=len(data))
        _view_of(self._shm)[:] = data

    def _layout(self) -> memoryview[int]:
        """Return the offsets of all items, which never change. Raises ValueError."""
        if self._offsets is None:
            view = _view_of(self._shm)
            words = view[: len(view) // _WORD * _WORD].cast("q")
            count = words[0] if len(words) else -1
            offsets = memoryview(words[1 : count + 2].tobytes()).cast("q")  # a copy: words keep the block mapped
            if count < 0 or len(offsets) != count + 1 or _size_of(count, offsets[-1]) > len(view):
                raise ValueError(f"there is no ShareableList in {self._shm!r}")
            self._offsets = offsets
        return self._offsets

    def _place(self, position: SupportsIndex) -> _Place:
        offsets = self._layout()
        count = len(offsets) - 1
        asked = operator.index(position)
        index = asked + count if asked < 0 else asked
        if not 0 <= index < count:
            raise IndexError(f"index {asked} is out of range for {count} items")
        if not 0 <= offsets[index] <= offsets[index + 1] <= offsets[count]:
            raise ValueError(f"item {asked} of {self._shm!r} is not within the list")
        data = (count + 2) * _WORD
        formats = data + offsets[count]
        return _Place(
            data + offsets[index], data + offsets[index + 1], formats + index * _WORD, formats + count * _WORD + index
        )

    def __len__(self) -> int:
        return len(self._layout()) - 1

    def __iter__(self) -> Iterator[T]:
        for position in range(len(self)):
            yield self[position]

    def __getitem__(self, position: SupportsIndex) -> T:
        """Return an item. Raises IndexError; ValueError if it is none, as while another process is writing it."""
        view, place = _view_of(self._shm), self._place(position)
        try:
            (value,) = struct.unpack_from(_format_at(view, place.format), view, place.start)
            return _decode(value, view[place.kind])  # type: ignore[no-any-return]
        except (struct.error, AttributeError, IndexError, OverflowError, ValueError) as error:
            raise ValueError(f"item {operator.index(position)} of {self._shm!r} cannot be read: {error}") from None

    def __setitem__(self, position: SupportsIndex, value: T) -> None:
        """Replace an item.

        Raises IndexError, TypeError for a value of another type, ValueError if it does not fit; nothing is
        written then.
        """
        view, place = _view_of(self._shm), self._place(position)
        item = _encode(value, f"item {operator.index(position)}", place.end - place.start)
        view[place.start : place.start + len(item.data)] = item.data
        struct.pack_into("8s", view, place.format, item.format.encode())
        view[place.kind] = item.kind

    @property
    def shm(self) -> SharedMemory:
        """The block that holds the list."""
        return self._shm

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self)}, name={self._shm.name!r})"

    @property
    def format(self) -> str:
        """The `struct` formats of all items, in one string."""
        view = _view_of(self._shm)
        return "".join(_format_at(view, self._place(position).format) for position in range(len(self)))

    def count(self, value: object) -> int:
        """Return how many items are equal to `value`."""
        return sum(value == item for item in self)

    def index(self, value: object) -> int:
        """Return the position of the first item that is equal to `value`. Raises ValueError if there is none."""
        for position, item in enumerate(self):
            if value == item:
                return position
        raise ValueError(f"{value!r} is not in this list")

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), name=self._shm.name), ()

    def _reduce(self) -> tuple[Callable[..., Self], tuple[Any, ...]]:
        return _rebuild_list, (type(self), self._shm)


def _rebuild_list(cls: type[ShareableList[Any]], shm: SharedMemory) -> Any:
    self = cls.__new__(cls)
    self._offsets = None
    self._shm = shm
    return self


def _view_of(shm: SharedMemory) -> memoryview:
    view = shm.buf
    if view is None:
        raise ValueError(f"{shm!r} is closed")
    return view


def _size_of(count: int, data: int) -> int:
    return (count + 2) * _WORD + data + count * (_WORD + 1)


def _format_at(view: memoryview, at: int) -> str:
    return bytes(view[at : at + _WORD]).rstrip(b"\0").decode()


def _encode(value: Any, what: str, room: int | None = None) -> _Item:
    """Return `value` as it is stored in `room` bytes (None: as many as are usual)."""
    if value is None:
        return _Item(_WORD, "xxxxxx?x", _NONE, bytes(_WORD))
    if isinstance(value, bool):
        return _Item(_WORD, "xxxxxxx?", _VALUE, struct.pack("xxxxxxx?", value))
    if isinstance(value, int):
        try:
            return _Item(_WORD, "q", _VALUE, struct.pack("q", value))
        except struct.error:
            raise ValueError(f"{what} must fit into 64 bits, with its sign; found {value}") from None
    if isinstance(value, float):
        return _Item(_WORD, "d", _VALUE, struct.pack("d", value))
    if not isinstance(value, str | bytes):
        raise TypeError(f"{what} must be an int, float, bool, str, bytes or None, found {type(value).__name__}")
    data = value.encode() if isinstance(value, str) else bytes(value)
    if room is None:
        room = (len(data) // _WORD + 1) * _WORD
    if len(data) > room:
        raise ValueError(f"{what} has room for {room} bytes, found {type(value).__name__} of {len(data)}")
    format = f"{room}s"
    if len(format) > _WORD:
        raise ValueError(f"{what} is too long: found {type(value).__name__} of {len(data)} bytes")
    plain, before_end, whole = (
        (_STR, _STR_BEFORE_END, _WHOLE_STR) if isinstance(value, str) else (_BYTES, _BYTES_BEFORE_END, _WHOLE_BYTES)
    )
    if not data.endswith(b"\0"):
        kind = plain
    elif len(data) < room:
        kind, data = before_end, data + _END
    else:
        kind = whole
    return _Item(room, format, kind, data.ljust(room, b"\0"))


def _decode(value: Any, kind: int) -> Any:
    if kind == _VALUE:
        return value
    if kind == _NONE:
        return None
    if kind not in (_WHOLE_STR, _WHOLE_BYTES):
        value = value.rstrip(b"\0")
    if kind in (_STR_BEFORE_END, _BYTES_BEFORE_END):
        value = value.removesuffix(_END)
    return value.decode() if kind in _IS_STR else value
