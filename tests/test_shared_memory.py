"""SharedMemory: all that the standard library's does, and what it should do."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
from multiprocessing import shared_memory as stock
from typing import Any

import numpy as np
import pytest
from conftest import dumps, eventually, open_fds, shm_names

from mpmemory import HandleLostError, SharedBuffer, _names, shared_memory
from mpmemory.shared_memory import ShareableList, SharedMemory


def open_blocks() -> list[str]:
    return [what for what in open_fds().values() if ":shared_memory" in what]


def test_the_signature() -> None:
    parameters = inspect.signature(SharedMemory).parameters.values()
    assert [(each.name, each.default) for each in parameters] == [
        ("name", None),
        ("create", False),
        ("size", 0),
        ("track", True),
    ]
    assert {name for name in dir(stock.SharedMemory) if not name.startswith("_")} <= set(dir(SharedMemory))


@pytest.mark.parametrize(
    ("args", "options", "expected", "message"),
    [
        ((), {}, ValueError, "'name' can only be None if create=True"),
        ((None, True), {}, ValueError, "'size' must be a positive number different from zero"),
        ((None, True, -1), {}, ValueError, "'size' must be a positive integer, found -1"),
        (("nix",), {"size": -1}, ValueError, "'size' must be a positive integer, found -1"),
        (("nix",), {}, FileNotFoundError, "nix"),
        (("",), {}, OSError, "Invalid argument"),
        (("x" * 300,), {}, OSError, "Errno"),
        ((b"nix",), {}, TypeError, "name must be a str, found bytes"),
        ((5, True, 5), {}, TypeError, "name must be a str, found int"),
        ((None, True, "5"), {}, TypeError, "'str' object cannot be interpreted as an integer|not supported"),
        ((None, True, 10**30), {}, OSError, "cannot have memory of 1000000"),
    ],
)
def test_wrong_arguments(args: Any, options: Any, expected: type[Exception], message: str) -> None:
    with pytest.raises(expected, match=message):
        SharedMemory(*args, **options)
    if args[-1:] != (10**30,):  # an OverflowError there
        with pytest.raises(expected):
            stock.SharedMemory(*args, **options)


def test_a_size_that_is_no_int_leaves_nothing_behind() -> None:
    before = shm_names()
    with pytest.raises(TypeError):
        SharedMemory(create=True, size=1.5)  # type: ignore[arg-type]
    eventually(lambda: shm_names() <= before)


@pytest.mark.parametrize("create", [True, False])
def test_a_name_with_a_nul(create: bool) -> None:
    with pytest.raises(ValueError, match="embedded null character"):
        SharedMemory("a\0b", create, 5)


def test_a_life() -> None:
    block = SharedMemory(create=True, size=10)
    assert repr(block) == f"SharedMemory({block.name!r}, size=10)"
    assert block.buf is block.buf
    other = SharedMemory(block.name)
    other.buf[:4] = b"abcd"
    assert bytes(block.buf[:4]) == b"abcd"
    block.close()
    block.close()
    assert block.buf is None
    assert repr(block) == f"SharedMemory({block.name!r}, size=10)"
    assert bytes(SharedMemory(name=block.name).buf[:4]) == b"abcd"  # closed is not unlinked
    block.unlink()
    for gone in (block.unlink, other.unlink, lambda: SharedMemory(block.name)):
        with pytest.raises(FileNotFoundError, match="no shared memory has this name") as error:
            gone()
        assert error.value.filename == block.name
    other.buf[:4] = b"efgh"
    assert bytes(other.buf[:4]) == b"efgh"
    other.close()
    assert open_blocks() == []


@pytest.mark.parametrize("backend", ["posix"], indirect=True)
def test_the_posix_backend_has_such_names_too(backend: str) -> None:
    test_a_life()


def test_views_stay_valid_after_close() -> None:
    block = SharedMemory(create=True, size=80)
    numbers = np.ndarray((10,), dtype=np.float64, buffer=block.buf)  # the recipe of NumPy's users
    view = block.buf
    part = view[8:16]
    block.unlink()
    block.close()
    del block
    numbers[1] = 2.5
    assert (part.cast("d")[0], len(view)) == (2.5, 80)
    del numbers, view
    assert part.cast("d")[0] == 2.5


def test_attributes_of_the_user_s_own() -> None:
    for made in (SharedMemory(create=True, size=5), ShareableList([1])):
        made.label = "label"  # type: ignore[attr-defined]
        assert vars(made) == {"label": "label"}
        assert pickle.loads(dumps(made)).label == "label"
        (made if isinstance(made, SharedMemory) else made.shm).unlink()


def test_a_subclass_closes_in_its_own_way() -> None:
    closed = []

    class Closing(SharedMemory):
        def close(self) -> None:
            closed.append(self.size)
            super().close()

    block = Closing(create=True, size=5)
    block.unlink()
    del block
    with pytest.raises(FileNotFoundError):
        Closing("mpmemory-test-nix")
    gc.collect()
    assert closed == [5]


def test_closing_and_unlinking_in_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread closes the block just when another has begun to unlink it."""
    block = SharedMemory(create=True, size=5)
    withdraw = _names.withdraw

    def close_first(*args: Any) -> None:
        closing = threading.Thread(target=block.close)
        closing.start()
        closing.join()
        withdraw(*args)

    monkeypatch.setattr(_names, "withdraw", close_first)
    block.unlink()
    assert _names._kept == {}
    assert open_blocks() == []


