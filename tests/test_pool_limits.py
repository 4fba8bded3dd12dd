"""Pool: big objects, full sockets, and no descriptors left."""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import socket
from multiprocessing.pool import MaybeEncodingError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_messages import AS_A_PLAIN_USER
from test_pool import PATIENCE, await_true, pid_of_worker, square, wait_for

import mpmemory
from mpmemory import Memory

# --- big objects ----------------------------------------------------------------------------------


def echo(obj: Any) -> Any:
    return obj


def test_arrays_there_and_back(ctx: Any) -> None:
    with ctx.Pool(2) as pool:
        arrays = [np.arange(size) for size in (0, 10, 5_000, 500_000, 3_000_000)]
        for sent, got in zip(arrays, pool.imap(echo, arrays), strict=True):
            assert (sent == got).all()
            got[:1] = 7  # it is ours
        kept = pool.map(np.zeros, [75_000] * 1000)
        for index, array in enumerate(kept):
            array[:] = index
        assert all((array == index).all() for index, array in enumerate(kept))


def segments_of(pid: int) -> list[str]:
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # of this very listing
            lines.append(os.readlink(entry))
    return [line for line in lines if "mpmemory-segment" in line]


def test_an_idle_pool_holds_no_shared_memory(ctx: Any) -> None:
    with ctx.Pool(2) as pool:
        pids = {os.getpid(), *pool.map(pid_of_worker, range(50), chunksize=1)}
        assert (pool.apply(echo, (np.ones(1 << 20),)) == 1).all()
        assert any(segments_of(pid) for pid in pids)
        await_true(lambda: not any(segments_of(pid) for pid in pids))
        assert pool.apply(square, (3,)) == 9


# --- limits ---------------------------------------------------------------------------------------


def store(pair: tuple[Memory, int]) -> None:
    memory, index = pair
    memory.pwrite(b"x", index)


def leave_no_descriptor() -> None:
    """From now on this process can open nothing."""
    number = os.open("/dev/null", os.O_RDONLY)
    os.close(number)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))


def restore_descriptors() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def test_a_worker_without_descriptors(ctx: Any) -> None:
    with Memory(10) as memory, ctx.Pool(1) as pool:
        pool.apply(leave_no_descriptor)
        with pytest.raises(OSError, match="ulimit -n"):
            pool.apply(store, ((memory, 0),))
        with pytest.raises(OSError, match="ulimit -n"):
            pool.apply(echo, (np.ones(1 << 17),))
        with pytest.raises(MaybeEncodingError, match="ulimit -n"):
            pool.apply(np.ones, (1 << 17,))
        pool.apply(restore_descriptors)
        assert pool.apply(echo, (np.ones(1 << 17),)).sum() == 1 << 17


def test_a_parent_without_descriptors(run_python: Any) -> None:
    done = run_python(
        "import mpmemory, numpy as np\n"
        "from test_pool import square\n"
        "from test_pool_limits import leave_no_descriptor, restore_descriptors, echo\n"
        "if __name__ == '__main__':\n"
        "    with mpmemory.get_context('fork').Pool(2) as pool:\n"
        "        pool.map(square, range(10))\n"
        "        leave_no_descriptor()\n"
        "        for function, args in ((echo, (np.ones(1 << 17),)), (np.ones, (1 << 17,))):\n"
        "            try:\n"
        "                pool.apply(function, args)\n"
        "            except OSError as error:\n"
        "                print(error)\n"
        "        print(pool.map(square, range(3)))\n"
        "        restore_descriptors()\n"
        "        print(pool.apply(echo, (np.ones(1 << 17),)).sum())\n",
        env={**os.environ, "PYTHONPATH": os.path.dirname(__file__)},
    )
    assert done.stdout.count("ulimit -n") == 2, done.stdout + done.stderr
    assert done.stdout.endswith("[0, 1, 4]\n131072.0\n")
    assert done.stderr == ""


def test_a_task_taken_back_without_descriptors(run_python: Any) -> None:
    """What belongs to it is lost then, and that is its error."""
    done = run_python(
        "import mpmemory\n"
        "from test_pool import wait_for\n"
        "from test_pool_limits import leave_no_descriptor, restore_descriptors\n"
        "if __name__ == '__main__':\n"
        "    memory = mpmemory.Memory.from_bytes(b'x')\n"
        "    with mpmemory.get_context('fork').Pool(2) as pool:\n"
        "        pipes = [mpmemory.Pipe() for _ in range(2)]\n"
        "        busy = [pool.apply_async(wait_for, (theirs,)) for _, theirs in pipes]\n"
        "        for ours, _ in pipes: ours.recv()\n"
        "        results = [pool.apply_async(mpmemory.Memory.pread, (memory, 1)) for _ in range(2)]\n"
        "        leave_no_descriptor()\n"
        "        pipes[0][0].send('end')\n"
        "        for result in results:\n"
        "            try: print(result.get(30))\n"
        "            except OSError as error: print(error)\n"
        "        restore_descriptors()\n"
        "        pipes[1][0].send('end')\n"
        "        print([result.get(30) for result in busy])\n",
        env={**os.environ, "PYTHONPATH": os.path.dirname(__file__)},
    )
    assert sorted(done.stdout.splitlines())[-1] == "b'x'"
    assert done.stdout.count("ulimit -n") == 1
    assert done.stdout.endswith("['released', 'released']\n")


def test_more_than_the_socket_of_a_worker_takes() -> None:
    ours, theirs = mpmemory.Pipe()
    with ours, theirs, mpmemory.Pool(1) as pool:
        (worker,) = pool._scheduler._workers  # type: ignore[attr-defined]
        with socket.socket(fileno=os.dup(worker.channel.fileno())) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel makes it some 4 KB
        busy = pool.apply_async(wait_for, (theirs,))
        ours.recv()
        results = [pool.apply_async(echo, (bytes([index]) * 1700,)) for index in range(100)]
        await_true(lambda: worker.blocked)
        ours.send("end")
        assert busy.get(PATIENCE) == "released"
        assert [result.get(PATIENCE) for result in results] == [bytes([index]) * 1700 for index in range(100)]


@pytest.mark.xdist_group("descriptors under way of one user")
def test_a_task_that_waits_for_descriptors_under_way(run_python: Any) -> None:
    """Nothing of the pool itself makes room for it."""
    run_python(
        "import mpmemory.pool, multiprocessing.popen_fork, time\n"
        + AS_A_PLAIN_USER
        + "memory, (left, right) = Memory.from_bytes(b'x'), Pipe()\n"
        "with mpmemory.get_context('fork').Pool(1) as pool:\n"
        "    pool.apply(int)\n"
        "    many = [memory.dup() for _ in range(200)]\n"
        "    left.send(many)\n"
        "    for each in many: each.close()\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))\n"
        "    result = pool.apply_async(Memory.pread, (memory, 1))\n"
        "    for _ in range(3000):\n"
        "        if pool._scheduler._stalled: break\n"
        "        time.sleep(0.01)\n"
        "    else: raise SystemExit('it was sent')\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (400, hard))\n"
        "    assert len(right.recv()) == 200\n"
        "    assert result.get(30) == b'x'\n"
    )


def test_processes_that_cannot_start_are_an_error_here() -> None:
    spawn = mpmemory.get_context("spawn")
    with pytest.raises((pickle.PicklingError, AttributeError)):
        spawn.Pool(2, lambda: None)
