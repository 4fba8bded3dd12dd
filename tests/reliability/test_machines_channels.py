"""Queues and pools against simple models: any order of calls, in hypothesis's state machines."""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import queue
import signal
from collections.abc import Callable
from multiprocessing.pool import MaybeEncodingError
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)
from machines import Counting, run

import mpmemory
from mpmemory import Memory, WorkerLostError, get_context
from mpmemory.connection import Pipe

# --- queues: a deque ------------------------------------------------------------------------------

# Of what an object is made: hypothesis shows it.
OBJECTS = st.one_of(
    st.tuples(st.just(int), st.integers()),
    st.tuples(st.just(str), st.text(max_size=20)),
    st.tuples(st.just(bytes), st.sampled_from([0, 1, 1000, 40_000, 300_000])),
    st.tuples(st.just(np.arange), st.sampled_from([0, 10, 5000])),
    st.tuples(st.just(Memory.from_bytes), st.binary(min_size=1, max_size=50)),
)


def content(obj: Any) -> Any:
    """Return what can be compared."""
    if isinstance(obj, Memory):
        return "memory", obj.pread(obj.size)
    return ("array", obj.tolist()) if isinstance(obj, np.ndarray) else obj


def serve(conn: Any) -> None:
    """Do with a queue what is asked for, in another process."""
    while (request := conn.recv()) is not None:
        method, shared, *args = request
        try:
            conn.send((True, getattr(shared, method)(*args)))
        except Exception as error:
            conn.send((False, error))
        del request, shared, args


class QueueMachine(Counting):
    """A queue under several objects, used here and in another process."""

    conn: Any  # of that process

    queues = Bundle("queues")

    @initialize(
        maxsize=st.integers(0, 4), kind=st.sampled_from(["Queue", "JoinableQueue", "SimpleQueue"]), target=queues
    )
    def create(self, maxsize: int, kind: str) -> Any:
        self.kind = kind
        self.model: collections.deque[Any] = collections.deque()
        # A put into a SimpleQueue waits when its socket is full, which takes some 200 KB.
        self.maxsize = 3 if kind == "SimpleQueue" else maxsize or 20
        self.is_bounded = kind != "SimpleQueue" and maxsize > 0
        self.unfinished = 0
        self.closed: list[Any] = []
        self.first = self.new(mpmemory.SimpleQueue() if kind == "SimpleQueue" else getattr(mpmemory, kind)(maxsize))
        return self.new(self.again())

    def new(self, made: Any) -> Any:
        self.all = [*getattr(self, "all", ()), made]
        return made

    def again(self) -> Any:
        left, right = Pipe()
        with left, right:
            left.send(self.first)
            return right.recv()

    @rule(target=queues)
    def travel(self) -> Any:
        return self.new(self.again())

    def ask(self, shared: Any, elsewhere: bool, method: str, *args: Any) -> Any:
        if not elsewhere:
            return getattr(shared, method)(*args)
        self.conn.send((method, shared, *args))
        done, result = self.conn.recv()
        if not done:
            raise result
        return result

    @rule(shared=queues, kind_and_value=OBJECTS, elsewhere=st.booleans())
    def put(self, shared: Any, kind_and_value: tuple[Any, Any], elsewhere: bool) -> None:
        kind, value = kind_and_value
        obj = kind(value)
        if shared in self.closed:
            with pytest.raises((ValueError, OSError), match="closed"):
                shared.put(obj)
        elif len(self.model) < self.maxsize:
            self.ask(shared, elsewhere, "put", obj)
            self.model.append(content(obj))
            self.unfinished += 1
        elif self.is_bounded:
            with pytest.raises(queue.Full):
                self.ask(shared, elsewhere, "put_nowait", obj)
            with pytest.raises(queue.Full):
                shared.put(obj, timeout=0.001)

    @rule(shared=queues)
    def put_what_does_not_pickle(self, shared: Any) -> None:
        if shared not in self.closed:
            with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
                shared.put([Memory(1), lambda: None])

    @rule(shared=queues, elsewhere=st.booleans())
    def get(self, shared: Any, elsewhere: bool) -> None:
        if shared in self.closed:
            with pytest.raises((ValueError, OSError), match="closed"):
                shared.get()
        elif self.model:
            assert content(self.ask(shared, elsewhere, "get")) == self.model.popleft()
        elif self.kind != "SimpleQueue":
            with pytest.raises(queue.Empty):
                self.ask(shared, elsewhere, "get_nowait")
            with pytest.raises(queue.Empty):
                shared.get(timeout=0.001)

    @rule(shared=queues)
    def close(self, shared: Any) -> None:
        shared.close()
        if self.kind != "SimpleQueue":
            shared.join_thread()
        if shared not in self.closed:
            self.closed.append(shared)

    @precondition(lambda self: getattr(self, "kind", "") == "JoinableQueue")
    @rule(shared=queues, elsewhere=st.booleans())
    def task_done(self, shared: Any, elsewhere: bool) -> None:
        if shared in self.closed:
            return
        if self.unfinished > len(self.model):
            self.ask(shared, elsewhere, "task_done")
            self.unfinished -= 1
        elif not self.unfinished:
            with pytest.raises(ValueError, match="too many times"):
                self.ask(shared, elsewhere, "task_done")

    @precondition(lambda self: getattr(self, "kind", "") == "JoinableQueue" and not self.unfinished)
    @rule(shared=queues, elsewhere=st.booleans())
    def join(self, shared: Any, elsewhere: bool) -> None:
        if shared not in self.closed:
            self.ask(shared, elsewhere, "join")

    @invariant()
    def is_the_model(self) -> None:
        if hasattr(self, "first"):
            assert self.first.empty() == (not self.model)
            if self.kind != "SimpleQueue":
                assert self.first.qsize() == len(self.model)
                assert self.first.full() == (self.is_bounded and len(self.model) == self.maxsize)

    def teardown(self) -> None:
        if hasattr(self, "first"):
            while self.model:
                assert content(self.first.get()) == self.model.popleft()
            for each in self.all:
                each.close()


