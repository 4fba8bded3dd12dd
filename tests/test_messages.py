"""What a message is made of: its descriptors under way, its segment, and who owns both."""

from __future__ import annotations

import errno
import os
import resource
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import mappings, open_fds

from mpmemory._backends import platform
from mpmemory.connection import Pipe

# The limit of descriptors under way does not bind root (unix(7)): its capabilities go with its user id.
AS_A_PLAIN_USER = (
    "import os, resource, threading, mpmemory\n"
    "from mpmemory import Memory\n"
    "from mpmemory.connection import Pipe\n"
    "from mpmemory.queues import Queue\n"
    "_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
    "Memory(1)  # what is imported late may be root's only\n"
    "if os.getuid() == 0: os.setuid(65534)\n"
)


@pytest.mark.xdist_group("descriptors under way of one user")
def test_put_does_not_wait_for_descriptors_under_way(run_python: Any) -> None:
    run_python(
        AS_A_PLAIN_USER + "memory, queue = Memory.from_bytes(b'x'), Queue()\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (50, hard))\n"
        "for _ in range(200): queue.put(memory)\n"
        "assert all(queue.get().pread(1) == b'x' for _ in range(200))\n"
        "queue.close(); queue.join_thread()\n"
    )


@pytest.mark.xdist_group("descriptors under way of one user")
def test_a_sender_that_waits_has_no_descriptors_under_way(run_python: Any) -> None:
    """Two of them, each with half of its own under way, would wait for each other for ever."""
    run_python(
        AS_A_PLAIN_USER + "memory = Memory.from_bytes(b'x')\n"
        "many = [memory.dup() for _ in range(600)]\n"
        "(left, right), (here, there), (third, fourth) = Pipe(), Pipe(), Pipe()\n"
        "for _ in range(2): left.send(many[:150])\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (700, hard))\n"
        "thread = threading.Thread(target=here.send, args=(many,)); thread.start()\n"
        "for _ in range(2000): third.send(memory); fourth.recv()\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4000), hard))\n"
        "assert len(there.recv()) == 600\n"
        "thread.join()\n"
    )


@pytest.mark.usefixtures("never_idle")
def test_a_send_in_the_middle_of_a_send_gets_another_segment() -> None:
    """As a signal handler may, or a finalizer that the garbage collector runs."""
    left, right = Pipe()
    left.send(np.zeros(100_000))
    right.recv()
    kept = []

    def interrupt(frame: Any, event: str, _: object) -> None:
        if event == "return" and frame.f_code.co_name == "is_unshared":
            sys.setprofile(None)
            left.send(np.full(100_000, 1))
            kept.append(right.recv())

    sys.setprofile(interrupt)
    try:
        left.send(np.full(100_000, 2))
    finally:
        sys.setprofile(None)
    kept.append(right.recv())
    assert [each.sum() for each in kept] == [100_000, 200_000]
    left.close()
    right.close()


@pytest.mark.usefixtures("never_idle")
def test_a_forked_child_keeps_nothing_of_the_warm_segments() -> None:
    """The reaper is no thread of the child, but its frame is there for ever, and held them all."""
    left, right = Pipe()
    platform.can_lease()  # asked once, with descriptors of its own
    before = set(open_fds()), mappings()
    left.send(np.zeros(200_000))
    right.recv()
    assert (set(open_fds()), mappings()) != before
    if (pid := os.fork()) == 0:
        try:
            left.send((set(open_fds()), mappings()))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert right.recv() == before
    left.close()
    right.close()


def test_nothing_needs_a_folder_for_temporary_files(run_python: Any) -> None:
    run_python(
        "import tempfile, mpmemory\n"
        "tempfile.tempdir = '/proc/nowhere'  # as where every file system is read-only\n"
        "queue = mpmemory.Queue()\n"
        "assert type(queue).__module__ == 'mpmemory.queues'\n"
        "queue.put(bytes(100_000)); assert len(queue.get()) == 100_000\n",
        env={**os.environ, "MPMEMORY_BACKEND": "memfd"},
    )


