"""What the other processes of test_channels run: apart, since a spawned one imports it, and need not import pytest."""

from __future__ import annotations

import os
from typing import Any

from mpmemory import Memory, SharedBuffer, _backends

SIZE = 10_001  # not a whole number of pages
SENT = b"from the parent"
ANSWER = b"from the child"


def answer(memory: Memory, buffer: SharedBuffer) -> str:
    """Check what a child sees of a memory and a buffer of the parent's, and write the answer into both."""
    assert memory.size == SIZE
    assert buffer.size == SIZE - 100
    assert buffer.offset == 100
    assert not os.get_inheritable(memory.fileno())
    assert memory.pread(len(SENT)) == SENT
    assert buffer.get_bytes(0, len(SENT)) == SENT
    memory.pwrite(ANSWER, 50)
    buffer.set_bytes(ANSWER, 50)
    return memory.name


def answer_pair(pair: tuple[Memory, SharedBuffer]) -> str:
    return answer(*pair)


def make(label: str) -> tuple[Memory, SharedBuffer]:
    """Create memory in a child, for the parent to see."""
    memory = Memory(SIZE, name=label)
    memory.pwrite(ANSWER, 50)
    other = Memory(SIZE, name=label)
    buffer = other.map(offset=100)
    buffer.set_bytes(ANSWER, 50)
    other.close()
    return memory, buffer


def backend_of_this_process() -> str:
    return _backends.chosen().name


_from_initializer: list[Any] = []


def keep(*args: Any) -> None:
    _from_initializer.extend(args)


def answer_kept(_: object) -> str:
    return answer(*_from_initializer)


def serve_pipe(conn: Any) -> None:
    conn.send(answer(*conn.recv()))
    conn.send(make("child"))
    assert conn.recv() == "seen"
    conn.close()


def serve_queues(requests: Any, results: Any) -> None:
    results.put(answer(*requests.get()))
    results.put(make("child"))
