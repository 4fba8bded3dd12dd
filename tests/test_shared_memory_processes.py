"""SharedMemory in related and unrelated processes."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from mpmemory.shared_memory import ShareableList, SharedMemory


def increment(block: SharedMemory) -> tuple[int, SharedMemory]:
    block.buf[0] += 1
    return block.buf[0], block


def increment_by_name(name: str) -> int:
    block = SharedMemory(name)
    block.buf[0] += 1
    value = block.buf[0]
    block.close()
    return value


@pytest.mark.parametrize("stock_objects", [False, True])
def test_through_all_channels(stock_objects: bool, ctx: Any) -> None:
    method = ctx.get_start_method()
    chosen = multiprocessing.get_context(method) if stock_objects else ctx
    block = SharedMemory(create=True, size=10)
    with chosen.Pool(1) as pool:
        value, again = pool.apply(increment, (block,))
        assert (value, again.buf[0], again.name) == (1, 1, block.name)
        assert pool.map(increment_by_name, [block.name] * 3) == [2, 3, 4]
        pool.close()
        pool.join()
    child = chosen.Process(target=increment, args=(block,))
    child.start()
    child.join()
    assert block.buf[0] == 5
    queue = chosen.SimpleQueue()
    queue.put(block)
    queue.get().buf[0] = 9
    assert block.buf[0] == 9
    queue.close()
    with ProcessPoolExecutor(1, mp_context=chosen) as executor:
        value, again = executor.submit(increment, block).result()
        assert (value, again.buf[0]) == (10, 10)
    block.unlink()


def make(_: int) -> tuple[SharedMemory, str]:
    block = SharedMemory(create=True, size=10)
    block.buf[:2] = b"ok"
    return block, block.name


@pytest.mark.parametrize("stock_objects", [False, True])
def test_what_a_worker_makes(stock_objects: bool, ctx: Any) -> None:
    chosen = multiprocessing.get_context(ctx.get_start_method()) if stock_objects else ctx
    with chosen.Pool(1, maxtasksperchild=1) as pool:
        made = pool.map(make, range(3), chunksize=1)
        pool.close()
        pool.join()
    for block, name in made:
        assert bytes(block.buf[:2]) == b"ok"
        with pytest.raises(FileNotFoundError):  # the worker, which the name leads to, has ended
            SharedMemory(name)


def test_an_unrelated_process_attaches(run_python: Any) -> None:
    block = SharedMemory(create=True, size=10)
    block.buf[:5] = b"hello"
    program = (
        "import sys\n"
        "from mpmemory.shared_memory import SharedMemory\n"
        "block = SharedMemory(sys.argv[1])\n"
        "print(block.size, bytes(block.buf[:5]))\n"
        "block.buf[:5] = b'world'\n"
        "block.close()\n"
        "if sys.argv[2] == 'unlink': block.unlink()\n"
    )
    for action in ("close", "unlink"):
        done = run_python(program, block.name, action)
        assert (done.stdout[:2], done.stderr) == ("10", "")
        assert bytes(block.buf[:5]) == b"world"
    with pytest.raises(FileNotFoundError):
        SharedMemory(block.name)


def test_two_hundred_processes_attach_at_once(tmp_path: Any) -> None:
    block = SharedMemory(create=True, size=200)
    program = tmp_path / "attach.py"
    # Forked by a program of its own, which has nothing of ours but the name.
    program.write_text(
        "import os, sys\n"
        "from mpmemory.shared_memory import SharedMemory\n"
        "reader, writer = os.pipe()\n"
        "for index in range(200):\n"
        "    if os.fork() == 0:\n"
        "        os.close(writer)\n"
        "        os.read(reader, 1)\n"  # until all are there
        "        SharedMemory(sys.argv[1]).buf[index] = 1\n"
        "        os._exit(0)\n"
        "os.close(writer)\n"
        "print({os.wait()[1] for _ in range(200)})\n"
    )
    done = subprocess.run([sys.executable, program, block.name], text=True, capture_output=True, check=True, timeout=60)
    assert done.stdout == "{0}\n"
    assert bytes(block.buf) == b"\1" * 200
    block.unlink()


class Manager:
    """What `multiprocessing.managers.SharedMemoryManager` does, without its process."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def SharedMemory(self, size: int) -> SharedMemory:
        block = SharedMemory(None, create=True, size=size)
        self.names.append(block.name)
        return block

    def ShareableList(self, sequence: list[Any]) -> ShareableList[Any]:
        made = ShareableList(sequence)
        self.names.append(made.shm.name)
        return made

    def destroy(self) -> None:
        for name in self.names:
            block = SharedMemory(name)
            block.close()
            block.unlink()


def test_code_in_the_style_of_a_manager() -> None:
    manager = Manager()
    block, items = manager.SharedMemory(100), manager.ShareableList([1, "two"])
    manager.destroy()
    for name in manager.names:
        with pytest.raises(FileNotFoundError):
            SharedMemory(name)
    block.buf[0] = 1
    assert list(items) == [1, "two"]
