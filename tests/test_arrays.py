"""NumPy arrays in shared memory: made as NumPy makes them, sent by reference through everything."""

from __future__ import annotations

import copy
import fcntl
import gc
import inspect
import itertools
import mmap
import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from conftest import LIMITED, START_METHODS, dumps, mappings, open_fds
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

import mpmemory
from mpmemory import (
    HandleLostError,
    Memory,
    Seal,
    SharedBuffer,
    SharedMemory,
    _fds,
    _mappings,
    _references,
    _slabs,
    arrays,
)
from mpmemory._backends import platform
from mpmemory._reaper import reaper
from mpmemory._slabs import Slabs, slabs

Array = Any

DTYPES = st.one_of(
    nps.boolean_dtypes(),
    nps.integer_dtypes(endianness="?"),
    nps.floating_dtypes(endianness="?"),
    nps.complex_number_dtypes(),
    nps.datetime64_dtypes(),
    nps.timedelta64_dtypes(),
    nps.byte_string_dtypes(min_len=1, max_len=5),
    nps.unicode_string_dtypes(min_len=1, max_len=5),
    nps.array_dtypes(nps.integer_dtypes() | nps.unicode_string_dtypes(min_len=1, max_len=3), min_size=1, max_size=3),
)
SHAPES = nps.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


def address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def same(left: Array, right: Array) -> bool:
    """Return whether they are equal in every byte: NaN is NaN, NaT is NaT."""
    return bool(left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes())


def layout(array: Array) -> tuple[Any, ...]:
    return array.shape, array.strides, array.dtype, array.flags.writeable


def echo(array: Array) -> Array:
    """Send and receive an array within this process."""
    return pickle.loads(dumps(array))


def far_echo(array: Array) -> Array:
    """The same, as if this were another process: with a mapping of its own."""
    data = dumps(array)
    _mappings._whole.clear()
    return pickle.loads(data)


# --- made as NumPy makes them ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["empty", "zeros", "ones", "full", "array", "empty_like", "zeros_like"])
def test_signatures_are_numpy_s(name: str) -> None:
    ours = list(inspect.signature(getattr(arrays, name)).parameters)
    assert name in arrays.__all__
    expected = {
        "empty": ["shape", "dtype", "order"],
        "full": ["shape", "fill_value", "dtype", "order"],
        "array": ["object", "dtype", "order"],
        "empty_like": ["prototype", "dtype", "order", "shape"],
    }
    assert ours == expected[name.replace("zeros", "empty").replace("ones", "empty")]


@given(SHAPES, DTYPES, st.sampled_from("CF"))
def test_zeros_and_empty(shape: Any, dtype: Any, order: Any) -> None:
    expected = np.zeros(shape, dtype, order)
    for found in (arrays.zeros(shape, dtype, order), arrays.empty(shape, dtype, order)):
        assert type(found) is np.ndarray
        assert same(found, expected)
        assert not found.size or layout(found) == layout(expected)
        assert found.flags.aligned
        assert arrays.is_shared(found)


@given(SHAPES, st.sampled_from(["f8", "i4", "?", "c16", "M8[s]", "U3", "S2"]), st.sampled_from("CF"))
def test_ones_and_full(shape: Any, dtype: Any, order: Any) -> None:
    for found, expected in (
        (arrays.ones(shape, dtype, order), np.ones(shape, dtype, order)),
        (arrays.full(shape, 7, dtype, order), np.full(shape, 7, dtype, order)),
    ):
        assert same(found, expected)
        assert not found.size or layout(found) == layout(expected)
    found = arrays.full(shape, 2.5)
    assert same(found, np.full(shape, 2.5))


@given(
    nps.arrays(st.sampled_from(["f8", "i2", "U2"]), SHAPES),
    st.randoms(),
    st.sampled_from("CFAK"),
    st.sampled_from([None, "f4", "S3"]),
)
def test_likes_and_copies(source: Array, random: Any, order: Any, dtype: Any) -> None:
    axes = list(range(source.ndim))
    random.shuffle(axes)
    source = source.transpose(axes)
    for found, expected in (
        (arrays.zeros_like(source, dtype, order), np.zeros_like(source, dtype, order)),
        (arrays.empty_like(source, order=order), np.zeros_like(source, order=order)),
        (arrays.array(source, order=order), np.array(source, order=order)),
    ):
        assert same(found, expected)
        assert not found.size or layout(found) == layout(expected)  # of empty arrays strides mean nothing
        assert arrays.is_shared(found)


