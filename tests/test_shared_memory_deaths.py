"""SharedMemory whose creator, users, or all of them are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import START_METHODS, eventually, shm_names
from test_lifetime import SIZE, shared_memory, wait_for_shared_memory_below

from mpmemory.shared_memory import SharedMemory

# They look at the shared memory of the whole machine: one after the other.
pytestmark = pytest.mark.xdist_group("shared memory of the machine")

CREATE = f"""
import sys
from mpmemory.shared_memory import ShareableList, SharedMemory
block = SharedMemory(create=True, size={SIZE})
block.buf[:] = b"x" * {SIZE}
items = ShareableList([0, "text"])
print(block.name, items.shm.name, flush=True)
if sys.stdin.readline() == "leave\\n":
    sys.exit()
"""

ATTACH = """
import sys
from mpmemory.shared_memory import SharedMemory
block = SharedMemory(sys.argv[1])
block.buf[0] = 1
print("attached", flush=True)
sys.stdin.readline()
print(block.buf[0], flush=True)
"""


class Program:
    """A program that waits for a line, and is killed with all that it started."""

    def __init__(self, source: str, *args: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", source, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def read(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()

    def tell(self, line: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)

    def errors(self) -> str:
        """Wait until all of it has ended, and return its standard error."""
        return self._process.communicate(timeout=60)[1]


@pytest.fixture
def start() -> Iterator[Any]:
    programs: list[Program] = []

    def start(*arguments: str) -> Program:
        programs.append(Program(*arguments))
        return programs[-1]

    yield start
    for program in programs:
        if program._process.poll() is None:
            program.kill()
        program._process.communicate(timeout=60)


@pytest.mark.parametrize("end", ["leave", "kill"])
def test_those_attached_go_on_without_the_creator(end: str, start: Any) -> None:
    names, before = shm_names(), shared_memory()
    creator = start(CREATE)
    name, _ = creator.read().split()
    attacher = start(ATTACH, name)
    assert attacher.read() == "attached"
    block = SharedMemory(name)
    if end == "leave":
        creator.tell("leave")
    else:
        creator.kill()
    assert creator.errors() == ""
    with pytest.raises(FileNotFoundError):
        SharedMemory(name)
    attacher.tell("go on")
    assert attacher.read() == "1"
    assert attacher.errors() == ""
    assert bytes(block.buf[:3]) == b"\1xx"
    assert block._buffer
    assert block._buffer.memory.resident == SIZE
    block.close()
    wait_for_shared_memory_below(before + SIZE // 2)
    eventually(lambda: shm_names() <= names)


def test_the_creator_goes_on_without_a_killed_attacher(start: Any) -> None:
    creator = start(CREATE)
    name, _ = creator.read().split()
    attacher = start(ATTACH, name)
    assert attacher.read() == "attached"
    attacher.kill()
    assert attacher.errors() == ""
    block = SharedMemory(name)
    assert bytes(block.buf[:3]) == b"\1xx"
    block.unlink()
    creator.tell("leave")
    assert creator.errors() == ""


GROUP = f"""
import sys
import mpmemory
from mpmemory.shared_memory import ShareableList, SharedMemory

def attach(name, items, block, ready):
    attached = SharedMemory(name)
    own = SharedMemory(create=True, size=1 << 20)
    own.buf[0] = attached.buf[0] = block.buf[1] = items[0] = 1
    ready.put(own)
    sys.stdin.close()
    ready.join()

if __name__ == "__main__":
    ctx = mpmemory.get_context(sys.argv[1])
    block = SharedMemory(create=True, size={SIZE})
    block.buf[:] = b"x" * {SIZE}
    items = ShareableList([0, "text"])
    ready = ctx.JoinableQueue()
    for _ in range(2):
        ctx.Process(target=attach, args=(block.name, items, block, ready)).start()
    kept = [ready.get() for _ in range(2)]
    print("ready", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("method", START_METHODS)
def test_killing_the_whole_group_leaves_nothing(method: str, tmp_path: Path) -> None:
    names, before = shm_names(), shared_memory()
    path = tmp_path / "group.py"
    path.write_text(GROUP)
    group = subprocess.Popen(
        [sys.executable, path, method],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    try:
        assert group.stdout
        assert group.stdout.readline() == b"ready\n"
    finally:
        os.killpg(group.pid, signal.SIGKILL)
    _, errors = group.communicate(timeout=30)  # returns when no process has its standard error any more
    assert errors == b""
    wait_for_shared_memory_below(before + SIZE // 2)
    eventually(lambda: shm_names() <= names)
