"""What this operating system offers beside memory: seals, labels, allocation, pidfds, cache lines.

The one place that asks which system this is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import mmap
import os
import re
import select
import shutil
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self, TypeVar

M = TypeVar("M", bound=mmap.mmap)

# <linux/fcntl.h>. Python's fcntl has them on Linux only, and F_SEAL_FUTURE_WRITE from 3.13 on.
F_ADD_SEALS = 1033
F_GET_SEALS = 1034
F_SEAL_SEAL = 0x0001
F_SEAL_SHRINK = 0x0002
F_SEAL_GROW = 0x0004
_FIXED = F_SEAL_SHRINK | F_SEAL_GROW

#: What one read(2) or write(2) transfers at most (Linux, write(2)).
MAX_TRANSFER = 0x7FFFF000

#: Receive descriptors close-on-exec (0 where the system lacks it: they are then set so one by one).
MSG_CMSG_CLOEXEC = int(
    getattr(socket, "MSG_CMSG_CLOEXEC", 0)
)  # a plain int: "|" of an enum takes longer than receiving

#: Whether Unix sockets can have names that are in no folder, and go with the socket (unix(7)).
ABSTRACT_SOCKETS = sys.platform == "linux"

# What is before a label: of all memfds, and of those that the backend makes.
_OUR_LABEL = re.compile(r"memfd:(mpmemory:\d+:)?")

# What stands for no limit in the cgroups of version 1 is about 2**63.
_NO_LIMIT = 1 << 60

# What poll(2) waits at most, in milliseconds.
_MAX_POLL = 2**31 - 1

# How often a process is looked for where there are no pidfds, in seconds.
_WATCH_INTERVAL = 0.2


def seals(fd: int) -> int:
    """Return the seals of `fd` (F_GET_SEALS, fcntl(2)); 0 where there can be none."""
    return _seals(fd) or 0


def _seals(fd: int) -> int | None:
    if sys.platform != "linux":
        return None
    try:
        return fcntl.fcntl(fd, F_GET_SEALS)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: not a memfd, nor on tmpfs
            raise
        return None


def is_in_memory(fd: int) -> bool:
    """Return whether the file of `fd` is a memfd, or on a tmpfs. False where that is not known."""
    return _seals(fd) is not None


def add_seals(fd: int, wanted: int) -> None:
    """Add seals (F_ADD_SEALS, fcntl(2)). Raises OSError, ENOTSUP where there can be none."""
    try:
        # That seal alone: on a tmpfs, or a memfd that can have no others.
        if sys.platform != "linux" or seals(fd) == F_SEAL_SEAL:
            raise OSError(errno.EINVAL, "")
        fcntl.fcntl(fd, F_ADD_SEALS, wanted)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: not a memfd, or a kernel that does not know the seal
            raise
        raise OSError(errno.ENOTSUP, "") from None


def grow(fd: int, size: int) -> None:
    """Make the file of `fd` at least `size` bytes long. It never becomes shorter, whoever else grows it too.

    On a memfd of ours no page is allocated. Elsewhere all new ones are, since there a full file system is a
    SIGBUS at the first touch, instead of an ENOSPC here.
    """
    if seals(fd) & F_SEAL_SHRINK:
        try:
            os.ftruncate(fd, size)
        except PermissionError:
            # Somebody grew it further in the meantime: what is left to do is shrinking, which is sealed.
            if os.fstat(fd).st_size < size:
                raise
    elif hasattr(os, "posix_fallocate"):
        # Not from 0 on: that would fill what somebody else has left out.
        if size > (now := os.fstat(fd).st_size):
            os.posix_fallocate(fd, now, size - now)
    elif os.fstat(fd).st_size < size:
        os.ftruncate(fd, size)


def grow_takes_memory(fd: int) -> bool:
    """Return whether `grow` takes memory for what it adds to the file of `fd`."""
    return is_in_memory(fd) and not seals(fd) & F_SEAL_SHRINK


def available_memory() -> int | None:
    """Return how many bytes this process can still have: on the machine, and within its cgroups. None: not known."""
    machine = available_on_machine()
    return min(available_in_cgroups() if machine is None else (machine, *available_in_cgroups()), default=None)


def available_on_machine() -> int | None:
    """Return how many bytes the kernel takes for available; None if it does not tell."""
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def physical_memory() -> int:
    """Return how many bytes of memory the machine has; 1 GB where the system does not tell."""
    with contextlib.suppress(ValueError, OSError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 1 << 30


def available_in_cgroups() -> Iterator[int]:
    """Yield what is left of the limit of each memory cgroup that this process is in (cgroups(7))."""
    lines = _read("/proc/self/cgroup").splitlines()
    for number, controllers, path in (line.split(":", 2) for line in lines):
        if number == "0":
            root, limit, usage, cache = "/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage, cache = (
                "/sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        # In a container the path may be that of the host, where the container's own cgroup is the root.
        parts = path.strip("/").split("/")
        for count in range(len(parts), -1, -1):
            folder = "/".join([root, *parts[:count]])
            maximum, used = _read(f"{folder}/{limit}"), _read(f"{folder}/{usage}")
            if maximum.strip().isdigit() and used.strip().isdigit() and int(maximum) < _NO_LIMIT:
                statistics = dict(line.split(" ", 1) for line in _read(f"{folder}/memory.stat").splitlines())
                # Files that nobody has used for a while give way.
                yield max(int(maximum) - int(used) + int(statistics.get(cache, 0)), 0)


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def map_fd(kind: type[M], fd: int, length: int, *, access: int, offset: int) -> M:
    """Map `length` bytes from the page-aligned `offset` on, as mmap or a subclass. It does not need `fd` afterwards."""
    if sys.version_info >= (3, 13):
        return kind(fd, length, access=access, offset=offset, trackfd=False)
    return kind(fd, length, access=access, offset=offset)  # holds a dup of fd until unmapped


def write_all(fd: int, view: memoryview, offset: int) -> None:
    """Write the bytes of `view` at `offset`."""
    while view:
        written = os.pwrite(fd, view[:MAX_TRANSFER], offset)
        view = view[written:]
        offset += written


def read_all(fd: int, view: memoryview, offset: int) -> None:
    """Fill `view` with the bytes from `offset` on. Raises OSError, EIO if they end before."""
    while view:
        count = os.preadv(fd, [view[:MAX_TRANSFER]], offset)
        if not count:
            raise OSError(errno.EIO, "")
        view = view[count:]
        offset += count


def copy(source: int, target: int) -> None:
    """Copy `source` from its position to its end into `target`, in the kernel where it can."""
    copied = 0
    try:
        while count := os.sendfile(target, source, copied, 1 << 30):
            copied += count
    except OSError as error:
        # sendfile(2): EINVAL where the source cannot be mapped, or the target (not Linux) is no socket.
        if copied or error.errno not in {errno.EINVAL, errno.ENOSYS, errno.ENOTSOCK, errno.EOPNOTSUPP}:
            raise
        # Buffered, for it writes again what the kernel has written only a part of.
        with open(source, "rb", 0, closefd=False) as reader, open(target, "wb", closefd=False) as writer:
            shutil.copyfileobj(reader, writer)


def label_of(fd: int) -> str | None:
    """Return the name under which the system shows `fd`, without its folder; None if it does not tell."""
    try:
        path = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return None
    return _OUR_LABEL.sub("", os.path.basename(path.removesuffix(" (deleted)")))


def is_path_only(flags: int) -> bool:
    """Return whether the open flags are those of an O_PATH descriptor, which can be neither read nor mapped."""
    return bool(flags & getattr(os, "O_PATH", 0))


def peer_uid(sock: socket.socket) -> int | None:
    """Return the user at the other end of a connected Unix socket (SO_PEERCRED); None if the system does not tell."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(uid)