def test_other_shapes_and_dtypes() -> None:
    assert arrays.zeros(3).shape == arrays.zeros(np.int64(3)).shape == arrays.zeros([3]).shape == (3,)
    assert arrays.zeros(2, ("f4", (3,))).shape == (2, 3)
    assert arrays.zeros_like([[1, 2]], shape=(3, 1)).tolist() == [[0], [0], [0]]
    assert arrays.array([1.5, 2]).tolist() == [1.5, 2]
    assert arrays.array(["a", "bcd"]).dtype == "U3"
    for kind in ("S", "U", "V", "V0"):  # NumPy makes strings of one character from those without a length
        assert arrays.zeros(3, kind).dtype == np.zeros(3, kind).dtype
        assert arrays.full(3, "abc", kind[:1]).tolist() == np.full(3, "abc", kind[:1]).tolist()
    assert arrays.array([1, 2], "f4").dtype == "f4"
    assert arrays.full((2, 3), [1, 2, 3]).tolist() == [[1, 2, 3], [1, 2, 3]]
    assert arrays.full(2, "abc").tolist() == ["abc", "abc"]
    assert type(arrays.array(np.ones((2, 2)).view(np.matrix))) is np.ndarray


@pytest.mark.parametrize(
    "make",
    [
        lambda: arrays.zeros(3, object),
        lambda: arrays.zeros(3, [("a", "i4"), ("b", "O")]),
        lambda: arrays.full(3, None),
        lambda: arrays.array([1, "a", None]),
        lambda: arrays.empty_like(np.array([None])),
        lambda: arrays.frozen(np.array([None])),
        lambda: SharedBuffer(80).ndarray(3, object),
    ],
)
def test_python_objects_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match="an array in shared memory cannot hold Python objects, found dtype"):
        make()


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"shape must not have negative numbers, found \(2, -1\)"):
        arrays.zeros((2, -1))
    with pytest.raises(ValueError, match="order must be 'C' or 'F', found 'K'"):
        arrays.zeros(2, order="K")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        arrays.zeros(2.5)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="cannot have memory of"):
        arrays.zeros(2**62)
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":  # before, NumPy only warned
        with pytest.raises(OverflowError):
            arrays.full(2, 300, "u1")
    with pytest.raises(TypeError, match=r"expected a numpy\.ndarray, found list"):
        arrays.frozen([1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected a numpy\.ndarray, found list"):
        arrays.memory_of([1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected an array in shared memory, found ndarray in private memory"):
        arrays.memory_of(np.zeros(3))


# --- by reference ---------------------------------------------------------------------------------


@st.composite
def views(draw: Any) -> tuple[Array, Array]:
    """An array in shared memory, and a view of it, by a chain of operations."""
    base = arrays.zeros(draw(SHAPES), draw(DTYPES), draw(st.sampled_from("CF")))
    view = base
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["index", "transpose", "reshape", "broadcast", "bytes", "field", "readonly"]))
        if kind == "index" and view.ndim:
            found = view[draw(nps.basic_indices(view.shape, allow_newaxis=True, allow_ellipsis=True))]
            view = found if isinstance(found, np.ndarray) else view
        elif kind == "transpose":
            view = view.transpose(draw(st.permutations(range(view.ndim))))
        elif kind == "reshape":
            reshaped = view.reshape(-1)
            view = reshaped if np.shares_memory(reshaped, base) else view
        elif kind == "broadcast" and view.ndim < 6:
            view = np.broadcast_to(view, (draw(st.integers(1, 3)), *view.shape))
        elif kind == "bytes" and view.flags.c_contiguous and view.ndim:
            view = view.view("u1")
        elif kind == "field" and view.dtype.names:
            view = view[view.dtype.names[-1]]
        elif kind == "readonly":
            view = view.view()
            view.flags.writeable = False
    return base, view


@given(views(), st.binary(min_size=1, max_size=8))
def test_any_view_is_sent_by_reference(chain: tuple[Array, Array], data: bytes) -> None:
    base, view = chain
    near, far = echo(view), far_echo(view)
    if not view.size:  # they refer to nothing, and travel as ever
        assert near.shape == far.shape == view.shape
        assert not arrays.is_shared(near)
        return
    for found in (near, far):
        assert type(found) is np.ndarray
        assert same(found, view)
        assert layout(found) == layout(view)
    assert address(near) == address(view)
    assert address(far) != address(view)
    # What is written here is seen there ...
    everything = base.reshape(-1, order="A").view("u1")
    pattern = itertools.cycle(data)
    everything[:] = [next(pattern) for _ in range(len(everything))]
    assert far.tobytes() == view.tobytes()
    # ... and the other way round, where it may be written at all.
    if far.flags.writeable:
        far[...] = np.zeros((), far.dtype)
        assert view.tobytes() == far.tobytes() == bytes(view.nbytes)


@given(views(), views())
def test_views_in_one_message_overlap_as_they_did(first: tuple[Array, Array], second: tuple[Array, Array]) -> None:
    sent = [first[0], first[1], second[1]]
    found = far_echo(sent)
    for (mine, other), (yours, another) in zip(
        itertools.combinations(sent, 2), itertools.combinations(found, 2), strict=True
    ):
        if mine.size and other.size and arrays.memory_of(mine).identity == arrays.memory_of(other).identity:
            assert address(mine) - address(other) == address(yours) - address(another)


def test_what_numpy_s_own_tricks_make() -> None:
    a = arrays.array(np.arange(20.0))
    for view in (
        np.lib.stride_tricks.as_strided(a, (3, 4), (8, 16)),
        np.lib.stride_tricks.sliding_window_view(a, 5),
        np.atleast_3d(a),
        a.view("c16").imag,
        np.frombuffer(a),
        np.asarray(memoryview(a)),
    ):
        found = far_echo(view)
        assert same(found, view)
        assert arrays.is_shared(found)
        assert found.base is not None
        a[7] += 1
        assert same(found, view)


def unlinked(block: SharedMemory) -> SharedMemory:
    block.unlink()
    return block


@pytest.mark.parametrize(
    "make",
    [
        lambda: SharedBuffer(800, name="numbers").ndarray(100),
        lambda: np.frombuffer(SharedBuffer(800, name="numbers").buf),
        lambda: np.frombuffer(SharedBuffer(800, name="numbers").view("d")),
        lambda: Memory(10_000, name="numbers").map(800, 4104).ndarray((10, 10)),
        lambda: Memory(10_000, name="numbers").map(800, 1000, access=mmap.ACCESS_READ).ndarray(100),
        lambda: np.ndarray((100,), buffer=unlinked(SharedMemory(create=True, size=800)).buf),
    ],
)
def test_arrays_on_other_shared_memory(make: Callable[[], Array]) -> None:
    a = make()
    found = far_echo(a)
    assert arrays.is_shared(a)
    assert layout(found) == layout(a)
    if a.flags.writeable:
        found.flat[3] = 5
        assert a.flat[3] == 5
    with arrays.memory_of(found) as memory, arrays.memory_of(a) as other:
        assert memory.identity == other.identity
        assert memory.name == other.name in {"numbers", "shared_memory"}


def test_memory_that_has_grown_meanwhile() -> None:
    memory = Memory(1000)
    first = echo(memory.map().ndarray(10))
    memory.grow(100_000)
    second = echo(memory.map().ndarray(12_500))
    second[:] = 1
    assert (first == 1).all()
    assert echo(memory.map(8, 99_992).ndarray(1))[0] == 1


def test_private_memory_beside_shared_memory_is_private() -> None:
    # The kernel puts mappings side by side, and a new one where an old one was.
    neighbours = []
    for _ in range(20):
        neighbours.append(np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), "u1"))
        neighbours.append(SharedBuffer(mmap.PAGESIZE).ndarray(mmap.PAGESIZE, "u1"))
    private, shared = neighbours[::2], neighbours[1::2]
    assert {address(a) + a.nbytes for a in shared} & {address(a) for a in private}
    assert {address(a) + a.nbytes for a in private} & {address(a) for a in shared}
    assert [arrays.is_shared(a) for a in neighbours] == [False, True] * 20
    addresses = {address(a) for a in shared}
    known = len(_mappings._live)
    del neighbours, shared
    assert len(_mappings._live) == known - 20
    followers = [np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), "u1") for _ in range(20)]
    assert {address(a) for a in followers} & addresses
    assert not any(arrays.is_shared(a) for a in followers)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda folder: np.arange(5.0),
        lambda folder: np.arange(20.0)[::2],
        lambda folder: np.arange(20.0).reshape(4, 5).T,
        lambda folder: np.asfortranarray(np.arange(20.0).reshape(4, 5)),
        lambda folder: np.array([None, 1, "x"]),
        lambda folder: np.array(5),
        lambda folder: np.zeros((0, 3)),
        lambda folder: np.array([(1, "a")], [("x", "i4"), ("y", "U3")]),
        lambda folder: np.frombuffer(b"12345678"),
        lambda folder: np.frombuffer(mmap.mmap(-1, 80)),
        lambda folder: np.broadcast_to(np.arange(3), (4, 3)),
        lambda folder: np.memmap(folder / "file", "f8", "w+", shape=(3,)),
        lambda folder: np.ones((2, 2)).view(np.matrix),
        lambda folder: np.ma.masked_array([1, 2, 3], [0, 1, 0]),
        lambda folder: np.rec.array([(1, "a")]),
        lambda folder: np.datetime64("2020-01-01"),
        lambda folder: Memory(80).map(access=mmap.ACCESS_COPY).ndarray(10),
        lambda folder: arrays.zeros(3).view(np.matrix),
        lambda folder: np.ndarray(3, object, SharedBuffer(24).buf),
    ],
)
def test_other_arrays_pickle_as_ever(make: Callable[[Path], Array], tmp_path: Path) -> None:
    a = make(tmp_path)
    assert dumps(a) == pickle.dumps(a)
    buffers: list[Any] = []
    pickle.dumps(a, 5, buffer_callback=buffers.append)
    left, right = mpmemory.Pipe()
    with left, right:
        left.send(a)
        found = right.recv()
    assert type(found) is type(pickle.loads(pickle.dumps(a)))
    assert np.array_equal(found, a)
    assert not arrays.is_shared(found)


