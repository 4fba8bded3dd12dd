"""SimpleQueue, Queue and JoinableQueue: the semantics of multiprocessing's, and processes that die using them."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from queue import Empty, Full
from typing import Any

import numpy as np
import pytest
from conftest import START_METHODS, open_fds

import mpmemory
from mpmemory import Memory, context, get_context, queues
from mpmemory._backends import platform
from mpmemory.testing import assert_no_leaks


def test_contexts_make_ours() -> None:
    ctx = get_context("spawn")
    queue, simple, joinable = ctx.Queue(2), ctx.SimpleQueue(), ctx.JoinableQueue()
    assert (type(queue), type(simple), type(joinable)) == (queues.Queue, queues.SimpleQueue, queues.JoinableQueue)
    left, right = ctx.Pipe()
    with left, right:
        assert type(left) is mpmemory.connection.Connection


def test_where_something_is_missing_contexts_make_the_stock_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "messages_work", lambda: False)
    ctx = get_context("spawn")
    queue, simple, joinable = ctx.Queue(2), ctx.SimpleQueue(), ctx.JoinableQueue()
    assert {type(each).__module__ for each in (queue, simple, joinable)} == {"multiprocessing.queues"}
    left, right = ctx.Pipe()
    with left, right:
        left.send(Memory.from_bytes(b"still"))
        assert right.recv().pread(5) == b"still"
    simple.close()
    queue.close()
    queue.join_thread()
    joinable.close()
    joinable.join_thread()


def test_messages_work_here() -> None:
    assert platform.messages_work()


def test_simple_queue() -> None:
    queue = queues.SimpleQueue()
    assert queue.empty()
    queue.put([1, Memory.from_bytes(b"abc")])
    assert not queue.empty()
    number, memory = queue.get()
    assert (number, memory.pread(3)) == (1, b"abc")
    queue.close()
    with pytest.raises(OSError, match="closed"):
        queue.put(1)


def test_full_and_empty() -> None:
    queue = queues.Queue(2)
    assert queue.empty()
    assert not queue.full()
    for get in (queue.get_nowait, lambda: queue.get(False), lambda: queue.get(True, 0.01), lambda: queue.get(True, -1)):
        with pytest.raises(Empty):
            get()
    queue.put(1)
    queue.put_nowait(2)
    assert queue.full()
    assert queue.qsize() == 2
    for put in (lambda: queue.put_nowait(3), lambda: queue.put(3, False), lambda: queue.put(3, True, 0.01)):
        with pytest.raises(Full):
            put()
    assert (queue.get(), queue.get(True, 10)) == (1, 2)
    assert queue.qsize() == 0
    threading.Thread(target=queue.put, args=("by a thread",)).start()
    assert queue.get() == "by a thread"
    queue.close()
    for action in (queue.get, lambda: queue.put(1)):
        with pytest.raises(ValueError, match="is closed"):
            action()
    queue.join_thread()


def test_put_never_waits_for_readers() -> None:
    queue = queues.Queue()
    array = np.arange(20_000)
    for index in range(3000):
        queue.put((index, array if index % 500 == 0 else None))
        array[:] = -1  # what was put is what arrives
        array[:] = np.arange(20_000)
    assert queue.qsize() == 3000
    for index in range(3000):
        number, found = queue.get()
        assert number == index
        assert found is None or (found == np.arange(20_000)).all()
    assert queue.qsize() == 0
    queue.close()
    queue.join_thread()


def test_unsent_messages_hold_no_descriptors() -> None:
    queue = queues.Queue()
    memory = Memory(10)
    for _ in range(400):
        queue.put(None)  # until the socket is full
    before = len(open_fds())
    for _ in range(1000):
        queue.put((memory, np.zeros(20_000)))
    assert len(open_fds()) <= before + 4
    queue.cancel_join_thread()
    while queue.qsize():
        queue.get()
    queue.close()
    queue.join_thread()


def test_errors_are_raised_where_the_mistake_is() -> None:
    queue = queues.JoinableQueue(5)
    with assert_no_leaks(), pytest.raises((pickle.PicklingError, AttributeError)):
        queue.put([Memory(10), lambda: None])
    assert queue.qsize() == 0
    queue.join()
    with pytest.raises(ValueError, match="too many times"):
        queue.task_done()


class Broken:
    """Cannot be unpickled."""

    def __reduce__(self) -> Any:
        return int, ("not a number",)


def test_what_cannot_be_unpickled_is_gone_and_the_next_is_fine() -> None:
    queue = queues.Queue(2)
    for get in (queue.get, queue.get_nowait, lambda: queue.get(timeout=10)):
        queue.put([Memory(10), np.zeros(100_000), Broken()])
        queue.put("next")
        with pytest.raises(ValueError, match="not a number"):
            get()
        assert (queue.get(), queue.qsize()) == ("next", 0)


def test_a_foreign_datagram_in_a_queue_takes_and_gives_no_place() -> None:
    queue = queues.Queue(2)
    os.write(queue._writer.fileno(), b"foreign")
    queue.put("next")
    with pytest.raises(OSError, match="expected a message of mpmemory") as error:
        queue.get()
    assert error.value.errno == errno.EBADMSG
    assert (queue.get(), queue.qsize()) == ("next", 0)


def work(requests: Any, results: Any) -> None:
    for item in iter(requests.get, None):
        results.put(item * 2)
        if isinstance(requests, queues.JoinableQueue):
            requests.task_done()


@pytest.mark.parametrize("method", START_METHODS)
@pytest.mark.parametrize("kind", ["Queue", "JoinableQueue", "SimpleQueue"])
def test_workers(kind: str, method: str) -> None:
    ctx = get_context(method)
    requests, results = getattr(ctx, kind)(), ctx.Queue()
    workers = [ctx.Process(target=work, args=(requests, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for number in range(200):
        requests.put(number)
    if kind == "JoinableQueue":
        requests.join()
    assert sorted(results.get() for _ in range(200)) == [2 * number for number in range(200)]
    for _ in workers:
        requests.put(None)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0


def put_many_and_leave(queue: Any) -> None:
    for number in range(2000):
        queue.put((number, Memory.from_bytes(b"x") if number % 100 == 0 else None))


@pytest.mark.parametrize("method", START_METHODS)
def test_what_was_put_is_sent_before_the_process_ends(method: str) -> None:
    ctx = get_context(method)
    queue = ctx.Queue()
    child = ctx.Process(target=put_many_and_leave, args=(queue,))
    child.start()
    found = [queue.get() for _ in range(2000)]
    child.join()
    assert [number for number, _ in found] == list(range(2000))
    assert all(memory.pread(1) == b"x" for _, memory in found if memory)
    assert child.exitcode == 0


def write(queue: Any, first: int, count: int) -> None:
    for number in range(first, first + count):
        queue.put((number, bytes(number % 5000), np.full(2500 if number % 50 == 0 else 1, number)))


def read(queue: Any, results: Any) -> None:
    seen = []
    while (item := queue.get()) is not None:
        number, data, array = item
        assert len(data) == number % 5000
        assert (array == number).all()
        seen.append(number)
    results.put(seen)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_each_message_exactly_once(method: str) -> None:
    ctx = get_context(method)
    queue, results = ctx.Queue(), ctx.Queue()
    readers = [ctx.Process(target=read, args=(queue, results)) for _ in range(4)]
    writers = [ctx.Process(target=write, args=(queue, first, 5000)) for first in range(0, 20_000, 5000)]
    for process in (*readers, *writers):
        process.start()
    for writer in writers:
        writer.join()
    for _ in readers:
        queue.put(None)
    counts = Counter(number for _ in readers for number in results.get())
    for reader in readers:
        reader.join()
    assert len(counts) == 20_000
    assert set(counts.values()) == {1}


def write_for_ever(queue: Any, ready: Any) -> None:
    ready.set()
    number = 0
    while True:
        queue.put(("noise", np.full(3000, number)))
        number += 1


def read_for_ever(queue: Any, ready: Any) -> None:
    while True:
        queue.get()
        ready.set()


def test_killed_readers_and_writers_hang_nobody() -> None:
    """The stock Queue hangs for ever if a reader is killed with the lock that all readers share."""
    ctx = get_context("fork")
    queue = ctx.Queue()
    for _ in range(10):
        events = [ctx.Event(), ctx.Event()]
        doomed = [
            ctx.Process(target=write_for_ever, args=(queue, events[0])),
            ctx.Process(target=read_for_ever, args=(queue, events[1])),
        ]
        for process in doomed:
            process.start()
        for event in events:
            event.wait()
        for process in doomed:
            assert process.pid
            os.kill(process.pid, signal.SIGKILL)
            process.join()
    results = ctx.SimpleQueue()
    reader = ctx.Process(target=read_signal, args=(queue, results))
    reader.start()
    queue.put(("signal", 42))
    assert results.get() == 42
    reader.join()


def read_signal(queue: Any, results: Any) -> None:
    while True:
        kind, value = queue.get()
        if kind == "signal":
            results.put(value)
            return


def double(obj: Any) -> Any:
    return obj * 2


@pytest.mark.parametrize("method", START_METHODS)
def test_the_stock_pool_and_executor_use_them(method: str) -> None:
    ctx = get_context(method)
    array = np.arange(100_000)
    with ctx.Pool(2) as pool:
        assert (pool.map(double, [array])[0] == 2 * array).all()
        assert pool.map(double, range(100)) == [2 * number for number in range(100)]
    with ProcessPoolExecutor(2, mp_context=ctx) as executor:
        assert (executor.submit(double, array).result() == 2 * array).all()


def test_plain_pickle_is_refused() -> None:
    for queue in (queues.Queue(), queues.SimpleQueue(), queues.JoinableQueue()):
        with pytest.raises(TypeError, match="cannot pickle or copy"):
            pickle.dumps(queue)
    left, right = multiprocessing.Pipe()
    with left, right:
        left.send(queues.SimpleQueue())  # by the stock pipe, through the resource sharer
        again = right.recv()
        again.put("x")
        assert again.get() == "x"


def test_a_raw_fork_sends_only_what_it_put_itself() -> None:
    queue = queues.Queue()
    for number in range(1000):
        queue.put(number)
    assert queue._unsent
    if (pid := os.fork()) == 0:
        try:
            queue.put("by the child")
            queue.close()
            queue.join_thread()
        finally:
            os._exit(0)
    found = [queue.get() for _ in range(1001)]
    os.waitpid(pid, 0)
    assert queue.empty()
    assert [each for each in found if each != "by the child"] == list(range(1000))
    queue.close()
    queue.join_thread()


def read_all_when_told(queue: Any, conn: Any) -> None:
    conn.recv()
    conn.send([queue.get() for _ in range(1000)])


def test_join_thread_waits_until_all_is_sent() -> None:
    ctx = mpmemory.get_context("fork")
    queue, (left, right) = ctx.Queue(), ctx.Pipe()
    child = ctx.Process(target=read_all_when_told, args=(queue, right))
    child.start()
    for number in range(1000):  # more than the socket takes
        queue.put((number, bytes(1000)))
    queue.close()
    waiting = threading.Thread(target=queue.join_thread)
    waiting.start()
    while not any(frame.f_code.co_name == "join" for frame, _ in traceback.walk_stack(stack_of(waiting))):
        os.sched_yield()
    left.send("go")
    waiting.join()
    assert left.recv() == [(number, bytes(1000)) for number in range(1000)]
    child.join()
    for conn in (left, right):
        conn.close()


def stack_of(thread: threading.Thread) -> Any:
    return sys._current_frames()[thread.ident or 0]


# --- when putting is interrupted, or cannot go on ---


def test_where_no_thread_can_be_started_nothing_was_put() -> None:
    queue = queues.Queue()
    put = 0
    default = threading.stack_size(1 << 46)  # more than there is address space
    try:
        while True:
            queue.put(put)
            put += 1
    except RuntimeError:
        pass
    finally:
        threading.stack_size(default)
    assert queue.qsize() == put
    queue.put("next")
    assert [queue.get() for _ in range(put + 1)] == [*range(put), "next"]
    queue.close()
    queue.join_thread()


def test_put_in_the_middle_of_put() -> None:
    """As a signal handler may, or a finalizer that the garbage collector runs."""
    queue = queues.Queue()

    def interrupt(frame: Any, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_name == "send_message":
            sys.setprofile(None)
            queue.put("inner")

    sys.setprofile(interrupt)
    try:
        queue.put("outer")
    finally:
        sys.setprofile(None)
    assert {queue.get(), queue.get()} == {"inner", "outer"}
    queue.close()


def test_join_thread_does_not_wait_if_that_was_cancelled() -> None:
    queue = queues.Queue()
    for number in range(1000):
        queue.put(number)
    sender = queue._sender
    assert sender
    reader = os.dup(queue._reader.fileno())  # as another process has it
    queue.cancel_join_thread()
    queue.close()
    queue.join_thread()
    assert sender.is_alive()
    os.close(reader)
    sender.join()


def test_cancel_join_thread_is_of_one_process() -> None:
    ctx = get_context("fork")
    queue = ctx.Queue()
    queue.cancel_join_thread()
    child = ctx.Process(target=put_many_and_leave, args=(queue,))
    child.start()
    assert [queue.get(timeout=20)[0] for _ in range(2000)] == list(range(2000))
    child.join()


def test_a_time_limit_of_years() -> None:
    queue = queues.Queue(1)
    queue.put(1)
    getter = threading.Thread(target=queue.get)
    thread = threading.Thread(target=queue.put, args=(2, True, threading.TIMEOUT_MAX))
    thread.start()
    getter.start()
    thread.join()
    getter.join()
    assert queue.get(timeout=20) == 2
    queue.close()


def test_a_message_that_cannot_be_sent_stops_no_other(run_python: Any) -> None:
    done = run_python(
        "import resource, numpy as np\n"
        "from mpmemory.queues import JoinableQueue\n"
        "queue = JoinableQueue(1003)\n"
        "for number in range(1000): queue.put(number)\n"
        "queue.put(np.zeros(1_000_000)); queue.put('next')\n"
        "assert len(queue._unsent) > 2\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, -1))\n"
        "assert [queue.get(timeout=20) for _ in range(1001)] == [*range(1000), 'next']\n"
        "assert queue.qsize() == 0\n"
        "for _ in range(1001): queue.task_done()\n"
        "queue.join()\n"
    )
    assert "cannot have a segment of 8388608 bytes" in done.stderr


OUT_OF_DESCRIPTORS = (
    "import errno, os, resource, numpy as np\n"
    "from mpmemory import Memory\n"
    "from mpmemory.queues import Empty, Queue\n"
    "Memory(1)  # a backend may import something\n"
    "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
    "def fill():\n"
    "    fds = []\n"
    "    try:\n"
    "        while True: fds.append(os.dup(0))\n"
    "    except OSError: return fds\n"
)


def test_what_waits_to_be_sent_waits_for_descriptors(run_python: Any) -> None:
    run_python(
        OUT_OF_DESCRIPTORS + "queue = Queue()\n"
        "for number in range(1000): queue.put(number)\n"
        "queue.put(np.ones(100_000)); queue.put('next')\n"
        "fds = fill()\n"
        "assert [queue.get() for _ in range(1000)] == list(range(1000))\n"
        "try: queue.get(timeout=0.2)\n"
        "except Empty: pass\n"
        "for fd in fds: os.close(fd)\n"
        "assert queue.get(timeout=20).sum() == 100_000 and queue.get(timeout=20) == 'next'\n"
        "queue.close(); queue.join_thread()\n"
    )


def test_what_cannot_be_received_gives_its_place_back(run_python: Any) -> None:
    run_python(
        OUT_OF_DESCRIPTORS + "queue = Queue(1)\n"
        "for obj in (Memory(1), np.zeros(100_000)):\n"
        "  for wait in (True, False):\n"
        "    queue.put(obj, timeout=20)\n"
        "    fds = fill()\n"
        "    try: queue.get(wait)\n"
        "    except OSError as error: assert error.errno == errno.EMFILE\n"
        "    else: raise SystemExit('no error')\n"
        "    for fd in fds: os.close(fd)\n"
        "    assert queue.qsize() == 0\n"
        "queue.put('next', timeout=20)\n"
        "assert queue.get() == 'next'\n"
    )


class Closing:
    """Closes a queue when it is pickled."""

    def __init__(self, queue: queues.Queue) -> None:
        self.queue = queue

    def __reduce__(self) -> Any:
        self.queue.close()
        return int, ()


def test_close_in_the_middle_of_put() -> None:
    queue = queues.Queue(1)
    with pytest.raises(ValueError, match="is closed"):
        queue.put(Closing(queue))
    assert queue.qsize() == 0
    queue.join_thread()
