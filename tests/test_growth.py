"""Memory that grows, and memory that is reserved."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import pytest

from mpmemory import Memory, SharedBuffer
from mpmemory._backends import platform
from mpmemory.connection import Pipe


def test_grow(backend: str) -> None:
    memory = Memory(0)
    assert memory.size == 0
    other = memory.dup()
    memory.grow(100)
    memory.grow(100)
    assert other.size == 100
    with memory.map() as before:
        other.grow(9000)
        assert memory.size == 9000
        assert before.size == 100
        with memory.map() as after:
            assert after.size == 9000
            after[50] = 7
            assert before[50] == 7


def test_grow_never_shrinks_what_another_process_has_grown(backend: str) -> None:
    """The size is read, and then changed: in between somebody else may have grown it further."""
    memory = Memory(0)
    memory.grow(20_000)
    platform.grow(memory.fileno(), 10_000)
    assert memory.size == 20_000


def grow_in_steps(memory: Memory, start: int, step: int, conn: Any) -> None:
    conn.recv()
    for size in range(start, 2_000_000, step):
        with contextlib.suppress(ValueError):  # another has made it larger already
            memory.grow(size)
    conn.send(memory.size)


def test_several_processes_grow_it(ctx: Any) -> None:
    memory = Memory(1)
    before = memory.map()
    pipes = [Pipe() for _ in range(3)]
    children = [
        ctx.Process(target=grow_in_steps, args=(memory, index + 1, 997 + index, right))
        for index, (_, right) in enumerate(pipes)
    ]
    for child in children:
        child.start()
    for left, _ in pipes:
        left.send("go")
    sizes = [left.recv() for left, _ in pipes]
    for child in children:
        child.join()
    largest = max(range(index + 1, 2_000_000, 997 + index)[-1] for index in range(3))
    assert memory.size == max(sizes) == largest
    assert before.size == 1
    with memory.map() as after:
        after[largest - 1] = 7
        after[0] = 8
    assert before[0] == 8
    for pair in pipes:
        for end in pair:
            end.close()


# --- reserving ------------------------------------------------------------------------------------


def test_reserved_memory_is_there(backend: str) -> None:
    size = 3_000_001
    memory = Memory(size, reserve=True)
    assert memory.size == size
    assert size <= memory.resident < size + (1 << 16)
    with SharedBuffer(size, reserve=True) as buffer:
        assert buffer.memory.resident >= size
        assert buffer.size == size
    assert Memory(0, reserve=True).size == 0
    if backend == "memfd":
        assert Memory(size).resident == 0


def test_more_than_there_is_cannot_be_reserved(run_python: Any) -> None:
    run_python(
        "import resource\n"
        "from mpmemory import Memory, SharedBuffer\n"
        "from mpmemory._backends import platform\n"
        # If it were tried all the same, it would end with this limit, and not with the machine's memory.
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))\n"
        "for make, size in ((Memory, 2 * platform.available_memory()), (SharedBuffer, 1 << 62)):\n"
        "    try: make(size, reserve=True)\n"
        "    except OSError as error: text = str(error)\n"
        "    assert text.startswith(f'[Errno 12] cannot reserve {size} bytes of memory, of which '), text\n"
    )


def test_memory_of_others_that_has_holes_is_not_filled() -> None:
    """A memfd that can be shrunk gets memory for what is new, and not for a hole of any size before that."""
    fd = os.memfd_create("foreign", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 40)
    with Memory.from_fd(fd) as memory:
        memory.grow(memory.size)
        assert memory.resident == 0
        memory.grow((1 << 40) + 100_000)
        assert 100_000 <= memory.resident < 1 << 20
        with pytest.raises(OSError, match=r"of which \d+ are available"):
            memory.grow(1 << 50)
        assert memory.size == (1 << 40) + 100_000


def test_a_small_file_system_is_reserved_from(small_shm: list[str], run_python: Any) -> None:
    program = (
        "import os, mpmemory\n"
        "kept = mpmemory.Memory(600_000, reserve=True)\n"
        "try: mpmemory.Memory(600_000, reserve=True)\n"
        "except OSError as error: print(error.errno, error)\n"
        "kept.close()\n"
        "mpmemory.SharedBuffer(600_000, reserve=True).clear(1)\n"  # what failed has left nothing
    )
    done = run_python(program, prefix=small_shm, env={**os.environ, "MPMEMORY_BACKEND": "posix"})
    assert done.stdout == "28 [Errno 28] cannot have memory of 600000 bytes: No space left on device\n"


def test_more_than_the_cgroup_has_cannot_be_reserved(small_cgroup: list[str], run_python: Any) -> None:
    program = (
        "import mpmemory\n"
        "mpmemory.Memory(10 << 20, reserve=True)\n"
        "try: mpmemory.Memory(100 << 20, reserve=True)\n"
        "except OSError as error: print(error.errno, error)\n"
    )
    done = run_python(program, prefix=small_cgroup)
    assert done.stdout.startswith("12 [Errno 12] cannot reserve 104857600 bytes of memory, of which ")
    assert int(done.stdout.split("of which ")[1].split()[0]) < 64 << 20


def test_memory_that_is_always_allocated_is_within_the_cgroup(small_cgroup: list[str], run_python: Any) -> None:
    program = (
        "import mpmemory\n"
        "memory = mpmemory.Memory(10 << 20)\n"
        "for action in (lambda: mpmemory.Memory(100 << 20), lambda: memory.grow(100 << 20)):\n"
        "    try: action()\n"
        "    except OSError as error: print(error.errno, memory.size)\n"
    )
    done = run_python(program, prefix=small_cgroup, env={**os.environ, "MPMEMORY_BACKEND": "posix"})
    assert done.stdout == f"12 {10 << 20}\n" * 2


V1, V2 = "9:memory:/box/inner\n1:cpu:/\n", "0::/box/inner\n"
LIMIT, USAGE = "/sys/fs/cgroup/memory{}/memory.limit_in_bytes", "/sys/fs/cgroup/memory{}/memory.usage_in_bytes"
STATISTICS = "cache 7\ninactive_file 20\ntotal_inactive_file 30\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, []),
        ({"/proc/self/cgroup": V2}, []),  # no memory controller
        ({"/proc/self/cgroup": V2, "/sys/fs/cgroup/box/memory.max": "max\n"}, []),
        ({"/proc/self/cgroup": V2, "/sys/fs/cgroup/box/memory.max": "100\n"}, []),  # usage is not known
        (
            {
                "/proc/self/cgroup": V2,
                "/sys/fs/cgroup/box/inner/memory.max": "max\n",
                "/sys/fs/cgroup/box/inner/memory.current": "60\n",
                "/sys/fs/cgroup/box/memory.max": "100\n",
                "/sys/fs/cgroup/box/memory.current": "70\n",
                "/sys/fs/cgroup/box/memory.stat": STATISTICS,
            },
            [50],
        ),
        (  # in a container that has the path of the host, but its own root
            {
                "/proc/self/cgroup": V2,
                "/sys/fs/cgroup/memory.max": "100\n",
                "/sys/fs/cgroup/memory.current": "170\n",
            },
            [0],
        ),
        (
            {
                "/proc/self/cgroup": V1,
                LIMIT.format("/box/inner"): "100\n",
                USAGE.format("/box/inner"): "70\n",
                "/sys/fs/cgroup/memory/box/inner/memory.stat": STATISTICS,
                LIMIT.format("/box"): "90\n",
                USAGE.format("/box"): "80\n",
            },
            [60, 10],
        ),
    ],
)
def test_what_is_left_in_cgroups(files: dict[str, str], expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "_read", lambda path: files.get(path, ""))
    assert list(platform.available_in_cgroups()) == expected
