"""Recycled segments: big payloads at the speed of memcpy.

Fresh shared pages cost ten times more than warm ones, so a sender uses its segments again. Who uses a
segment is known to the kernel alone, by locks of open file descriptions (fcntl(2), F_OFD_SETLK):

    sender      owns the segment, through a description of its own
    message     carries a lease: another description of the segment, with a read lock on it
    receiver    holds the lease as long as it uses what arrived, then closes it

A lease ends when its last descriptor is closed: by the receiver, by the kernel when the receiver dies, by
the kernel when the message is never read. The owner may use a segment again when it can take the write
lock. No counter is shared, so nothing needs repair after a crash.

The receiver maps the segment through yet another description, and keeps the mapping warm: a mapping keeps
its description alive, and would keep the lock.

Where there are no such locks a segment is used once.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Sequence
from typing import ClassVar

from . import _backends, _reaper
from ._backends import platform
from ._fds import OwnedFd, budget
from ._reaper import reaper
from .errors import failed

#: The least size of a segment in bytes. Sizes are powers of two.
MIN_SIZE = 1 << 16

# What the system says when there is no memory, no room in /dev/shm, or no descriptor.
_SHORT = {errno.ENOMEM, errno.ENOSPC, errno.EMFILE, errno.ENFILE}

#: What the offset of a buffer in a segment is a multiple of, in bytes.
ALIGNMENT = 64


class Segment:
    """Memory that this process fills and sends, again and again. Used by one thread at a time."""

    def __init__(self, size: int) -> None:
        """Create a segment of `size` bytes. Raises OSError."""
        try:
            self.fd = OwnedFd(_backends.chosen().create("mpmemory-segment"))
            platform.grow(self.fd.fileno(), size)
            platform.seal_size(self.fd.fileno())
        except OSError as error:
            raise failed(f"cannot have a segment of {size} bytes", error) from None
        self.size = size
        self.last_used = 0.0  # on the monotonic clock; 0 is never
        self._view: memoryview | None = None

    def fill(self, parts: Sequence[tuple[int, memoryview]]) -> None:
        """Copy each part to its offset. Raises OSError."""
        if self.last_used and self._view is None:
            self._view = memoryview(_map(self.fd, self.size))
        for offset, part in parts:
            if self._view is not None:
                self._view[offset : offset + len(part)] = part
            else:
                # On fresh memory write(2) is twice as fast: nothing is zeroed first, and nothing faults.
                platform.write_all(self.fd.fileno(), part, offset)

    def lease(self) -> OwnedFd:
        """Return a new lease. Raises OSError."""
        try:
            if not platform.can_lease():
                return self.fd
            fd = OwnedFd(platform.reopen(self.fd.fileno()))
            platform.share_lock(fd.fileno())
        except OSError as error:
            raise failed("cannot open a segment for a message", error) from None
        return fd


def _map(fd: OwnedFd, size: int) -> mmap.mmap:
    try:
        return platform.map_fd(mmap.mmap, fd.fileno(), size, access=mmap.ACCESS_WRITE, offset=0)
    except OSError as error:
        raise failed(f"cannot map a segment of {size} bytes", error) from None


class Warm:
    """What this process keeps warm for the next message: segments to send in, mappings of those received."""

    def __init__(self) -> None:
        self.start_anew()

    def start_anew(self) -> None:
        """Begin with nothing: also in a forked child, which closes its copies of what is the parent's."""
        self._lock = threading.RLock()
        self._segments: dict[int, list[Segment]] = {}  # by size
        self._mappings: dict[tuple[int, int], tuple[mmap.mmap, float]] = {}  # by identity; with the last use

    def take(self, size: int) -> Segment:
        """Return a segment of at least `size` bytes that nobody uses; give it back when it is sent."""
        size = max(MIN_SIZE, 1 << (size - 1).bit_length())
        with self._lock:
            # All are out of reach meanwhile: a signal handler that sends now must not take the one we are looking at.
            free = self._segments.pop(size, [])
            try:
                for index, segment in enumerate(free):
                    if platform.is_unshared(segment.fd.fileno()):
                        return free.pop(index)
            finally:
                if free:
                    self._segments.setdefault(size, []).extend(free)
        try:
            return Segment(size)
        except OSError as error:
            if error.errno not in _SHORT:
                raise
            self.release(float("inf"))  # what is only kept for later makes room
            return Segment(size)

    def give_back(self, segment: Segment) -> None:
        if platform.can_lease():
            segment.last_used = time.monotonic()
            with self._lock:
                self._segments.setdefault(segment.size, []).append(segment)
                reaper.watch(self._release_idle)

    def mapping(self, lease: OwnedFd) -> mmap.mmap:
        """Return a mapping of the whole segment of `lease`, the same as for the message before. Raises OSError."""
        status = os.fstat(lease.fileno())
        identity = status.st_dev, status.st_ino
        with self._lock:
            mapping, _ = self._mappings.get(identity, (None, 0))
            if mapping is None:
                fd = OwnedFd(platform.reopen(lease.fileno())) if platform.can_lease() else lease
                mapping = _map(fd, status.st_size)
            if platform.can_lease():
                self._mappings[identity] = mapping, time.monotonic()
                reaper.watch(self._release_idle)
        return mapping

    def _release_idle(self) -> bool:
        return self.release(time.monotonic() - _reaper.IDLE_TIMEOUT)

    def release(self, before: float) -> bool:
        """Give up what was not used since `before`, on the monotonic clock, and return whether anything is left."""
        with self._lock:
            for size, segments in list(self._segments.items()):
                segments[:] = [segment for segment in segments if segment.last_used >= before]
                if not segments:
                    del self._segments[size]
            for identity, (_, last_used) in list(self._mappings.items()):
                if last_used < before:
                    del self._mappings[identity]
            return bool(self._segments or self._mappings)


warm = Warm()

# Not another Warm: the reaper may look after this one already.
os.register_at_fork(after_in_child=warm.start_anew)


class Lease:
    """The right to use what a segment holds, of the receiver of a message. Ends when this object goes."""

    # The numbers of all. Set operations are atomic: leases end in any thread, at any time.
    _held: ClassVar[set[int]] = set()

    def __init__(self, fd: OwnedFd) -> None:
        """Take over `fd`, and map its segment. Raises OSError."""
        self._fd = fd
        self.mapping = warm.mapping(fd)
        self._held.add(fd.fileno())

    def __del__(self) -> None:
        self._held.discard(self._fd.fileno())

    @classmethod
    def is_within_budget(cls) -> bool:
        """Return whether this process may keep one more."""
        return len(cls._held) < budget()

    def view(self, offset: int, length: int) -> memoryview:
        """Return a writable view of a part of the segment; the lease lasts as long as anything made from it."""
        import ctypes  # not before something big has come: that takes more than a millisecond

        part = (ctypes.c_char * length).from_buffer(self.mapping, offset)
        part.lease = self  # type: ignore[attr-defined]  # whoever exports a buffer is kept by who imports it
        return memoryview(part).cast("B")
