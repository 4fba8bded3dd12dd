"""DataFrames: their blocks cross beside the pickle, and belong to the receiver."""

from __future__ import annotations

import errno
import multiprocessing
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import START_METHODS

from mpmemory import HandleLostError, _mappings, _segments, arrays, get_context

ROWS = 20_000


def make_frame() -> pd.DataFrame:
    numbers = np.arange(ROWS)
    return pd.DataFrame(
        {
            "i8": numbers,
            "more": -numbers,
            "f4": (numbers / 7).astype("f4"),
            "f8": np.where(numbers % 3, np.nan, numbers),
            "?": numbers % 2 == 0,
            "time": pd.date_range("2020-01-01", periods=ROWS, freq="min"),
            "zone": pd.date_range("2020-01-01", periods=ROWS, freq="min", tz="Asia/Tokyo"),
            "kind": pd.Categorical.from_codes(numbers % 3, ["a", "b", "c"]),
            "Int64": pd.array(numbers, "Int64"),
            "text": [f"{number} é" for number in range(ROWS)],
            "object": [None, (1, 2)] * (ROWS // 2),
        },
        index=pd.Index(numbers * 2, name="even"),
    )


def segment() -> np.ndarray:
    ((mapping, _),) = _segments.warm._mappings.values()
    return np.frombuffer(mapping, "u1")


def test_a_frame_of_many_types_crosses_without_a_copy(pipe: Any) -> None:
    left, right = pipe
    frame = make_frame()
    left.send(frame)
    found = right.recv()
    pd.testing.assert_frame_equal(found, frame)
    for column in ("i8", "more", "f4", "f8"):  # NumPy gives no buffer for times; the others are small
        assert np.shares_memory(found[column].to_numpy(), segment()), column
    assert np.shares_memory(found.index.to_numpy(), segment())


def test_a_frame_received_is_the_receivers_own(pipe: Any) -> None:
    left, right = pipe
    frame = pd.DataFrame({"a": np.ones(ROWS), "b": np.arange(ROWS)})
    left.send(frame)
    left.send(frame)
    first, second = right.recv(), right.recv()
    first.loc[:, "a"] = 7.0
    first["b"] += 1
    first.iloc[0, 0] = -1
    pd.testing.assert_frame_equal(second, frame)
    column = first["a"]
    del first, second
    assert column[ROWS - 1] == 7


def test_the_lease_ends_with_the_last_column(pipe: Any) -> None:
    left, right = pipe
    left.send(pd.DataFrame({"a": np.ones(ROWS), "b": np.arange(ROWS)}))
    found = right.recv()
    column = found["b"]
    del found
    assert len(_segments.Lease._held) == 1
    assert column.sum() == ROWS * (ROWS - 1) // 2
    del column
    assert len(_segments.Lease._held) == 0


def summarize(requests: Any, results: Any) -> None:
    while (frame := requests.get()) is not None:
        frame["sum"] = frame["i8"] + frame["more"] + 1
        results.put((frame, frame.groupby("kind", observed=True)["i8"].sum()))


@pytest.mark.parametrize("method", START_METHODS)
def test_frames_through_queues(method: str) -> None:
    ctx = get_context(method)
    requests, results = ctx.Queue(), ctx.Queue()
    child = ctx.Process(target=summarize, args=(requests, results))
    child.start()
    frame = make_frame()
    for _ in range(3):
        requests.put(frame)
        found, sums = results.get()
        assert (found.pop("sum") == 1).all()
        pd.testing.assert_frame_equal(found, frame)
        pd.testing.assert_series_equal(sums, frame.groupby("kind", observed=True)["i8"].sum())
    requests.put(None)
    child.join()
    assert child.exitcode == 0


def negate(frame: pd.DataFrame, column: np.ndarray) -> pd.DataFrame:
    column *= -1  # frame *= -1 would make new columns
    assert (frame["a"] == column).all()
    return frame


@pytest.mark.parametrize("method", START_METHODS)
def test_a_frame_on_shared_arrays_is_sent_by_reference(method: str) -> None:
    values = arrays.zeros((3, ROWS))  # a row for each column, as pandas keeps them
    values[:] = np.arange(ROWS)
    frame = pd.DataFrame(values.T, columns=list("abc"), copy=False)
    with get_context(method).Pool(1) as pool:
        found = pool.apply(negate, (frame, values[0]))
        pool.close()
        pool.join()
    assert (frame["a"] == -np.arange(ROWS)).all()
    for column, row in zip("abc", values, strict=True):
        assert arrays.is_shared(found[column].to_numpy())
        row[0] = 7
        assert found[column][0] == 7


def test_what_pandas_writes_in_place_is_seen(pipe: Any) -> None:
    left, right = pipe
    values = arrays.zeros((3, ROWS))
    left.send(pd.DataFrame(values.T, columns=list("abc"), copy=False))
    found = right.recv()
    found.iloc[0, 0] = 1
    found.loc[1, "b"] = 2
    found["c"] = 3.0
    assert (values[0, 0], values[1, 1], values[2, 2]) == (1, 2, 0)


def test_a_frame_on_several_shared_arrays(pipe: Any) -> None:
    left, right = pipe
    columns = {"a": arrays.ones(ROWS), "b": arrays.zeros(ROWS, "i4"), "c": arrays.zeros(ROWS, "M8[ns]")}
    left.send(pd.DataFrame(columns, copy=False))
    found = right.recv()
    for name, column in columns.items():
        column[0] = 5
        assert found[name][0] == column[0]


def test_rows_of_a_frame_on_shared_arrays_are_copied_by_pandas(pipe: Any) -> None:
    left, right = pipe
    frame = pd.DataFrame(arrays.zeros((3, ROWS)).T, copy=False)
    left.send(frame.iloc[10:20])
    found = right.recv()
    assert arrays.is_shared(found[0].to_numpy()) is pd.__version__.startswith(("1.", "2."))  # they did not copy
    pd.testing.assert_frame_equal(found, frame.iloc[10:20])


def make_shared_frame(index: int) -> pd.DataFrame:
    return pd.DataFrame(arrays.zeros((2, ROWS)).T, columns=["a", "b"], copy=False)


def test_a_frame_on_arrays_that_are_lost_does_not_hang_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise OSError(errno.ENOMEM, "no room")

    with multiprocessing.get_context("fork").Pool(1) as pool:
        monkeypatch.setattr(_mappings, "map_whole", fail)
        found = pool.apply_async(make_shared_frame, (1,)).get(timeout=30)
        monkeypatch.undo()
        assert found.shape == (ROWS, 2)
        with pytest.raises(HandleLostError, match="no room"):
            found.sum()
        assert (pool.apply_async(make_shared_frame, (1,)).get(timeout=30) == 0).all().all()
        pool.close()
        pool.join()