def test_numpy_s_recipe() -> None:
    source = np.array([1, 1, 2, 3, 5, 8])
    block = SharedMemory(create=True, size=source.nbytes)
    here = np.ndarray(source.shape, dtype=source.dtype, buffer=block.buf)
    here[:] = source
    attached = SharedMemory(name=block.name)
    there = np.ndarray((6,), dtype=np.int64, buffer=attached.buf)
    there[-1] = 888
    assert here.tolist() == [1, 1, 2, 3, 5, 888]
    attached.close()  # with the array alive: no BufferError
    block.close()
    block.unlink()
    assert there[-1] == 888


class Named(SharedMemory):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.label = "label"


def test_plain_pickle_goes_by_name() -> None:
    block = Named(create=True, size=10)
    for again in (pickle.loads(pickle.dumps(block)), copy.copy(block)):
        assert type(again) is Named
        again.buf[0] += 1
    assert block.buf[0] == 2
    data = pickle.dumps(block)
    block.unlink()
    with pytest.raises(FileNotFoundError):
        pickle.loads(data)


def test_multiprocessing_pickles_a_descriptor() -> None:
    block = Named(create=True, size=10)
    data = dumps(block)
    block.unlink()
    block.buf[0] = 7
    again = pickle.loads(data)
    assert (type(again), again.label, again.name, again.size) == (Named, "label", block.name, 10)
    assert again.buf[0] == 7
    with pytest.raises(FileNotFoundError):
        again.unlink()


def test_a_closed_block_is_sent_as_long_as_its_name_leads_there() -> None:
    block = SharedMemory(create=True, size=10)
    block.buf[0] = 7
    block.close()
    assert pickle.loads(dumps(block)).buf[0] == 7
    block.unlink()
    with pytest.raises(FileNotFoundError):
        dumps(block)


def test_a_lost_block_says_so() -> None:
    block = SharedMemory(create=True, size=10)
    data = dumps(block)
    pickle.loads(data).close()
    lost = pickle.loads(data)  # what a sender gives out once
    assert (lost.name, lost.size) == (block.name, 10)
    with pytest.raises(HandleLostError):
        _ = lost.buf
    lost.close()
    block.unlink()


def test_out_of_descriptors(run_python: Any) -> None:
    from conftest import LIMITED

    run_python(
        LIMITED + "from mpmemory.shared_memory import SharedMemory\n"
        "block = SharedMemory(create=True, size=10)\n"
        "expect_the_limit(lambda: SharedMemory(create=True, size=10))\n"
        "expect_the_limit(lambda: SharedMemory(block.name))\n"
        "closed = SharedMemory(create=True, size=10)\n"
        "closed.close()\n"
        "with no_descriptors_left():\n"
        "    block.unlink()\n"
        "    closed.unlink()\n"
    )


def test_it_is_a_thin_adaptor() -> None:
    block = SharedMemory(create=True, size=10)
    assert isinstance(block._buffer, SharedBuffer)
    assert shared_memory.__all__ == stock.__all__
    block.unlink()


def test_a_block_that_outlives_the_modules_says_nothing(run_python: Any) -> None:
    done = run_python(
        "import multiprocessing, mpmemory\n"
        "multiprocessing.current_process().kept = mpmemory.SharedMemory(create=True, size=10)\n"
    )
    assert done.stderr == ""
