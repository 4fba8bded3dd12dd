"""What a message is made of: its descriptors under way, its segment, and who owns both."""

from __future__ import annotations

import os
import sys
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
