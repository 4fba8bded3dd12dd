"""Memory goes with its last holder, however that one ends."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import START_METHODS, eventually

from mpmemory import Memory, SharedBuffer

SIZE = 100 << 20

# They look at the shared memory of the whole machine: one after the other.
pytestmark = pytest.mark.xdist_group("shared memory of the machine")


def shared_memory() -> int:
    """Return the bytes of shared memory that this machine has in use."""
    match = re.search(r"^Shmem: +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert match
    return int(match[1]) * 1024


def holders(label: str) -> int:
    """Return how many processes of this machine have memory of that name mapped."""
    count = 0
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            count += f":{label} " in maps.read_text()
    return count


def wait_for_shared_memory_below(limit: int) -> None:
    """Wait for it: a killed process is torn down piece by piece, and there is no event for the last one."""
    eventually(lambda: shared_memory() < limit)


TREE = """
import os, sys
import mpmemory as mp

def hold(*args):
    args[0].send([os.getpid(), *(buffer.get_value("<q", 0) for buffer in args[1:])])
    args[0].recv()

def nested(method, conn, buffer):
    inner = mp.get_context(method).Process(target=hold, args=(conn, buffer))
    inner.start()
    hold(conn, buffer)

if __name__ == "__main__":
    method = sys.argv[1]
    ctx = mp.get_context(method)
    buffer = mp.SharedBuffer(100 << 20, name="whole tree")
    buffer.clear(1)
    ours, theirs = ctx.Pipe()
    assert buffer.memory.resident == 100 << 20
    ctx.Process(target=hold, args=(theirs, buffer)).start()
    ctx.Process(target=nested, args=(method, theirs, buffer)).start()
    pool = ctx.Pool(2)
    made = pool.map(mp.SharedBuffer.from_bytes, [bytes(1000)] * 10)
    queue = ctx.Queue()
    queue.put(buffer)  # never claimed
    for _ in range(3):
        ours.recv()
    print("ready", flush=True)
    ours.recv()
"""


@pytest.mark.parametrize("method", START_METHODS)
def test_killing_a_whole_tree_leaves_nothing(method: str, tmp_path: Path) -> None:
    program = tmp_path / "tree.py"
    program.write_text(TREE)
    before = shared_memory()
    # A session of its own, so that all of it can be killed at once: resource tracker and fork server, too.
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    tree = subprocess.Popen(
        [sys.executable, program, method],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=environment,
    )
    try:
        assert tree.stdout
        assert tree.stdout.readline() == b"ready\n"
        assert holders("whole tree") >= 3
    finally:
        os.killpg(tree.pid, signal.SIGKILL)
    _, errors = tree.communicate(timeout=30)  # returns when no process has its standard error any more
    assert errors == b""
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("mpmemory")]
    eventually(lambda: holders("whole tree") == 0)
    wait_for_shared_memory_below(before + SIZE // 2)


def test_memory_is_freed_with_its_last_handle() -> None:
    before = shared_memory()
    memory = Memory(SIZE)
    buffer = memory.map()
    buffer.clear(1)
    other = memory.dup()
    assert memory.resident == SIZE
    memory.close()
    buffer.close()
    assert other.resident == SIZE
    del other
    wait_for_shared_memory_below(before + SIZE // 2)


def make_big(_: object) -> SharedBuffer:
    buffer = SharedBuffer(SIZE)
    buffer.clear(1)
    return buffer


@pytest.mark.parametrize("method", START_METHODS)
def test_what_a_worker_made_is_freed_here(method: str) -> None:
    import mpmemory

    before = shared_memory()
    with mpmemory.get_context(method).Pool(1) as pool:
        buffer = pool.apply(make_big, (None,))
        assert buffer[SIZE - 1] == 1
        buffer.close()
        wait_for_shared_memory_below(before + SIZE // 2)
        pool.close()
        pool.join()


def test_a_spawned_childs_memory_is_freed_when_the_parent_drops_it(run_python: Any) -> None:
    """Also while the Process object is kept: the duplicate that was passed on goes with the handle."""
    import mpmemory

    before = shared_memory()
    memory = Memory(SIZE)
    memory.map().clear(1)
    child = mpmemory.get_context("spawn").Process(target=make_nothing, args=(memory,))
    child.start()
    child.join()
    memory.close()
    wait_for_shared_memory_below(before + SIZE // 2)
    assert child.exitcode == 0


def make_nothing(_: Memory) -> None:
    pass


def test_a_forked_childs_handles_are_its_own() -> None:
    memory = Memory(10)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        memory.close()
        os.write(writer, b"closed")
        os._exit(0)
    assert select.select([reader], [], [], 30)[0]
    os.waitpid(pid, 0)
    assert memory.pwrite(b"still open") == 10
    os.close(reader)
    os.close(writer)
