"""NumPy arrays in shared memory: made as NumPy makes them, sent by reference; and the module."""

from __future__ import annotations

import inspect
import itertools
import mmap
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Array, address, dumps, echo
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

import mpmemory
from mpmemory import Memory, SharedBuffer, SharedMemory, _mappings, arrays

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


def same(left: Array, right: Array) -> bool:
    """Return whether they are equal in every byte: NaN is NaN, NaT is NaT."""
    return bool(left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes())


def layout(array: Array) -> tuple[Any, ...]:
    return array.shape, array.strides, array.dtype, array.flags.writeable


def far_echo(array: Array) -> Array:
    """Send and receive an array as if this were another process: with a mapping of its own."""
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


settings.register_profile("arrays", deadline=None)
settings.load_profile("arrays")
