"""What a message is made of: its descriptors under way, its segment, and who owns both."""

from __future__ import annotations

from typing import Any

import pytest

# The limit of descriptors under way does not bind root (unix(7)): its capabilities go with its user id.
AS_A_PLAIN_USER = (
    "import os, resource, threading, mpmemory\n"
    "from mpmemory import Memory\n"
    "from mpmemory.connection import Pipe\n"
    "from mpmemory.queues import Queue\n"
    "_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
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
