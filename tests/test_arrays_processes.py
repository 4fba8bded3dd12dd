"""Arrays between processes, and lost ones."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
from conftest import START_METHODS, Array, address, dumps, echo, mappings, open_fds

import mpmemory
from mpmemory import HandleLostError, Memory, _fds, _mappings, _references, arrays
from mpmemory._reaper import reaper
from mpmemory._slabs import slabs

# --- between processes ----------------------------------------------------------------------------


def double(a: Array) -> Array:
    assert arrays.is_shared(a)
    a *= 2
    return a


def make_three(value: float) -> Array:
    a = arrays.zeros(100_000)
    a[:3] = value
    return a[:3]


_initial: Array = None


def keep(a: Array) -> None:
    global _initial
    _initial = a


def add_initial(a: Array) -> None:
    a += _initial


@pytest.mark.parametrize("stock", [False, True])
def test_through_all_channels(stock: bool, ctx: Any) -> None:
    chosen = multiprocessing.get_context(ctx.get_start_method()) if stock else ctx
    a = arrays.ones((4, 6))
    initial = arrays.full(3, 5)
    with chosen.Pool(2, keep, (initial,)) as pool:
        results = pool.map(double, [a[0:2], a[2:4, ::-1]])
        results[0][0, 0] = -1
        assert a.tolist() == [[-1, 2, 2, 2, 2, 2], [2] * 6, [2] * 6, [2] * 6]
        assert [found.tolist() for found in pool.map(make_three, [1, 2])] == [[1] * 3, [2] * 3]
        initial[:] = 10
        pool.apply(add_initial, (a[1, :3],))
        assert a[1].tolist() == [12, 12, 12, 2, 2, 2]
        pool.close()
        pool.join()
    child = chosen.Process(target=double, args=(a[1],))
    child.start()
    child.join()
    assert a[1].tolist() == [24, 24, 24, 4, 4, 4]
    queue = chosen.SimpleQueue()
    queue.put(a[2])
    found = queue.get()
    found[:] = 7
    assert a[2].tolist() == [7] * 6
    queue.close()
    with ProcessPoolExecutor(1, mp_context=chosen) as executor:
        found = executor.submit(double, a[3, 1:3]).result()
        assert found.tolist() == a[3, 1:3].tolist() == [4, 4]


def make_and_exit(value: float) -> Array:
    return arrays.full((300, 300), value), arrays.full(3, value)


def test_results_outlive_their_worker(ctx: Any) -> None:
    with ctx.Pool(1, maxtasksperchild=1) as pool:
        made = pool.map(make_and_exit, range(3), chunksize=1)
        pool.close()
        pool.join()
    for value, (large, small) in enumerate(made):
        assert (large == value).all()
        assert small.tolist() == [value] * 3
        large[:] = small[:] = -1


def make_and_wait(conn: Any) -> None:
    conn.send(arrays.full((300, 300), 5))
    conn.recv()


def test_arrays_outlive_a_killed_owner(ctx: Any) -> None:
    left, right = ctx.Pipe()
    with left:
        child = ctx.Process(target=make_and_wait, args=(right,))
        child.start()
        right.close()
        a = left.recv()
        child.kill()
        child.join()
    assert (a == 5).all()
    a[:] = 6
    assert (echo(a) == 6).all()


def count_fds_and_mappings(arguments: tuple[Array, int]) -> tuple[int, int]:
    a, index = arguments
    a[index] = index
    return len(open_fds()), len(mappings())


def test_a_busy_worker_maps_a_memory_once(ctx: Any) -> None:
    a = arrays.zeros(100_000)
    with ctx.Pool(1) as pool:
        counts = [pool.apply(count_fds_and_mappings, ((a, index),)) for index in range(20)]
        assert len(set(counts[1:])) == 1  # the first descriptor is kept, any other goes with its message
        assert counts[0][1] == counts[1][1]
        pool.close()
        pool.join()
    assert a[:20].tolist() == list(range(20))


@pytest.mark.usefixtures("never_idle")
def test_a_stream_of_arrays_takes_few_descriptors_and_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(open_fds())
    for _ in range(3 * _fds.budget()):
        echo(arrays.zeros(100_000))
    assert len(open_fds()) - before < _fds.budget()
    monkeypatch.setattr(_mappings, "WARM_MAX", 3_000_000)
    for _ in range(10):
        echo(arrays.zeros(100_000))
    assert len([line for line in mappings() if "array" in line]) == 3
    often = arrays.zeros(100_000)
    for _ in range(10):
        echo(often)
        echo(arrays.zeros(100_000))
    where = address(echo(often))
    del often
    assert any(line.startswith(f"{where:x}-") for line in mappings())
    echo(arrays.zeros(1_000_000))  # the last one stays, whatever its size
    assert len([line for line in mappings() if "array" in line]) == 1


def hold_nothing(conn: Any) -> None:
    from mpmemory import _reaper

    _reaper.IDLE_TIMEOUT = _reaper.INTERVAL = 0.01
    conn.recv()
    reaper.join()
    conn.send([line for line in mappings() if "array" in line] + [w for w in open_fds().values() if "array" in w])


def test_an_idle_process_gives_up_what_it_received(ctx: Any) -> None:
    left, right = ctx.Pipe()
    with left, right:
        child = ctx.Process(target=hold_nothing, args=(right,))
        child.start()
        left.send(arrays.zeros(100_000))
        gc.collect()
        assert left.recv() == []
        child.join()


def overlap(a: Array, conn: Any) -> None:
    mine = arrays.full(10, 2)
    conn.send(arrays.memory_of(mine).identity == arrays.memory_of(a).identity)
    conn.recv()
    conn.send(mine)


def test_a_forked_child_fills_slabs_of_its_own() -> None:
    ctx = mpmemory.get_context("fork")
    a = arrays.full(10, 1)
    left, right = ctx.Pipe()
    with left, right:
        child = ctx.Process(target=overlap, args=(a, right))
        child.start()
        assert left.recv() is False
        b = arrays.full(10, 3)
        left.send(None)
        assert left.recv().tolist() == [2] * 10
        child.join()
    assert (a.tolist(), b.tolist()) == ([1] * 10, [3] * 10)


def use_arrays(conn: Any) -> None:
    warm = [line for line in mappings() if "array" in line]
    conn.send((warm, echo(arrays.full((300, 300), 2)).sum(), echo(arrays.ones(3)).sum()))


@pytest.mark.usefixtures("never_idle")
def test_a_fork_while_other_threads_use_arrays() -> None:
    echo(arrays.zeros(100_000))  # now kept warm: by this process, not by the child
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with _mappings._lock, slabs._lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    ctx = mpmemory.get_context("fork")
    left, right = ctx.Pipe()
    with left, right:
        child = ctx.Process(target=use_arrays, args=(right,))
        child.start()
        done.set()
        thread.join()
        try:
            assert left.poll(20)
            assert left.recv() == ([], 180_000, 3)
        finally:
            child.kill()
            child.join()


# --- lost ones ------------------------------------------------------------------------------------


def test_python_objects_are_never_taken_from_memory() -> None:
    """They are addresses."""
    for dtype in ("O", "i4,O"):
        lost = _references._rebuild(Memory(100), 0, (2,), (16,), np.dtype(dtype), True)
        with pytest.raises(HandleLostError, match="cannot hold Python objects"):
            lost[0]


def test_a_lost_array_says_so_when_it_is_used() -> None:
    data = dumps(arrays.zeros(100_000))
    gc.collect()
    pickle.loads(data)
    lost = pickle.loads(data)  # what a sender gives out once
    assert repr(lost) == "<LostArray>"
    assert (lost.shape, lost.dtype, lost.ndim) == ((100_000,), np.dtype(float), 1)
    actions: list[Callable[[], Any]] = [
        lambda: lost[0],
        lambda: lost.T,
        lambda: lost.sum(),
        lambda: len(lost),
        lambda: list(lost),
        lambda: lost + 1,
        lambda: 1 - lost,
        lambda: np.asarray(lost),
        lambda: np.sum(lost),
        lambda: np.ones(3) * lost,
        lambda: lost == 1,
        lambda: bool(lost),
        lambda: lost.__setitem__(0, 1),
        lambda: dumps(lost),
        lambda: copy.copy(lost),
        lambda: setattr(lost, "shape", (3,)),
        lambda: divmod(lost, 2),
        lambda: arrays.memory_of(lost),
        lambda: arrays.frozen(lost),
    ]
    for action in actions:
        with pytest.raises(HandleLostError, match="the array cannot be had"):
            action()


def pickle_and_leave(conn: Any) -> None:
    conn.send_bytes(dumps([arrays.zeros(100_000), arrays.zeros(3)]))


@pytest.mark.parametrize("method", START_METHODS)
def test_an_array_whose_sender_was_killed_is_lost(method: str) -> None:
    left, right = multiprocessing.Pipe()
    child = multiprocessing.get_context(method).Process(target=pickle_and_leave, args=(right,))
    child.start()
    data = left.recv_bytes()
    child.kill()
    child.join()
    for lost in pickle.loads(data):
        with pytest.raises(HandleLostError, match=f"{child.pid}"):
            lost[0]
    left.close()
    right.close()


def test_an_array_beyond_the_end_of_its_memory_is_lost() -> None:
    lost = _references._rebuild(Memory(100), 0, (13,), (8,), np.dtype("f8"), True)
    with pytest.raises(HandleLostError, match="the array cannot be had"):
        lost[0]
