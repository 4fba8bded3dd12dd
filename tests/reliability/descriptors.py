"""Descriptors of all kinds, for those who expect memory."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import tempfile
from collections.abc import Callable, Iterator

from mpmemory import Memory
from mpmemory._backends import platform

SIZE = 50_000  # bytes, of what has contents


def _pipe(end: int) -> int:
    ends = os.pipe()
    os.close(ends[1 - end])
    return ends[end]


def _socket(kind: socket.SocketKind, waiting: int = 0) -> int:
    """Return one end of a pair whose other end is closed, with so many messages of a descriptor waiting in it."""
    here, there = socket.socketpair(socket.AF_UNIX, kind)
    with here:
        for _ in range(waiting):
            socket.send_fds(here, [b"x"], [here.fileno()] * 250)
    return there.detach()


def _memfd(seals: int = 0, size: int = SIZE) -> int:
    fd = os.memfd_create("foreign", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if seals:
        platform.add_seals(fd, seals)
    return fd


def _memory() -> int:
    with Memory(SIZE) as memory:
        return os.dup(memory.fileno())


def _file(flags: int) -> int:
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(SIZE)
        return os.open(file.name, flags)


def _reopened(flags: int) -> int:
    fd = _memfd()
    try:
        return os.open(f"/proc/self/fd/{fd}", flags)
    finally:
        os.close(fd)


def _fifo() -> int:
    with tempfile.TemporaryDirectory() as folder:
        os.mkfifo(f"{folder}/fifo")
        return os.open(f"{folder}/fifo", os.O_RDONLY | os.O_NONBLOCK)


_FIXED = platform.F_SEAL_SHRINK | platform.F_SEAL_GROW

#: By name, what makes one.
KINDS: dict[str, Callable[[], int]] = {
    "reading end of a pipe": lambda: _pipe(0),
    "writing end of a pipe": lambda: _pipe(1),
    "FIFO": _fifo,
    "stream socket": lambda: _socket(socket.SOCK_STREAM),
    "datagram socket": lambda: _socket(socket.SOCK_DGRAM),
    "socket with descriptors waiting": lambda: _socket(socket.SOCK_SEQPACKET, waiting=3),
    "stream socket with descriptors waiting": lambda: _socket(socket.SOCK_STREAM, waiting=3),
    "internet socket": lambda: socket.socket().detach(),
    "/dev/zero": lambda: os.open("/dev/zero", os.O_RDWR),
    "/dev/null": lambda: os.open("/dev/null", os.O_RDWR),
    "directory": lambda: os.open("/", os.O_RDONLY),
    "file in /proc": lambda: os.open("/proc/self/maps", os.O_RDONLY),
    "own memory in /proc": lambda: os.open("/proc/self/mem", os.O_RDONLY),
    "path only": lambda: _file(os.O_PATH),
    "file to read": lambda: _file(os.O_RDONLY),
    "file to write": lambda: _file(os.O_WRONLY),
    "file to append": lambda: _file(os.O_RDWR | os.O_APPEND),
    "memfd to read": lambda: _reopened(os.O_RDONLY),
    "memfd to write": lambda: _reopened(os.O_WRONLY),
    "memfd": _memfd,
    "sealed memfd": lambda: _memfd(_FIXED),
    "memfd sealed against writing": lambda: _memfd(_FIXED | 0x0008),
    "empty memfd": lambda: _memfd(size=0),
    "memfd of 8 EB": lambda: _memfd(size=2**63 - 1),
    "sealed memfd of 16 TB": lambda: _memfd(_FIXED, 1 << 44),
    "eventfd": lambda: os.eventfd(1),
    "epoll": lambda: _detached(select.epoll()),
    "pidfd": lambda: os.pidfd_open(os.getpid()),
    "memory": _memory,
}


def _detached(poller: select.epoll) -> int:
    with poller:
        return os.dup(poller.fileno())


@contextlib.contextmanager
def opened(*kinds: str) -> Iterator[list[int]]:
    """Open one of each of these kinds, and close them."""
    with contextlib.ExitStack() as stack:
        fds = []
        for kind in kinds:
            fds.append(KINDS[kind]())
            stack.callback(os.close, fds[-1])
        yield fds


def peak_memory() -> int:
    """Return how many bytes this process has had resident, at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@contextlib.contextmanager
def address_space(more: int) -> Iterator[None]:
    """Let this process map so many bytes more than it has now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