def cache_line_size() -> int:
    """Return the size of a data cache line in bytes; 64 where the system does not tell."""
    with contextlib.suppress(ValueError, OSError):
        return max(os.sysconf("SC_LEVEL1_DCACHE_LINESIZE"), 0) or 64
    return 64


def open_pidfd(pid: int) -> int:
    """Return a descriptor that is readable from the end of process `pid` on; -1 if there can be none.

    Raises ProcessLookupError if there is no such process.
    """
    if hasattr(os, "pidfd_open"):
        try:
            return os.pidfd_open(pid)
        except OSError as error:
            # ENOSYS: an older kernel; EPERM: a container's filter of system calls; or no descriptor is left.
            if error.errno not in {errno.ENOSYS, errno.EPERM, errno.EMFILE, errno.ENFILE}:
                raise
    return -1


class ProcessWatch:
    """Wait for a descriptor, but no longer than a certain process lives.

    By pidfd (Linux 5.3), which is readable from the process's end on; elsewhere by looking five times a second.
    """

    def __init__(self, pid: int) -> None:
        """Watch `pid`. Raises ProcessLookupError if there is no such process."""
        self._pid = pid
        self._pidfd = open_pidfd(pid)

    def wait_readable(self, fd: int, deadline: float) -> None:
        """Wait until `fd` is readable (or at its end).

        Raises ProcessLookupError if the process is gone before, TimeoutError if `time.monotonic()`
        reaches `deadline` before.
        """
        while not self.wait([fd], deadline):
            pass

    def wait(self, fds: list[int], deadline: float) -> bool:
        """Wait until one of `fds` is readable, and return whether it is: without pidfds only for a moment.

        With no `fds`, just look after the process. Raises as `wait_readable`.
        """
        left = max(deadline - time.monotonic(), 0) if fds else 0
        if self._pidfd >= 0:
            ready = poll([*fds, self._pidfd], left)
            gone = self._pidfd in ready
        else:
            ready = poll(fds, min(left, _WATCH_INTERVAL))
            gone = not _exists(self._pid)
        if ready.intersection(fds):
            return True
        if gone:
            raise ProcessLookupError(errno.ESRCH, f"process {self._pid} is gone")
        if time.monotonic() >= deadline:
            raise TimeoutError(errno.ETIMEDOUT, f"process {self._pid} did not answer in time")
        return False

    def close(self) -> None:
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True


