"""Queues whose users are killed, or have no descriptors left."""

from __future__ import annotations

import contextlib
import random
import signal
from collections import Counter
from multiprocessing.connection import wait
from queue import Full
from typing import Any

import numpy as np
import pytest
from conftest import LIMITED

from mpmemory import get_context

EACH = 5000  # messages of a writer


def content(writer: int, number: int) -> np.ndarray:
    # Small enough that the socket takes all that a maxsize allows: a killed writer had nothing unsent, then.
    return np.full(2500 if number % 50 == 0 else number % 20, writer * EACH + number)


def write(queue: Any, writer: int, stay: bool) -> None:
    for number in range(EACH):
        queue.put((writer, number, content(writer, number)))
    if stay:
        signal.pause()


def read(queue: Any, reports: Any) -> None:
    """Report what was received, before receiving more."""
    while (item := queue.get()) is not None:
        writer, number, array = item
        assert (array == content(writer, number)).all()
        reports.send((writer, number))
    reports.send(None)


@pytest.mark.parametrize(
    ("method", "maxsize"), [("fork", 0), ("fork", 100), ("forkserver", 0), ("spawn", 0), ("spawn", 100)]
)
def test_survivors_receive_each_message_exactly_once(method: str, maxsize: int) -> None:
    """Two of four writers and two of four readers are killed among 20,000 messages.

    All messages of the other writers arrive, and a prefix of those of a killed one, each once; but for one
    that each killed reader may have received and not reported.
    """
    chosen = random.Random(f"{method} {maxsize}")
    ctx = get_context(method)
    queue = ctx.Queue(maxsize)
    doomed_readers, doomed_writers = chosen.sample(range(4), 2), chosen.sample(range(4), 2)
    pipes = [ctx.Pipe(duplex=False) for _ in range(4)]
    readers = [ctx.Process(target=read, args=(queue, there)) for _, there in pipes]
    writers = [ctx.Process(target=write, args=(queue, writer, writer in doomed_writers)) for writer in range(4)]
    for process in (*readers, *writers):
        process.start()

    reading = {here: index for index, (here, _) in enumerate(pipes)}
    writing = {process.sentinel for index, process in enumerate(writers) if index not in doomed_writers}
    seen: list[list[tuple[int, int]]] = [[] for _ in readers]
    victims: list[tuple[Any, Any]] = [(readers[index], pipes[index][1]) for index in doomed_readers]
    victims += [(writers[index], None) for index in doomed_writers]
    chosen.shuffle(victims)
    kills = dict(zip(sorted(chosen.sample(range(1, EACH * 3 // 2), 4)), victims, strict=True))
    ends = 2
    while reading:
        for ready in wait([*reading, *writing]):
            if ready in writing:
                writing.remove(ready)
            elif (item := ready.recv()) is None:
                del reading[ready]
            else:
                seen[reading[ready]].append(item)
        while kills and sum(map(len, seen)) >= min(kills):
            victim, reports = kills.pop(min(kills))
            victim.kill()
            victim.join()
            assert victim.exitcode == -signal.SIGKILL
            if reports:
                reports.send(None)  # on the victim's behalf
        if not kills and not writing and ends:
            with contextlib.suppress(Full):  # the readers may be waiting for us
                queue.put_nowait(None)
                ends -= 1

    for process in (*readers, *writers):
        process.join()
    found = Counter(item for items in seen for item in items)
    assert set(found.values()) == {1}
    missing = 0
    for writer in range(4):
        numbers = [number for each, number in found if each == writer]
        missing += (max(numbers, default=-1) + 1 if writer in doomed_writers else EACH) - len(numbers)
    assert missing <= len(doomed_readers)
    for items in seen:  # in the order of each writer
        assert sorted(items) == sorted(items, key=lambda item: item[0])
    assert queue.empty()
    assert not maxsize or queue.qsize() <= len(victims)  # at most one place goes with who was killed


def test_out_of_descriptors_at_put(run_python: Any) -> None:
    run_python(
        LIMITED + "for queue in (Queue(2), JoinableQueue(2)):\n"
        "    for _ in range(5):\n"
        "        expect_the_limit(lambda: queue.put(np.zeros(100_000)))\n"
        "    assert queue.qsize() == 0\n"
        "    queue.put(np.ones(100_000), timeout=0)\n"
        "    queue.put('next', timeout=0)\n"
        "    assert (queue.get().sum(), queue.get()) == (100_000, 'next')\n"
        "    if isinstance(queue, JoinableQueue): queue.task_done(); queue.task_done(); queue.join()\n"
    )


def test_out_of_descriptors_when_what_was_put_is_sent_later(run_python: Any) -> None:
    """It waits until there are descriptors again."""
    run_python(
        LIMITED + "for queue in (Queue(50), JoinableQueue(50)):\n"
        "    for index in range(40): queue.put((index, bytes(30_000)))\n"  # more than the socket takes
        "    assert queue._unsent\n"
        "    queue.put(np.zeros(100_000))\n"
        "    queue.put('next')\n"
        "    with no_descriptors_left():\n"
        "        assert [queue.get()[0] for _ in range(40)] == list(range(40))\n"
        "    assert (queue.get().sum(), queue.get(), queue.qsize()) == (0, 'next', 0)\n"
        "    queue.put(np.ones(100_000))\n"
        "    assert queue.get().sum() == 100_000\n"
        "    if isinstance(queue, JoinableQueue):\n"
        "        for _ in range(43): queue.task_done()\n"
        "        queue.join()\n"
    )


def test_out_of_descriptors_at_get(run_python: Any) -> None:
    run_python(
        LIMITED + "queue = Queue(2)\n"
        "for obj in (Memory(10), np.zeros(100_000), socket.socket()):\n"
        "    for get in (queue.get, queue.get_nowait, lambda: queue.get(timeout=10)):\n"
        "        queue.put(obj, timeout=0)\n"
        "        queue.put('next', timeout=0)\n"
        "        expect_the_limit(get)\n"
        "        assert (queue.get(), queue.qsize()) == ('next', 0)\n"
        "        queue.put(obj, timeout=0); queue.get()\n"
    )
