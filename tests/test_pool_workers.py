"""The workers of a pool: which of them gets a task, when they are replaced, what they start with."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
from test_pool import PATIENCE, await_true, pid_of_worker, square, wait_for

import mpmemory
from mpmemory import Memory, SharedBuffer
from mpmemory.pool import Pool


def test_no_task_waits_behind_a_long_one(ctx: Any) -> None:
    ours, theirs = ctx.Pipe()
    with ours, theirs, ctx.Pool(2) as pool:
        pool.map(square, range(4))  # all are there
        long = pool.apply_async(wait_for, (theirs,))
        pid = ours.recv()
        results = [pool.apply_async(pid_of_worker) for _ in range(100)]
        assert pid not in {result.get(PATIENCE) for result in results}
        arrays = [pool.apply_async(np.sum, (np.ones(1 << 17),)) for _ in range(20)]
        assert [result.get(PATIENCE) for result in arrays] == [1 << 17] * 20
        assert not long.ready()
        ours.send("end")
        assert long.get(PATIENCE) == "released"


def test_a_worker_that_starts_slowly_keeps_nothing(ctx: Any, tmp_path: Path) -> None:
    ours, theirs = ctx.Pipe()
    with ours, theirs, ctx.Pool(2, wait_once, (str(tmp_path / "once"), theirs)) as pool:
        pid = ours.recv()
        results = [pool.apply_async(pid_of_worker) for _ in range(20)]
        assert pid not in {result.get(PATIENCE) for result in results}
        ours.send("end")
        await_true(lambda: pid in pool.map(pid_of_worker, range(20), chunksize=1))


def once(path: str) -> bool:
    """Return True in the first process that asks."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def wait_once(path: str, conn: Any) -> None:
    if once(path):
        wait_for(conn)


def test_workers_are_replaced_after_their_tasks(ctx: Any) -> None:
    with ctx.Pool(2, maxtasksperchild=3) as pool:
        pids = pool.map(pid_of_worker, range(30), chunksize=1)
        assert max(pids.count(pid) for pid in pids) <= 3
        assert len(set(pids)) >= 10


def make(index: int) -> Any:
    array = np.full(50_000, index)
    memory = Memory.from_bytes(str(index).encode())
    buffer = SharedBuffer.from_bytes(str(index).encode())
    return array, memory, buffer


def test_results_outlive_their_worker(ctx: Any) -> None:
    count = 1000 if ctx.get_start_method() == "fork" else 50
    with ctx.Pool(2, maxtasksperchild=1) as pool:
        for index, (array, memory, buffer) in enumerate(pool.imap(make, range(count))):
            assert (array == index).all()
            assert memory.pread(memory.size) == buffer.get_bytes() == str(index).encode()
            memory.close()
            buffer.close()


def keep_global(*values: Any) -> None:
    global kept
    kept = values


def read_kept(_: object) -> Any:
    memory, lock, number = kept
    with lock:
        return memory.pread(4), number


def test_initargs(ctx: Any) -> None:
    with Memory.from_bytes(b"data") as memory, ctx.Pool(2, keep_global, (memory, ctx.Lock(), 5)) as pool:
        assert pool.map(read_kept, range(10)) == [(b"data", 5)] * 10


class NoDaemonProcess(multiprocessing.context.ForkProcess):
    @property
    def daemon(self) -> bool:
        return False

    @daemon.setter
    def daemon(self, value: bool) -> None:
        pass


class PoolOfParents(Pool):
    """The way to have pools in workers that is found everywhere."""

    @staticmethod
    def Process(ctx: Any, *args: Any, **kwds: Any) -> Any:
        return NoDaemonProcess(*args, **kwds)


def square_in_a_pool(x: int) -> int:
    with mpmemory.get_context("fork").Pool(1) as pool:
        return int(pool.apply(square, (x,)))


def test_a_subclass_with_processes_of_its_own() -> None:
    with PoolOfParents(2) as pool:
        assert pool.map(square_in_a_pool, range(4)) == [0, 1, 4, 9]
        pool.close()
        pool.join()
