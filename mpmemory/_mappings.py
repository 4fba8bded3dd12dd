"""Mappings of shared memory that know it: which memory is at an address, and one mapping for all of a memory."""

from __future__ import annotations

import bisect
import errno
import mmap
import os
import stat
import threading
import time
import weakref

from . import _reaper
from ._backends import platform
from ._fds import OwnedFd, budget
from ._reaper import reaper
from .errors import failed
from .memory import Memory


class Mapping(mmap.mmap):
    """A mapping of shared memory. Never closed, only dropped: it goes with the last view of it."""

    fd: OwnedFd
    label: str
    start: int  # where in the memory it begins, in bytes
    _memory: Memory | None = None
    _address: int | None = None

    @property
    def memory(self) -> Memory:
        """A handle on the memory: always the same one, which a pickler sends only once."""
        if self._memory is None:
            self._memory = Memory._own(self.fd, self.label)
        return self._memory

    @property
    def address(self) -> int:
        """Where in this process it begins."""
        if self._address is None:
            from numpy import frombuffer  # only arrays are looked for

            self._address = int(frombuffer(self, "u1").ctypes.data)
        return self._address


def map_memory(memory: Memory, length: int, start: int, access: int) -> Mapping:
    """Map `length` bytes of `memory` from `start` on, a multiple of the page size.

    Raises HandleLostError, ValueError if it is closed, OSError.
    """
    fd = memory._open()  # held until it is mapped: another thread may close the handle
    number = fd.fileno()
    try:
        # Not if it came from elsewhere, and is none: a device may have any memory, or none.
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise OSError(errno.ENODEV, "")
        mapping = platform.map_fd(Mapping, number, length, access=access, offset=start)
    except OSError as error:
        raise failed(f"cannot map {length} bytes of memory {memory.name!r}", error) from None
    assert isinstance(fd, OwnedFd)
    mapping.fd, mapping.label, mapping.start = fd, memory.name, start
    if access != mmap.ACCESS_COPY:  # that one is private to this process
        _add(mapping)
    return mapping


# --- by address -----------------------------------------------------------------------------------

# All there are. A reference is dead before the memory is unmapped, so that no address is taken for a mapping
# that is gone.
_live: set[weakref.ref[Mapping]] = set()
_state = object()  # another one after each new mapping


class _Index:
    def __init__(self, state: object, addresses: list[int], references: list[weakref.ref[Mapping]]) -> None:
        self.state = state
        self.addresses = addresses  # sorted
        self.references = references


_index = _Index(None, [], [])


def _add(mapping: Mapping) -> None:
    global _state
    _live.add(weakref.ref(mapping, _live.discard))
    _state = object()


def _build_index() -> _Index:
    state = _state  # before it is looked at: whatever comes from now on makes this index out of date
    mappings = [(reference(), reference) for reference in list(_live)]
    entries = sorted((mapping.address, place) for place, (mapping, _) in enumerate(mappings) if mapping is not None)
    return _Index(state, [address for address, _ in entries], [mappings[place][1] for _, place in entries])


def find(address: int) -> tuple[Mapping, int] | None:
    """Return the mapping that this address of the process is in, and the offset in the memory; None if in none."""
    global _index
    index = _index
    if index.state is not _state:
        _index = index = _build_index()
    place = bisect.bisect_right(index.addresses, address) - 1
    if place < 0:
        return None
    mapping = index.references[place]()
    offset = address - index.addresses[place]
    if mapping is None or offset >= len(mapping):
        return None
    return mapping, mapping.start + offset


# --- by memory ------------------------------------------------------------------------------------

Key = tuple[int, int, bool]  # device and inode, and whether it is to be written to

_lock = threading.RLock()
_whole: weakref.WeakValueDictionary[Key, Mapping] = weakref.WeakValueDictionary()
_warm: dict[Key, tuple[Mapping, float]] = {}  # with the last use, on the monotonic clock; in the order of use

#: What is kept warm has so many bytes in all, at most, or is one mapping: perhaps nobody else has it any more.
WARM_MAX = platform.physical_memory() // 8


def map_whole(memory: Memory, *, write: bool = True, keep_warm: bool = False) -> Mapping:
    """Map all of `memory`: once in this process, as long as anything views it.

    Not to `write` gives a mapping that cannot be written to. To write also gives such a one, if this process
    cannot have another (any more). `keep_warm` keeps the mapping for a while longer, since the next message may
    be about the same memory. If the memory has grown, what is new is in the next mapping. Raises as `map_memory`.
    """
    status = os.fstat(memory.fileno())
    key = status.st_dev, status.st_ino, write
    with _lock:
        mapping = _whole.get(key)
        if mapping is None or len(mapping) < status.st_size:
            access = mmap.ACCESS_WRITE if write else mmap.ACCESS_READ
            try:
                mapping = map_memory(memory, status.st_size, 0, access)
            except PermissionError:  # somebody may have sealed it just now
                mapping = map_memory(memory, status.st_size, 0, mmap.ACCESS_READ)
            _whole[key] = mapping
        if keep_warm:
            is_new = _warm.pop(key, None) is None
            _warm[key] = mapping, time.monotonic()
            if is_new:
                _release_excess()
            reaper.watch(_release_idle)
    return mapping


def _release_excess() -> None:
    """Give up what was not used for longest: of many memories that come once each, few descriptors and bytes stay."""
    entries = list(_warm.items())  # a copy: a signal handler may receive arrays, too
    nbytes = sum(len(mapping) for _, (mapping, _) in entries)
    for key, (mapping, _) in entries[:-1]:
        if len(_warm) <= budget() // 4 and nbytes <= WARM_MAX:
            return
        _warm.pop(key, None)
        nbytes -= len(mapping)


def _release_idle() -> bool:
    return release(time.monotonic() - _reaper.IDLE_TIMEOUT)


def release(before: float) -> bool:
    """Give up what was not used since `before`, on the monotonic clock, and return whether anything is left."""
    with _lock:
        for key, (_, last_used) in list(_warm.items()):
            if last_used < before:
                del _warm[key]
        return bool(_warm)


def _start_anew() -> None:
    """In a forked child: it keeps the arrays that it has inherited, not what its parent kept warm."""
    global _lock
    _lock = threading.RLock()
    _warm.clear()


os.register_at_fork(after_in_child=_start_anew)
