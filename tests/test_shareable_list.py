"""ShareableList: all that the standard library's does, with every value intact."""

from __future__ import annotations

import gc
import math
import os
import pickle
import struct
from multiprocessing import shared_memory as stock
from typing import Any

import numpy as np
import pytest
from conftest import dumps, open_fds
from hypothesis import given
from hypothesis import strategies as st

from mpmemory import HandleLostError
from mpmemory.shared_memory import ShareableList, SharedMemory

NAME = f"mpmemory-test-list-{os.getpid()}"  # of a POSIX object
DOCUMENTED = ["howdy", b"HoWdY", -273.154, 100, None, True, 42]


def texts(alphabet: str) -> st.SearchStrategy[str]:
    return st.text(st.sampled_from(alphabet), max_size=40)


TEXTS = texts("\0\x01aé漢🎈")
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    TEXTS,
    TEXTS.map(str.encode),
    st.binary(max_size=40),
)


def same(left: Any, right: Any) -> bool:
    return type(left) is type(right) and left == right


@pytest.fixture
def _unlinked() -> Any:
    yield
    gc.collect()
    assert not [what for what in open_fds().values() if ":shared_memory" in what]


pytestmark = pytest.mark.usefixtures("_unlinked")


@given(st.lists(VALUES, max_size=20))
def test_what_is_put_in_comes_out(values: list[Any]) -> None:
    items = ShareableList(values)
    other = ShareableList(name=items.shm.name)
    items.shm.unlink()
    for each in (items, other):
        assert len(each) == len(values)
        assert all(same(found, value) for found, value in zip(each, values, strict=True))


@given(VALUES, VALUES)
def test_an_item_is_replaced_by_what_fits_or_stays(first: Any, second: Any) -> None:
    items = ShareableList(["before", first, "after"])
    items.shm.unlink()
    room = 8
    if isinstance(first, str | bytes):
        room = len(first.encode() if isinstance(first, str) else first) // 8 * 8 + 8
    data = second.encode() if isinstance(second, str) else second
    if isinstance(data, bytes) and len(data) > room:
        with pytest.raises(ValueError, match=f"item 1 has room for {room} bytes, found {type(second).__name__} of"):
            items[1] = second
        assert same(items[1], first)
    else:
        items[1] = second
        assert same(items[1], second)
    assert (items[0], items[2]) == ("before", "after")


@given(st.lists(VALUES.filter(lambda value: not isinstance(value, str | bytes) or not str(value).endswith("\0"))))
def test_the_standard_library_reads_it_and_is_read(values: list[Any]) -> None:
    kept = [value for value in values if not isinstance(value, bytes) or not value.endswith(b"\0")]
    ours = ShareableList(kept, name=NAME)
    try:
        theirs = stock.ShareableList(name=NAME)
        assert all(same(left, right) for left, right in zip(theirs, kept, strict=True))
        for index, value in enumerate(kept):
            theirs[index] = value
        assert all(same(left, right) for left, right in zip(ours, kept, strict=True))
        assert theirs.format == ours.format
        theirs.shm.close()
    finally:
        ours.shm.unlink()