def poll(fds: list[int], timeout: float | None) -> set[int]:
    """Return which of `fds` are readable, at their end or broken, within `timeout` seconds (None: ever)."""
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    # poll(2) takes an int of milliseconds: no wait is longer than 24 days.
    return {fd for fd, _ in poller.poll(None if timeout is None else min(timeout * 1000, _MAX_POLL))}


def kill_at_hangup(fd: int) -> None:
    """Have the kernel kill this process when nobody can write any more to the pipe that `fd` reads from. Linux only.

    The pipe is never written to. Raises OSError.
    """
    # Owner and flags belong to the open file description: this process needs one of its own, for ever.
    own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    fcntl.fcntl(own, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(own, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(own, fcntl.F_SETFL, fcntl.fcntl(own, fcntl.F_GETFL) | os.O_ASYNC)
    if poll([own], 0):  # it has happened before
        os.kill(os.getpid(), signal.SIGKILL)


# --- open file descriptions and their locks -------------------------------------------------------

# <linux/fcntl.h>; struct flock on 64-bit: type, whence, start, length (0: to the end), pid.
_F_OFD_SETLK = 37
_F_OFD_SETLKW = 38
_FLOCK = struct.Struct("hhqqi4x")


def flock(kind: int, start: int = 0, length: int = 0) -> bytes:
    """Return a `struct flock`: what to do (F_RDLCK, F_WRLCK, F_UNLCK) with which bytes; a length of 0 is to the end."""
    return _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)


def ofd_lock(fd: int, what: bytes, *, wait: bool = False) -> None:
    """Lock or unlock bytes, as a `flock` says, for the open file description of `fd`.

    Raises BlockingIOError if a lock of another description is in the way, and it is not to wait; OSError.
    """
    fcntl.fcntl(fd, _F_OFD_SETLKW if wait else _F_OFD_SETLK, what)


_READ_ALL, _WRITE_ALL, _UNLOCK_ALL = flock(fcntl.F_RDLCK), flock(fcntl.F_WRLCK), flock(fcntl.F_UNLCK)


def share_lock(fd: int) -> None:
    """Take the read lock for the open file description of `fd`; BlockingIOError if another has the write lock."""
    ofd_lock(fd, _READ_ALL)


def is_unshared(fd: int) -> bool:
    """Return whether no other open file description has a lock on the file of `fd`."""
    try:
        ofd_lock(fd, _WRITE_ALL)
    except BlockingIOError:
        return False
    ofd_lock(fd, _UNLOCK_ALL)
    return True


@functools.cache
def has_proc() -> bool:
    """Return whether the descriptors of processes can be opened in /proc, for being looked at too (O_PATH)."""
    return hasattr(os, "O_PATH") and os.path.isdir("/proc/self/fd")


def reopen(fd: int, flags: int = os.O_RDWR) -> int:
    """Return a descriptor of a new open file description on the file of `fd`, for reading and writing."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)


def seal_size(fd: int) -> None:
    """Forbid to change the size of a memfd any more; elsewhere there are no seals."""
    if seals(fd) & F_SEAL_SHRINK:
        fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SEAL)


def has_fixed_size(fd: int) -> bool:
    """Return whether nobody can change the size of the file of `fd` any more: it was sealed so."""
    return seals(fd) & _FIXED == _FIXED


@functools.cache
def can_lease() -> bool:
    """Return whether there are OFD locks, and a /proc to open descriptions anew. Raises OSError (EMFILE)."""
    if sys.platform != "linux":
        return False
    from . import chosen  # imported late: the backends are above this module

    probe = chosen().create("mpmemory-probe")
    fd = -1
    try:
        fd = reopen(probe)
        share_lock(fd)
        return not is_unshared(probe)
    except OSError as error:
        if error.errno in {errno.EMFILE, errno.ENFILE}:  # that says nothing about the system
            raise
        return False
    finally:
        os.close(probe)
        if fd >= 0:
            os.close(fd)


@functools.cache
def messages_work() -> bool:
    """Return whether all is there that our connections and queues need: SEQPACKET, eventfds, leases.

    Raises OSError (EMFILE).
    """
    if not hasattr(socket, "SOCK_SEQPACKET") or not hasattr(os, "eventfd"):
        return False
    try:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        if error.errno in {errno.EMFILE, errno.ENFILE}:
            raise
        return False
    left.close()
    right.close()
    return can_lease()