@pytest.mark.usefixtures("backend")
def test_a_queue_is_a_deque(long: bool, record_figure: Callable[[str, Any], None]) -> None:
    ours, theirs = Pipe()
    server = get_context("forkserver").Process(target=serve, args=(theirs,))
    server.start()
    theirs.close()
    QueueMachine.conn = ours
    try:
        run(QueueMachine, long, 30, 300, record_figure)
    finally:
        ours.close()
        server.join()
    assert server.exitcode == 1  # EOFError


# --- Pool: expected outcomes ----------------------------------------------------------------------


def do(what: str, value: Any) -> Any:
    if what == "raise":
        raise KeyError(value)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exit":
        os._exit(3)
    if what == "unpicklable":
        return lambda: None
    return value


ERRORS: dict[str, type[Exception]] = {
    "raise": KeyError,
    "die": WorkerLostError,
    "exit": WorkerLostError,
    "unpicklable": MaybeEncodingError,
}
WHAT = st.sampled_from(["return", "return", "return", *ERRORS])
SOME_OBJECTS = st.tuples(st.sampled_from([int, np.arange, bytes]), st.sampled_from([0, 10, 5000, 100_000]))


class Expected:
    """What is to come of something submitted; `whats` is what its tasks do."""

    def __init__(self, result: Any, values: list[Any] | None, whats: set[str], is_map: bool) -> None:
        self.result = result
        self.values = values  # None: an error
        self.errors = tuple(ERRORS[what] for what in sorted(whats & set(ERRORS)))
        self.is_map = is_map


class PoolMachine(Counting):
    """A pool of two workers, which are killed now and then. A kill may cost the one task that is running."""

    results = Bundle("results")

    @initialize(maxtasks=st.sampled_from([None, None, 3]))
    def create(self, maxtasks: int | None) -> None:
        self.pool = get_context("fork").Pool(2, maxtasksperchild=maxtasks)
        self.waiting: list[Expected] = []
        self.kills = self.lost = 0
        self.closed = False

    def expect(self, result: Any, values: list[Any], whats: list[str], is_map: bool = True) -> Expected:
        expected = Expected(result, None if set(whats) & set(ERRORS) else values, set(whats), is_map)
        self.waiting.append(expected)
        return expected

    @precondition(lambda self: not self.closed)
    @rule(what=WHAT, kind_and_value=SOME_OBJECTS, target=results)
    def apply_async(self, what: str, kind_and_value: tuple[Any, int]) -> Any:
        kind, number = kind_and_value
        value = kind(number)
        return self.expect(self.pool.apply_async(do, (what, value)), [value], [what], False)

    @precondition(lambda self: not self.closed)
    @rule(tasks=st.lists(st.tuples(WHAT, st.integers()), max_size=4), chunksize=st.integers(1, 3), target=results)
    def starmap_async(self, tasks: list[tuple[str, int]], chunksize: int) -> Any:
        result = self.pool.starmap_async(do, tasks, chunksize)
        return self.expect(result, [value for _, value in tasks], [what for what, _ in tasks])

    @precondition(lambda self: not self.closed)
    @rule(values=st.lists(st.integers(), max_size=5), chunksize=st.integers(1, 3))
    def imap(self, values: list[int], chunksize: int) -> None:
        found = self.pool.imap(abs, values, chunksize)
        for value in values:
            try:
                assert next(found) == abs(value)
            except WorkerLostError:
                self.lost += 1
                if chunksize > 1:  # of the rest it cannot be told which value is whose
                    break

    @rule(expected=consumes(results))
    def get(self, expected: Expected) -> None:
        self.check(expected)

    def check(self, expected: Expected) -> None:
        self.waiting.remove(expected)
        try:
            found = expected.result.get(timeout=60)
        except expected.errors:
            return
        except WorkerLostError:
            self.lost += 1
            return
        assert expected.values is not None
        for left, right in zip(found if expected.is_map else [found], expected.values, strict=True):
            assert content(left) == content(right)

    @precondition(lambda self: not self.closed)
    @rule(index=st.integers(0, 1))
    def kill_a_worker(self, index: int) -> None:
        # Some that end in a row before they are ready break the pool.
        workers = [worker for worker in list(self.pool._scheduler._workers) if worker.ready]
        if index < len(workers):
            with contextlib.suppress(ProcessLookupError):
                os.kill(workers[index].pid, signal.SIGKILL)
            self.kills += 1

    @rule()
    def close(self) -> None:
        self.pool.close()
        self.closed = True
        with pytest.raises(ValueError, match="Pool not running"):
            self.pool.apply_async(abs, (1,))

    @invariant()
    def a_kill_costs_one_task_at_most(self) -> None:
        assert getattr(self, "lost", 0) <= getattr(self, "kills", 0)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for expected in list(self.waiting):
                self.check(expected)
            self.a_kill_costs_one_task_at_most()
            self.pool.close()
            self.pool.join()


def test_a_pool_is_a_list_of_outcomes(long: bool, record_figure: Callable[[str, Any], None]) -> None:
    run(PoolMachine, long, 6, 60, record_figure)