@pytest.mark.parametrize(("first", "then"), [("1234567 ", "123456 \0"), (b"12345678", b"1234567\0")])
def test_a_text_that_ends_in_nuls_may_take_all_of_its_room(first: Any, then: Any) -> None:
    items = ShareableList([first * 2])
    room = struct.calcsize(items.format)
    value = first * (room // 8 - 1) + then
    assert len(value) == room
    items[0] = value
    assert list(items) == list(ShareableList(name=items.shm.name)) == [value]
    items.shm.unlink()


def test_items_are_within_the_list() -> None:
    """Whatever somebody has written there."""
    for offsets in ((0, 8, -8), (0, 80, 16), (-8, 8, 16), (0, 2**62, 16), (8, 0, 8)):
        items = ShareableList([1, 2])
        items.shm.buf[8:32] = struct.pack("3q", *offsets)
        other = ShareableList(name=items.shm.name)
        items.shm.unlink()
        before = bytes(other.shm.buf)
        for index in range(2):
            if not 0 <= offsets[index] <= offsets[index + 1] <= offsets[2]:
                with pytest.raises(ValueError, match=f"item {index} of .* is not within the list"):
                    other[index] = 5
        with pytest.raises(ValueError, match="is not within the list"):
            list(other)
        assert bytes(other.shm.buf) == before


def test_the_layout_is_the_standard_library_s() -> None:
    theirs = stock.ShareableList(DOCUMENTED)
    ours = ShareableList(DOCUMENTED)
    assert bytes(ours.shm.buf) == bytes(theirs.shm.buf)[: ours.shm.size]
    attached = ShareableList(name=theirs.shm.name)
    assert list(attached) == DOCUMENTED
    attached[0] = "new"
    assert theirs[0] == "new"
    theirs.shm.close()
    attached.shm.unlink()
    ours.shm.unlink()


def test_the_operations() -> None:
    items = ShareableList(DOCUMENTED)
    items.shm.unlink()
    assert len(items) == 7
    assert items.format == "8s8sdqxxxxxx?xxxxxxxx?q"
    assert (items[2], items[-7], items[-1]) == (-273.154, "howdy", 42)
    assert (items.count(42), items.count("nix"), items.count(1)) == (1, 0, 1)
    assert (items.index(100), items.index(None)) == (3, 4)
    with pytest.raises(ValueError, match="'nix' is not in this list"):
        items.index("nix")
    assert b"HoWdY" in items
    assert list(reversed(items)) == DOCUMENTED[::-1]
    items[2] = -78.5
    items[3] = "dry ice"
    items[-1] = None
    assert list(items) == ["howdy", b"HoWdY", -78.5, "dry ice", None, True, None]
    assert repr(items) == f"ShareableList({list(items)}, name={items.shm.name!r})"
    for position in (7, -8, 2**70):
        with pytest.raises(IndexError, match=rf"index {position} is out of range for 7 items"):
            items[position]
        with pytest.raises(IndexError, match=rf"index {position} is out of range for 7 items"):
            items[position] = 1
    with pytest.raises(TypeError):
        items[1:2]  # type: ignore[call-overload]
    assert ShareableList[int].__origin__ is ShareableList  # type: ignore[attr-defined]
    items.shm.close()
    with pytest.raises(ValueError, match="is closed"):
        items[0]


@pytest.mark.parametrize("sequence", [None, [], (), iter(())])
def test_an_empty_list(sequence: Any) -> None:
    items = ShareableList(sequence)
    items.shm.unlink()
    assert (len(items), list(items), items.format) == (0, [], "")


def test_items_of_other_kinds() -> None:
    items = ShareableList(value for value in (np.float64(1.5), "generated"))
    items.shm.unlink()
    assert list(items) == [1.5, "generated"]
    with pytest.raises(TypeError, match=r"item 1 must be an int, float, bool, str, bytes or None, found list"):
        ShareableList([1, []])  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"item 0 must be .* found ndarray"):
        items[0] = np.zeros(3)  # type: ignore[call-overload]
    for number in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match=f"item 1 must fit into 64 bits, with its sign; found {number}"):
            ShareableList([0, number])
        with pytest.raises(ValueError, match="item -1 must fit into 64 bits"):
            items[-1] = number
    assert list(items) == [1.5, "generated"]
    items[0] = math.nan
    assert math.isnan(items[0])


@pytest.mark.parametrize("value", ["x" * 3_000_001, b"x" * 1_000_000 + b"\0" * 7, "é" * 1_500_000])
def test_long_items(value: Any) -> None:
    items = ShareableList([value, 1])
    items.shm.unlink()
    assert items[0] == value
    items[0] = value[:-1] + value[:1]
    assert items[0] == value[:-1] + value[:1]


def test_an_item_that_is_too_long() -> None:
    with pytest.raises(ValueError, match="item 0 is too long: found bytes of 100000000 bytes"):
        ShareableList([bytes(100_000_000)])


def test_a_list_with_a_name_is_made_once() -> None:
    items = ShareableList([1], name=NAME)
    with pytest.raises(FileExistsError):
        ShareableList([2], name=NAME)
    assert list(ShareableList(name=NAME)) == [1]
    items.shm.unlink()


@pytest.mark.parametrize(
    "data", [b"\0", b"\xff" * 64, struct.pack("3q", 1, 0, 8), struct.pack("q", 2**62) + bytes(64), bytes(8)]
)
def test_memory_that_holds_no_list(data: bytes) -> None:
    block = SharedMemory(create=True, size=len(data))
    block.buf[:] = data
    with pytest.raises(ValueError, match="there is no ShareableList in SharedMemory"):
        ShareableList(name=block.name)
    block.unlink()


def test_an_item_that_cannot_be_read_is_a_value_error() -> None:
    items = ShareableList([1, "text"])
    good = bytes(items.shm.buf)
    refused = 0
    for at in range(8, len(good)):
        for byte in (0, 1, 9, 127, 255):
            items.shm.buf[:] = good
            items.shm.buf[at] = byte
            for read in (lambda each: each[0], lambda each: each[-1], list, repr, lambda each: each.format):
                try:
                    read(ShareableList(name=items.shm.name))
                except ValueError:
                    refused += 1
    assert refused > 100
    items.shm.unlink()


class Labelled(ShareableList[Any]):
    pass


def test_pickling() -> None:
    items = Labelled([1, "two"])
    by_name = pickle.loads(pickle.dumps(items))
    assert type(by_name) is Labelled
    by_name[0] = 5
    data = dumps(items)
    items.shm.unlink()
    by_descriptor, lost = pickle.loads(data), pickle.loads(data)
    assert type(by_descriptor) is Labelled
    assert list(by_descriptor) == [5, "two"]
    with pytest.raises(HandleLostError):
        lost[0]
    with pytest.raises(FileNotFoundError):
        pickle.loads(pickle.dumps(items))


def swap(items: ShareableList[Any]) -> ShareableList[Any]:
    items[0], items[1] = items[1], items[0]
    return items


def test_through_a_pool(ctx: Any) -> None:
    items = ctx.ShareableList(["a\0", b"b\0\0"])
    with ctx.Pool(1) as pool:
        assert list(pool.apply(swap, (items,))) == [b"b\0\0", "a\0"]
        pool.close()
        pool.join()
    assert list(items) == [b"b\0\0", "a\0"]
    items.shm.unlink()
