"""The public names: where they live, what they are, and that importing them is light."""

from __future__ import annotations

import inspect
import multiprocessing
import pickle
import subprocess
import sys
from typing import Any

import pytest

import mpmemory
from mpmemory import HandleLostError, MpMemoryError, SealedError, WorkerLostError, shared_memory
from mpmemory.errors import describe_exit


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]


def test_everything_of_multiprocessing_is_there() -> None:
    missing = set(multiprocessing.__all__) - set(mpmemory.__all__)
    assert missing == set()
    for name in multiprocessing.__all__:
        ours, theirs = getattr(mpmemory, name), getattr(multiprocessing, name)
        if inspect.isclass(theirs):
            assert ours is theirs, name
        elif callable(theirs):
            assert parameters(ours) == parameters(theirs), name


def test_what_is_ours() -> None:
    ours = set(mpmemory.__all__) - set(multiprocessing.__all__)
    assert ours == {
        "CACHE_LINE_SIZE",
        "HandleLostError",
        "Memory",
        "MpMemoryError",
        "PAGE_SIZE",
        "PoolError",
        "RangeLock",
        "RobustLock",
        "Seal",
        "SealedError",
        "ShareableList",
        "SharedBuffer",
        "SharedMemory",
        "WorkerLostError",
        "align",
    }


KINDS = [
    mpmemory.Memory,
    mpmemory.SharedBuffer,
    mpmemory.SharedMemory,
    mpmemory.ShareableList,
    mpmemory.RangeLock,
    mpmemory.RobustLock,
    mpmemory.align,
    mpmemory.get_context,
]


@pytest.mark.parametrize("kind", KINDS)
def test_public_names_are_documented(kind: Any) -> None:
    assert kind.__doc__
    if inspect.isclass(kind):
        for name, member in vars(kind).items():
            if not name.startswith("_"):
                assert member.__doc__, name


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_contexts(method: str) -> None:
    ctx = mpmemory.get_context(method)
    assert ctx.Memory is mpmemory.Memory
    assert ctx.SharedBuffer is mpmemory.SharedBuffer
    assert ctx.RobustLock is mpmemory.RobustLock
    assert ctx.SharedMemory is mpmemory.SharedMemory is shared_memory.SharedMemory
    assert ctx.ShareableList is mpmemory.ShareableList is shared_memory.ShareableList
    assert isinstance(ctx, type(multiprocessing.get_context(method)))
    assert ctx.get_start_method() == method
    assert ctx.get_context() is ctx
    assert mpmemory.get_context("spawn").get_context(method) is ctx
    with pytest.raises(ValueError, match="cannot set start method"):
        ctx.set_start_method("fork")


def test_the_default_context_keeps_nothing_of_its_own() -> None:
    """Python 3.14 would look there for the start method that it lists first."""
    assert vars(mpmemory.context.default_context) == {}
    assert mpmemory.get_all_start_methods() == multiprocessing.get_all_start_methods()
    own = vars(mpmemory.context.DefaultContext)
    uses_it = [
        name for name, member in vars(multiprocessing.context.DefaultContext).items() if inspect.isfunction(member)
    ]
    assert [name for name in uses_it if name not in own] == []


def test_an_unknown_start_method() -> None:
    with pytest.raises(ValueError, match="unknown start method 'teleport': expected one of fork, spawn, forkserver"):
        mpmemory.get_context("teleport")


ERRORS = [
    MpMemoryError("text"),
    HandleLostError(5, "the sender is gone"),
    SealedError(1, "sealed"),
    WorkerLostError(123, -9),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_pickle(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert again.args == error.args
    assert str(again) == str(error)
    assert vars(again) == vars(error)
    assert isinstance(again, MpMemoryError)


def test_what_errors_are() -> None:
    assert issubclass(HandleLostError, OSError)
    assert issubclass(SealedError, PermissionError)
    assert issubclass(WorkerLostError, multiprocessing.ProcessError)
    assert HandleLostError(5, "text").errno == 5
    assert str(WorkerLostError(123, -9)) == "worker 123 was killed by SIGKILL while it ran a task"
    assert describe_exit(0) == "exited with status 0"
    assert describe_exit(3) == "exited with status 3"
    assert describe_exit(-250) == "was killed by signal 250"


def test_windows_is_refused_with_one_sentence() -> None:
    program = "import multiprocessing.connection, sys; sys.platform = 'win32'; import mpmemory"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("ImportError: mpmemory needs a POSIX system")


def test_star_import() -> None:
    names: dict[str, Any] = {}
    exec("from mpmemory import *", names)
    assert names["Memory"] is mpmemory.Memory
    assert names["Process"] is multiprocessing.Process
    assert not [name for name in names if name.startswith("_") and name != "__builtins__"]
