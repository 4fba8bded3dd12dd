"""One behaviour over all ways: start method x backend x channel. What is written on each side is seen on the other."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from typing import Any

import pytest
from channels import (
    ANSWER,
    SENT,
    SIZE,
    answer,
    answer_kept,
    answer_pair,
    backend_of_this_process,
    keep,
    make,
    serve_pipe,
    serve_queues,
)
from conftest import START_METHODS

import mpmemory
from mpmemory import Memory, SharedBuffer


@pytest.fixture(scope="module", autouse=True)
def _the_fork_server_is_as_before() -> Iterator[None]:
    yield
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    forkserver.ensure_running()


# Each sends a memory and a buffer to another process, which answers in them. Those with a way back
# return what the other process made.


def by_process_args(ctx: Any, memory: Memory, buffer: SharedBuffer) -> None:
    child = ctx.Process(target=answer, args=(memory, buffer))
    child.start()
    child.join()
    assert child.exitcode == 0


def by_process_kwargs(ctx: Any, memory: Memory, buffer: SharedBuffer) -> None:
    child = ctx.Process(target=answer, kwargs={"memory": memory, "buffer": buffer})
    child.start()
    child.join()
    assert child.exitcode == 0


def by_initargs(ctx: Any, memory: Memory, buffer: SharedBuffer) -> None:
    with ctx.Pool(1, keep, (memory, buffer)) as pool:
        assert pool.map(answer_kept, [0]) == ["parent"]
        pool.close()
        pool.join()


def by_pool(ctx: Any, memory: Memory, buffer: SharedBuffer) -> tuple[Memory, SharedBuffer]:
    with ctx.Pool(2) as pool:
        assert pool.apply(backend_of_this_process) == backend_of_this_process()
        assert pool.map(answer_pair, [(memory, buffer)]) == ["parent"]
        (result,) = pool.map(make, ["child"])
        pool.close()
        pool.join()
    return result


def by_executor(ctx: Any, memory: Memory, buffer: SharedBuffer) -> tuple[Memory, SharedBuffer]:
    with ProcessPoolExecutor(1, mp_context=ctx) as executor:
        assert executor.submit(answer, memory, buffer).result() == "parent"
        return executor.submit(make, "child").result()


def by_pipe(ctx: Any, memory: Memory, buffer: SharedBuffer) -> tuple[Memory, SharedBuffer]:
    ours, theirs = ctx.Pipe()
    with ours:
        child = ctx.Process(target=serve_pipe, args=(theirs,))
        child.start()
        theirs.close()
        ours.send((memory, buffer))
        assert ours.recv() == "parent"
        result: tuple[Memory, SharedBuffer] = ours.recv()
        ours.send("seen")
        child.join()
        assert child.exitcode == 0
    return result


def by_queues(ctx: Any, requests: Any, results: Any, memory: Memory, buffer: SharedBuffer) -> Any:
    child = ctx.Process(target=serve_queues, args=(requests, results))
    child.start()
    requests.put((memory, buffer))
    assert results.get() == "parent"
    result = results.get()
    child.join()
    assert child.exitcode == 0
    return result


def by_queue(ctx: Any, memory: Memory, buffer: SharedBuffer) -> Any:
    requests, results = ctx.Queue(), ctx.Queue()
    result = by_queues(ctx, requests, results, memory, buffer)
    for queue in (requests, results):
        queue.close()
        queue.join_thread()
    return result


def by_joinable_queue(ctx: Any, memory: Memory, buffer: SharedBuffer) -> Any:
    requests, results = ctx.JoinableQueue(), ctx.JoinableQueue()
    result = by_queues(ctx, requests, results, memory, buffer)
    for queue in (requests, results):
        queue.close()
        queue.join_thread()
    return result


def by_simple_queue(ctx: Any, memory: Memory, buffer: SharedBuffer) -> Any:
    requests, results = ctx.SimpleQueue(), ctx.SimpleQueue()
    result = by_queues(ctx, requests, results, memory, buffer)
    requests.close()
    results.close()
    return result


def by_manager(ctx: Any, memory: Memory, buffer: SharedBuffer) -> Any:
    with ctx.Manager() as manager:
        return by_queues(ctx, manager.Queue(), manager.Queue(), memory, buffer)


CHANNELS = [
    by_process_args,
    by_process_kwargs,
    by_initargs,
    by_pool,
    by_executor,
    by_pipe,
    by_queue,
    by_joinable_queue,
    by_simple_queue,
    by_manager,
]


_server: tuple[int | None, str] | None = None  # the pid of the fork server that was started in a test here; its backend


@pytest.fixture
def _fork_server_with_this_backend(backend: str, method: str) -> None:
    """The fork server has the environment that it was started in: start it anew, if it was another."""
    global _server
    if method == "forkserver" and _server != (forkserver._forkserver._forkserver_pid, backend):
        forkserver._forkserver._stop()
        forkserver.ensure_running()
        _server = forkserver._forkserver._forkserver_pid, backend


@pytest.fixture(params=["ours", "stock"])
def ctx(request: pytest.FixtureRequest, method: str) -> Any:
    return (mpmemory if request.param == "ours" else multiprocessing).get_context(method)


@pytest.mark.usefixtures("_fork_server_with_this_backend")
@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize("method", START_METHODS)
def test_memory_travels(channel: Callable[..., Any], ctx: Any, backend: str) -> None:
    memory = Memory(SIZE, name="parent")
    other = SharedBuffer(SIZE, name="parent")
    buffer = other.memory.map(offset=100)
    memory.pwrite(SENT)
    buffer.set_bytes(SENT)

    result = channel(ctx, memory, buffer)

    assert memory.pread(len(ANSWER), 50) == ANSWER
    assert buffer.get_bytes(50, len(ANSWER)) == ANSWER
    assert other.get_bytes(150, len(ANSWER)) == ANSWER
    if result is not None:
        made, mapped = result
        assert made.name == mapped.memory.name == "child"
        assert made.size == SIZE
        assert made.pread(len(ANSWER), 50) == ANSWER
        assert mapped.offset == 100
        assert mapped.get_bytes(50, len(ANSWER)) == ANSWER
        assert not os.get_inheritable(made.fileno())
        # Its maker is gone; the memory is ours.
        mapped[0:5] = b"still"
        assert mapped.memory.pread(5, 100) == b"still"


def test_the_default_start_method_of_multiprocessing_is_followed(run_python: Any) -> None:
    done = run_python(
        "import multiprocessing, mpmemory as mp\n"
        "assert mp.get_start_method(allow_none=True) is None\n"
        "multiprocessing.set_start_method('spawn')\n"
        "assert type(mp.get_context()) is mp.context.SpawnContext\n"
        "mp.set_start_method('forkserver', force=True)\n"
        "assert multiprocessing.get_start_method() == 'forkserver'\n"
        "assert type(mp.get_context()) is mp.context.ForkServerContext\n"
        "assert mp.Pool.__self__.get_context() is mp.get_context()\n"
        "print('done')\n"
    )
    assert done.stdout == "done\n"
    assert mpmemory.get_context("fork") is mpmemory.get_context("spawn").get_context("fork")