def test_a_first_message_without_descriptors_decides_nothing(run_python: Any) -> None:
    run_python(
        "import errno, os, resource, mpmemory\n"
        "from mpmemory._backends import platform\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "for spare in range(5):\n"
        "    fds = []\n"
        "    try:\n"
        "        while True: fds.append(os.dup(0))\n"
        "    except OSError: pass\n"
        "    for _ in range(spare): os.close(fds.pop())\n"
        "    try: mpmemory.Queue()\n"
        "    except OSError as error: assert error.errno == errno.EMFILE, error\n"
        "    for fd in fds: os.close(fd)\n"
        "assert platform.can_lease() and platform.messages_work()\n"
    )


# --- segments of a peer that means no good ---

HEADER = struct.Struct("<2sBxIQQQ")


def send_segment(conn: Any, fd: int, length: int, buffers: int = 0) -> None:
    """Send `fd` as one with bytes in it."""
    with socket.socket(fileno=os.dup(conn.fileno())) as sock:
        socket.send_fds(sock, [HEADER.pack(b"mM", 2, 1, 0, length, buffers)], [fd])


def test_a_segment_that_its_sender_can_shrink_is_not_mapped(pipe: Any) -> None:
    """Whoever touched what was mapped would be killed by SIGBUS."""
    left, right = pipe
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.write(fd, b"x" * 100_000)
    send_segment(left, fd, 100_000)
    payload = right.receive_datagram().bytes()
    send_segment(left, fd, 100_000)
    os.ftruncate(fd, 0)
    assert payload == b"x" * 100_000
    with pytest.raises(OSError, match="a segment of 0 bytes, of which 100000 are used") as error:
        right.recv()
    assert error.value.errno == errno.EBADMSG
    os.close(fd)


def test_what_its_sender_may_only_read_is_not_opened_for_writing(pipe: Any, tmp_path: Path) -> None:
    left, right = pipe
    path = tmp_path / "victim"
    path.write_bytes(b"x" * 100_000)
    for flags in (os.O_RDONLY, os.O_PATH):
        fd = os.open(path, flags)
        send_segment(left, fd, 100_000)
        if flags == os.O_PATH:
            with pytest.raises(OSError, match="Bad file descriptor"):
                right.receive_datagram().bytes()
        else:
            right.receive_datagram().bytes()[:5] = b"owned"
        os.close(fd)
    assert path.read_bytes() == b"x" * 100_000


@pytest.mark.parametrize("sealed", [True, False])
def test_a_hole_takes_no_memory(sealed: bool, pipe: Any) -> None:
    """Of its sender neither."""
    left, right = pipe
    fd = os.memfd_create("hole", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 40)
    if sealed:
        platform.add_seals(fd, platform.F_SEAL_SHRINK | platform.F_SEAL_GROW)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for length, buffers in ((1 << 34, 0), (10, 1 << 29)):
        send_segment(left, fd, length, buffers)
        with pytest.raises(OSError, match="a segment of 0 bytes, of which") as error:
            right.recv_bytes()
        assert error.value.errno == errno.EBADMSG
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes
    assert os.fstat(fd).st_blocks == 0
    os.close(fd)


def test_buffers_of_a_segment_do_not_overlap(pipe: Any) -> None:
    """What arrives is the receiver's own, and one array not another's."""
    left, right = pipe
    fd = os.memfd_create("overlapping")
    os.write(fd, bytes(10_000))
    for table in ((100, 100, 150, 100), (1000, 100, 200, 100), (0, 100, 500, 100), (9950, 100, 10_050, 1)):
        os.pwrite(fd, struct.pack("<4Q", *table), 0)
        send_segment(left, fd, 10, 2)
        with pytest.raises(OSError, match=r"a buffer of \d+ bytes at \d+ of a segment of 10000 bytes"):
            right.recv()
    os.close(fd)
