"""The crash matrix on pools: ours, where just one task fails, and the stock one, where ours must not make it worse."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

from crash_cells import LAST, LIMIT, Bench, Cell, Tools, arm, await_pid, check_tools, hold, kill_server
from deaths import EXITCODES, HOW, at, die_at
from roads import Item, check_item, make_item
from supervise import show_stacks_when_asked

import mpmemory
from mpmemory import WorkerLostError

_tools: Any = None
_gate: Any = None
_pids: Any = None


def initialize(tools: Tools, gate: Any, pids: Any) -> None:
    global _tools, _gate, _pids
    _tools, _gate, _pids = tools, gate, pids
    show_stacks_when_asked()


def answer(item: Item) -> Item:
    _, number, _ = check_item(item)
    return make_item("worker", number, big=len(item[2]) > 100)


def say_pid_and_wait() -> int:
    _pids.put(os.getpid())
    _gate.get()
    return os.getpid()


class Deadly:
    """A trap that is set by who pickles or unpickles it."""

    def __init__(self, how: str) -> None:
        self._how = how

    def __reduce__(self) -> Any:
        return _die(self._how)


class DeadlyUnpickled(Deadly):
    def __reduce__(self) -> Any:
        return _die, (self._how,)


def _die(how: str) -> None:
    _pids.put(os.getpid())
    HOW[how]()


def die(who: str, when: str, how: str) -> Any:
    """Be the worker that dies, or have it die when it sends the result."""
    if who == "sender":
        if when == "in a callback":
            return Deadly(how)
        if when == "in flight":
            _gate.get()  # what it has sent before may be on its way
        _die(how)
    die_at(when, lambda: _die(how))
    at("after receive")
    hold(_tools)
    signal.signal(signal.SIGUSR2, lambda *_: at("in a callback"))
    signal.raise_signal(signal.SIGUSR2)
    return "survived"


def make_pool(cell: Cell, tools: Tools, gate: Any, pids: Any) -> Any:
    ctx = mpmemory.get_context(cell.method)
    maker = ctx if cell.channel == "Pool" else multiprocessing.get_context(cell.method)
    return maker.Pool(2, initialize, (tools, gate, pids))


def check_workers(bench: Bench) -> None:
    """A worker dies, of two."""
    cell = bench.cell
    gate, pids = bench.ctx.SimpleQueue(), bench.ctx.SimpleQueue()
    is_ours = cell.channel == "Pool"
    with make_pool(cell, bench.tools, gate, pids) as pool:
        before = [pool.apply_async(answer, (make_item("bystander", n, big=is_ours),)) for n in range(LAST)]
        if cell.who == "receiver":
            doomed = pool.apply_async(answer, (DeadlyUnpickled(cell.how),))
        else:
            doomed = pool.apply_async(die, (cell.who, cell.when, cell.how))
        after = [pool.apply_async(answer, (make_item("bystander", n, big=is_ours),)) for n in range(LAST)]
        gate.put("go")
        for results in (before, after):
            assert [look_at(bench, result.get(LIMIT))[1] for result in results] == list(range(LAST))
        if is_ours:
            doomed.wait(LIMIT)
            lost = doomed._value
            assert isinstance(lost, WorkerLostError), lost
            assert lost.exitcode == EXITCODES[cell.how]
        await_pid(pids.get())
        check_tools(bench.tools, cell)
        if not is_ours:
            assert not doomed.ready()  # python/cpython#66587
        more = pool.map(answer, [make_item("bystander", n, big=is_ours) for n in range(2 * LAST)], chunksize=1)
        assert [look_at(bench, item)[1] for item in more] == list(range(2 * LAST))
    pool.join()
    gate.close()
    pids.close()


def look_at(bench: Bench, item: Item) -> tuple[str, int]:
    # What a killed worker has made, and nobody has claimed, is lost in a stock pool.
    sender, number, nbytes = check_item(item, dead=None if bench.cell.channel == "Pool" else "worker")
    bench.got(nbytes)
    return sender, number


def occupy(pool: Any, gate: Any, pids: Any) -> tuple[list[Any], list[int]]:
    """Have both workers wait at the gate; return their results, and who they are."""
    results = [pool.apply_async(say_pid_and_wait) for _ in range(2)]
    return results, [pids.get() for _ in range(2)]


def use_pool(pool: Any, gate: Any, pids: Any, tools: Tools, said: Callable[[list[int]], object]) -> None:
    """Get to all places, as who has the pool."""
    results, workers = occupy(pool, gate, pids)
    said(workers)
    for _ in results:
        gate.put("go")
    assert {result.get(LIMIT) for result in results} == set(workers)
    at("before send")
    results, workers = occupy(pool, gate, pids)
    at("in flight")
    for _ in results:
        gate.put("go")
    for result in results:
        result.get(LIMIT)
    at("after receive")
    hold(tools)
    pool.apply_async(answer, (make_item("boss", 1, big=False),), callback=lambda _: at("in a callback")).get(LIMIT)


def be_pool_boss(cell: Cell, gate: Any, pids: Any, control: Any, tools: Tools) -> None:
    arm(cell, control)
    with make_pool(cell, tools, gate, pids) as pool:
        use_pool(pool, gate, pids, tools, control.send)


def check_parent(bench: Bench) -> None:
    """Who has the pool dies: the workers go, too."""
    cell = bench.cell
    gate, pids = bench.ctx.SimpleQueue(), bench.ctx.SimpleQueue()
    theirs = bench.pipe("victim")
    process = bench.ctx.Process(target=be_pool_boss, args=(cell, gate, pids, theirs, bench.tools))
    bench.processes["victim"] = process
    process.start()
    theirs.close()
    workers = bench.hear("victim")
    bench.await_death()
    for pid in workers:
        await_pid(pid)
    check_tools(bench.tools, cell)
    bench.messages += 2
    gate.close()
    pids.close()


def check_server(bench: Bench) -> None:
    """The fork server or the resource tracker dies beside a pool."""
    cell = bench.cell
    gate, pids = bench.ctx.SimpleQueue(), bench.ctx.SimpleQueue()
    workers: list[int] = []
    with make_pool(cell, bench.tools, gate, pids) as pool:
        die_at(cell.when, lambda: kill_server(cell))
        use_pool(pool, gate, pids, bench.tools, workers.extend)
        if cell.channel == "Pool":
            occupy(pool, gate, pids)  # they are ended in the middle of a task
    pool.join()
    for pid in workers:
        await_pid(pid)
    gate.close()
    pids.close()
    bench.messages += 4