def test_outside_of_multiprocessing_they_are_copied() -> None:
    a = arrays.ones(3)
    for found in (pickle.loads(pickle.dumps(a)), a.copy(), a + 0):
        assert not arrays.is_shared(found)
        found[:] = 2
    assert a.tolist() == [1, 1, 1]


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


# --- slabs ----------------------------------------------------------------------------------------


def test_small_arrays_share_slabs_which_go_with_the_last() -> None:
    before = open_fds()
    kept = [arrays.full(100, index) for index in range(10_000)]
    assert all((a == index).all() for index, a in enumerate(kept))
    assert {address(a) % _slabs.ALIGNMENT for a in kept} == {0}
    identities = {arrays.memory_of(a).identity for a in kept}
    assert len(identities) == -(-10_000 // (_slabs.SLAB_SIZE // 832))
    last = kept[-1][50:]
    del kept
    gc.collect()
    assert len([line for line in mappings() if _slabs.SLAB in line]) == 1
    assert last.tolist() == [9999] * 50
    del last
    gc.collect()
    assert [line for line in mappings() if _slabs.SLAB in line] == []
    assert open_fds() == before


def test_arrays_without_items_at_the_end_of_a_slab() -> None:
    kept = [arrays.zeros(0) for _ in range(2 * _slabs.SLAB_SIZE // _slabs.ALIGNMENT)]
    assert all(arrays.is_shared(a) for a in kept)


def test_ten_thousand_small_arrays_under_a_limit_of_256_descriptors(run_python: Any) -> None:
    run_python(
        "import resource, numpy as np\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "import mpmemory\n"
        "from mpmemory import arrays\n"
        "def double(them):\n"
        "    for a in them: a *= 2\n"
        "    return them\n"
        "if __name__ == '__main__':\n"
        "    kept = [arrays.full(128, index) for index in range(10_000)]\n"
        "    for method in ('fork', 'spawn'):\n"
        "        with mpmemory.get_context(method).Pool(1) as pool:\n"
        "            found = pool.apply(double, (kept,))\n"
        "        found[-1][:] += 1\n"
        "    assert all((a == 4 * index).all() for index, a in enumerate(kept[:-1]))\n"
        "    assert (kept[-1] == (4 * 9999 + 3)).all(), kept[-1]\n"
    )


def test_a_thousand_large_arrays_under_a_limit_of_1024_descriptors(run_python: Any) -> None:
    run_python(
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))\n"
        "from mpmemory import arrays\n"
        "from mpmemory.connection import Pipe\n"
        "kept = [arrays.zeros(100_000) for index in range(1000)]\n"
        "left, right = Pipe()\n"
        "for index, a in enumerate(kept):\n"
        "    left.send(a)\n"
        "    right.recv()[-1] = index\n"
        "assert [a[-1] for a in kept] == list(range(1000))\n"
    )


def test_out_of_descriptors(run_python: Any) -> None:
    run_python(
        LIMITED + "from mpmemory import arrays, HandleLostError\n"
        "small = arrays.zeros(10)\n"
        "expect_the_limit(lambda: arrays.zeros(100_000))\n"
        "with no_descriptors_left():\n"
        "    arrays.zeros(10)\n"  # there is room in the slab
    )


def test_a_signal_handler_makes_arrays_of_its_own() -> None:
    # Between any two instructions of the function that looks for a place; lines, where Python 3.12 tells no more.
    names = itertools.count(1)
    kept: list[tuple[int, Array]] = []

    def make() -> None:
        name = next(names)
        kept.append((name, arrays.full(8, name)))

    def interrupt(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code is not Slabs.allocate.__code__:
            return interrupt if event == "call" else None
        frame.f_trace_opcodes = True
        if event in ("line", "opcode"):
            sys.settrace(None)
            make()
            sys.settrace(interrupt)
        return interrupt

    tracer = sys.gettrace()
    sys.settrace(interrupt)
    try:
        make()
        make()
    finally:
        sys.settrace(tracer)
    assert len(kept) > 10
    assert all((a == name).all() for name, a in kept)


# --- frozen ---------------------------------------------------------------------------------------


def try_to_write(a: Array) -> list[str]:
    errors = []
    memory = arrays.memory_of(a)
    descriptor = os.open(f"/proc/self/fd/{memory.fileno()}", os.O_RDWR)
    actions: list[Callable[[], Any]] = [
        lambda: a.__setitem__(0, 1),
        lambda: setattr(a.flags, "writeable", True),
        lambda: memory.map(access=mmap.ACCESS_WRITE),
        lambda: memory.pwrite(b"x"),
        lambda: mmap.mmap(descriptor, 0),
        lambda: os.pwrite(descriptor, b"x", 0),
    ]
    for action in actions:
        try:
            action()
        except (OSError, ValueError) as error:
            errors.append(type(error).__name__)
        else:
            errors.append("none")
    os.close(descriptor)
    return errors


REFUSED = ["ValueError", "ValueError", "SealedError", "SealedError", "PermissionError", "PermissionError"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: arrays.ones((300, 300)),  # memory of its own
        lambda: arrays.ones((300, 300))[10:20, ::-2].T,
        lambda: arrays.ones(10),  # in a slab
        lambda: np.ones((10, 10))[::-2].T,  # private
    ],
)
def test_frozen_arrays_cannot_be_written_to(make: Callable[[], Array], ctx: Any) -> None:
    a = make()
    view = arrays.frozen(a)
    assert (view == 1).all()
    assert view.shape == a.shape
    assert try_to_write(view) == REFUSED
    with ctx.Pool(1) as pool:
        assert pool.apply(try_to_write, (view,)) == REFUSED
        assert pool.apply(np.sum, (view,)) == view.size
        pool.close()
        pool.join()
    assert (arrays.frozen(view) == 1).all()


def test_a_frozen_view_sees_what_is_written_through_the_array() -> None:
    a = arrays.ones((300, 300))
    view = arrays.frozen(a)
    received = far_echo(view)
    a[0, 0] = 5
    assert view[0, 0] == received[0, 0] == 5
    assert not far_echo(a).flags.writeable
    assert not echo(a).flags.writeable  # also where a mapping can be written to
    small = arrays.ones(10)
    copy = arrays.frozen(small)
    small[0] = 5
    assert copy[0] == 1
    assert far_echo(small).flags.writeable  # other small arrays are not sealed with it


def test_an_array_that_is_sealed_while_it_is_received(monkeypatch: pytest.MonkeyPatch) -> None:
    a = arrays.ones((300, 300))
    data = dumps(a)
    with arrays.memory_of(a) as memory:
        memory.seal(Seal.FUTURE_WRITE)
    _mappings._whole.clear()
    monkeypatch.setattr(Memory, "readonly", False)  # as it was when the receiver looked
    found = pickle.loads(data)
    assert (found == 1).all()
    assert not found.flags.writeable


def test_frozen_memory_of_others_cannot_shrink() -> None:
    descriptor = os.memfd_create("theirs", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 80)
    fcntl.fcntl(descriptor, platform.F_ADD_SEALS, int(Seal.GROW))
    view = arrays.frozen(Memory.from_fd(descriptor).map().ndarray(10))
    with pytest.raises(PermissionError):  # that would write zeros
        os.ftruncate(arrays.memory_of(view).fileno(), 0)


def test_frozen_is_not_content_with_a_descriptor_opened_read_only() -> None:
    memory = Memory(80)
    readonly = Memory.from_fd(os.open(f"/proc/self/fd/{memory.fileno()}", os.O_RDONLY))  # a receiver can undo that
    with pytest.raises(PermissionError, match="cannot add"):
        arrays.frozen(readonly.map().ndarray(10))
    arrays.frozen(memory.map().ndarray(10))
    assert arrays.frozen(readonly.map().ndarray(10)).tolist() == [0] * 10


def test_frozen_seals_no_other_memory() -> None:
    # The kernel puts mappings side by side: behind the end of one begins another.
    buffers = [SharedBuffer(mmap.PAGESIZE) for _ in range(30)]
    ends = [buffer.ndarray(0, offset=mmap.PAGESIZE) for buffer in buffers]
    starts = {address(buffer.ndarray(1)) for buffer in buffers}
    assert any(address(end) in starts for end in ends)
    for end in ends:
        assert arrays.frozen(end).shape == (0,)
    assert not any(buffer.memory.readonly for buffer in buffers)


@pytest.mark.parametrize("backend", ["posix", "file"], indirect=True)
def test_frozen_needs_seals(backend: str) -> None:
    with pytest.raises(OSError, match=r"cannot add <Seal\..*> to memory 'array': Operation not"):
        arrays.frozen(np.ones(3))


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


# --- the module -----------------------------------------------------------------------------------


def test_numpy_is_imported_with_the_module_only(run_python: Any) -> None:
    run_python(
        "import sys, mpmemory\n"
        "assert 'numpy' not in sys.modules and 'mpmemory.arrays' not in sys.modules\n"
        "assert mpmemory.arrays.zeros(3).tolist() == [0, 0, 0]\n"
        "try: mpmemory.nothing\n"
        "except AttributeError as error: assert 'nothing' in str(error)\n"
    )


def test_without_numpy_it_says_what_to_install(run_python: Any) -> None:
    run_python(
        "import sys\n"
        "sys.modules['numpy'] = None\n"
        "import mpmemory\n"
        "for action in (lambda: mpmemory.arrays, lambda: mpmemory.SharedBuffer(8).ndarray(1)):\n"
        "    try: action()\n"
        "    except ImportError as error: assert 'mpmemory[numpy]' in str(error), error\n"
        "    else: raise AssertionError\n"
    )


def test_arrays_that_live_until_the_interpreter_ends(run_python: Any) -> None:
    done = run_python(
        "import builtins, sys\n"
        "import numpy\n"
        "from mpmemory import arrays\n"
        "from mpmemory.connection import Pipe\n"
        "class Late:\n"
        "    def __init__(self): self.itself, self.array = self, arrays.ones(100_000)\n"
        "    def __del__(self): self.array[0] = 2; self.others = arrays.zeros(3), arrays.zeros(100_000)\n"
        "sys.late, builtins.late, numpy.late = Late(), Late(), arrays.ones(3)\n"
        "left, right = Pipe()\n"
        "left.send(sys.late.array)\n"
        "sys.received = right.recv()\n"
        "left.send(arrays.zeros(3))\n"  # never received
    )
    assert done.stderr == ""


def test_its_one_effect(run_python: Any) -> None:
    run_python(
        "import mpmemory, numpy\n"
        "from multiprocessing.reduction import ForkingPickler\n"
        "before = set(ForkingPickler._extra_reducers)\n"
        "import mpmemory.arrays\n"
        "assert set(ForkingPickler._extra_reducers) - before == {numpy.ndarray}\n"
    )


@pytest.fixture(autouse=True)
def _own_registry() -> Iterator[None]:
    """What `far_echo` has mapped a second time is no business of the next test."""
    assert np.ndarray in ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    yield
    _mappings.release(float("inf"))
    _mappings._whole.clear()


settings.register_profile("arrays", deadline=None)
settings.load_profile("arrays")
