"""Segments: used again when nobody needs them, leased by who received, given up when idle."""

from __future__ import annotations

import resource
from typing import Any

import numpy as np
import pytest
from conftest import LIMITED, START_METHODS, mappings, open_fds

from mpmemory import _reaper, _segments, get_context
from mpmemory._reaper import reaper
from mpmemory.connection import Connection, Pipe


def segments() -> set[str]:
    return {line.split()[4] for line in mappings() if "mpmemory-segment" in line}


@pytest.mark.usefixtures("never_idle")
def test_segments_are_used_again(pipe: Any) -> None:
    left, right = pipe
    array = np.zeros(200_000)
    seen = []
    for _ in range(6):
        left.send(array)
        found = right.recv()
        del found
        seen.append(segments())
    assert len(set.union(*seen)) == 1


@pytest.mark.usefixtures("never_idle")
def test_a_segment_is_not_used_again_before_its_last_array_is_gone(pipe: Any) -> None:
    left, right = pipe
    left.send(np.full(200_000, 1))
    first = right.recv()[10:20][::2]
    for value in range(2, 6):
        left.send(np.full(200_000, value))
        assert right.recv()[0] == value
    assert (first == 1).all()
    assert len(segments()) == 2
    assert len(_segments.Lease._held) == 1
    del first
    assert len(_segments.Lease._held) == 0


def test_beyond_the_budget_arrays_are_copies_like_the_others(pipe: Any) -> None:
    left, right = pipe
    array, readonly = np.arange(20_000), np.arange(20_000)
    readonly.flags.writeable = False
    kept = []
    for _ in range(300):
        left.send([array, readonly, bytes(100_000)])
        kept.append(right.recv())
    assert len(_segments.Lease._held) == min(256, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
    for first, second, third in kept:
        assert (first.flags.writeable, second.flags.writeable, len(third)) == (True, False, 100_000)
        assert (first == array).all()
        assert (second == array).all()
        first[:] = -1


@pytest.mark.usefixtures("never_idle")
def test_segments_come_back_from_messages_that_nobody_reads() -> None:
    left, right = Pipe()
    array = np.zeros(200_000)
    for _ in range(5):
        left.send(array)
    right.close()
    left.close()
    other, last = Pipe()
    with other, last:
        for _ in range(5):
            other.send(array)
        assert sum(map(len, _segments.warm._segments.values())) == 5


def hold_and_wait(conn: Connection) -> None:
    kept = [conn.recv() for _ in range(5)]
    conn.send(len(kept))
    conn.recv()


@pytest.mark.usefixtures("never_idle")
@pytest.mark.parametrize("method", START_METHODS)
def test_segments_come_back_from_a_killed_receiver(method: str) -> None:
    left, right = Pipe()
    with left:
        child = get_context(method).Process(target=hold_and_wait, args=(right,))
        child.start()
        right.close()
        array = np.zeros(200_000)
        for _ in range(5):
            left.send(array)
        assert left.recv() == 5
        child.kill()
        child.join()
        taken = [_segments.warm.take(array.nbytes) for _ in range(5)]
        assert all(segment.last_used for segment in taken)


def test_idle_segments_and_mappings_are_given_up(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reaper, "IDLE_TIMEOUT", 0.1)
    monkeypatch.setattr(_reaper, "INTERVAL", 0.05)
    left, right = pipe
    before = open_fds()
    left.send(np.zeros(200_000))
    kept = right.recv()
    reaper.join()
    assert len(segments()) == 1  # the one in use
    kept[:] = 1
    del kept
    assert (segments(), open_fds()) == (set(), before)
    left.send(np.zeros(200_000))
    assert right.recv().sum() == 0
    reaper.join()


def check_that_nothing_is_inherited(conn: Connection) -> None:
    conn.send((sum(map(len, _segments.warm._segments.values())), len(_segments.warm._mappings)))
    conn.send(np.zeros(200_000))


@pytest.mark.usefixtures("never_idle")
def test_a_forked_child_owns_no_segments(pipe: Any) -> None:
    left, right = pipe
    left.send(np.zeros(200_000))
    right.recv()
    assert _segments.warm._segments
    child = get_context("fork").Process(target=check_that_nothing_is_inherited, args=(left,))
    child.start()
    assert right.recv() == (0, 0)
    assert right.recv().sum() == 0
    child.join()


def test_five_thousand_arrays_are_kept_under_a_limit_of_1024_descriptors(run_python: Any) -> None:
    run_python(
        "import resource, numpy as np\n"
        "from mpmemory.connection import Pipe\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))\n"
        "left, right = Pipe()\n"
        "kept = []\n"
        "for index in range(5000):\n"
        "    left.send(np.full(12_500, index, float))\n"
        "    kept.append(right.recv())\n"
        "assert all((array == index).all() for index, array in enumerate(kept))\n"
        "kept[0][:] = -1; assert kept[1][0] == 1 and kept[4999][0] == 4999\n"
    )


def test_five_thousand_arrays_from_a_queue_are_kept_and_given_up(run_python: Any) -> None:
    run_python(
        "import ctypes, os, resource, numpy as np, mpmemory\n"
        "from mpmemory import _reaper, _segments\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))\n"
        "_reaper.IDLE_TIMEOUT, _reaper.INTERVAL = 0.2, 0.1\n"
        "def write(queue):\n"
        "    for index in range(5000): queue.put(np.full(12_500, index, float))\n"
        "def resident():\n"
        "    with open('/proc/self/statm') as file: return int(file.read().split()[1]) * resource.getpagesize()\n"
        "ctx = mpmemory.get_context('fork')\n"
        "queue = ctx.Queue(100)\n"
        "child = ctx.Process(target=write, args=(queue,), daemon=True)\n"
        "child.start()\n"
        "fds, memory = os.listdir('/proc/self/fd'), resident()\n"
        "kept = [queue.get() for _ in range(5000)]\n"
        "child.join()\n"
        "assert all((array == index).all() for index, array in enumerate(kept))\n"
        "assert len(_segments.Lease._held) == 256 and resident() > memory + 450e6\n"
        "del kept\n"
        "_reaper.reaper.join()\n"
        "assert os.listdir('/proc/self/fd') == fds\n"
        "ctypes.CDLL(None).malloc_trim(0)\n"  # what the C library keeps of freed copies is not ours
        "assert resident() < memory + 100e6, resident() - memory\n"
    )


def test_what_is_warm_makes_room(run_python: Any) -> None:
    run_python(
        LIMITED + "from mpmemory._segments import MIN_SIZE, warm\n"
        "taken = [warm.take(MIN_SIZE) for _ in range(5)]\n"
        "for segment in taken:\n"
        "    warm.give_back(segment)\n"
        "del taken, segment\n"
        "with no_descriptors_left():\n"
        "    assert warm.take(4 * MIN_SIZE).size == 4 * MIN_SIZE\n"
        "assert not warm._segments\n"
        "expect_the_limit(lambda: warm.take(MIN_SIZE))\n"
    )


def test_what_is_warm_makes_room_in_a_small_file_system(run_python: Any, small_shm: list[str]) -> None:
    run_python(
        "import os\nos.environ['MPMEMORY_BACKEND'] = 'posix'\n"
        "from mpmemory._segments import warm\n"
        "warm.give_back(warm.take(1 << 19))\n"
        "assert warm.take(1 << 20).size == 1 << 20\n",
        prefix=small_shm,
    )
