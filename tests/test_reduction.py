"""How a handle pickles: what must hold whatever the channel; and the way by inheritance."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
from multiprocessing import popen_spawn_posix
from typing import Any

import pytest
from conftest import START_METHODS, assert_lost, dumps, open_fds

from mpmemory import Memory, SharedBuffer, get_context
from mpmemory.reduction import FORKSERVER_FDS, _InheritedFd, _launching
from mpmemory.testing import assert_no_leaks

# --- plain pickle and copy ---


@pytest.mark.parametrize("make", [lambda: Memory(10), lambda: SharedBuffer(10)])
@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy, lambda obj: pickle.dumps([obj], protocol=2)])
def test_plain_pickle_and_copy_say_what_to_do_instead(make: Any, way: Any) -> None:
    obj = make()
    before = open_fds()
    with pytest.raises(TypeError, match=r"cannot pickle or copy a (Memory|SharedBuffer) .* Memory.dup\(\)"):
        way(obj)
    assert open_fds() == before


def test_a_closed_handle_cannot_be_pickled() -> None:
    memory, buffer = Memory(10, name="gone"), SharedBuffer(10)
    memory.close()
    buffer.close()
    with pytest.raises(ValueError, match="memory 'gone' is closed"):
        dumps(memory)
    with pytest.raises(ValueError, match="buffer is closed"):
        dumps(buffer)
    with get_context("spawn").Pool(1) as pool, pytest.raises(ValueError, match="memory 'gone' is closed"):
        pool.apply(len, (memory,))


# --- subclasses ---


class Named(Memory):
    """A subclass with attributes of its own."""

    def __init__(self, size: int, tags: list[str]) -> None:
        super().__init__(size)
        self.tags = tags


class Slotted(SharedBuffer):
    """A subclass with slots, which says itself what travels."""

    __slots__ = ("tag",)

    def __getstate__(self) -> object:
        return self.tag

    def __setstate__(self, state: object) -> None:
        self.tag = state


class Plain(Memory):
    """A subclass that travels in its own way."""

    def __reduce__(self) -> Any:
        return (str, (self.name,))


def describe(named: Named, slotted: Slotted, plain: object) -> tuple[Any, ...]:
    named.pwrite(b"seen")
    return type(named).__name__, named.tags, type(slotted).__name__, slotted.tag, slotted[0], plain


@pytest.mark.parametrize("method", START_METHODS)
def test_subclasses_come_back_as_themselves(method: str) -> None:
    named, slotted, plain = Named(10, ["a", "b"]), Slotted(10), Plain(10, name="by name")
    slotted.tag = {"x": 1}
    slotted[0] = 5
    with get_context(method).Pool(1) as pool:
        result = pool.apply(describe, (named, slotted, plain))
    assert result == ("Named", ["a", "b"], "Slotted", {"x": 1}, 5, "by name")
    assert named.pread(4) == b"seen"


# --- spawning ---


def touch_all(memories: list[Memory], buffers: list[SharedBuffer], results: Any) -> None:
    for index, memory in enumerate(memories):
        memory.pwrite(index.to_bytes(2, "little"))
    for index, buffer in enumerate(buffers):
        buffer.set_value("<H", 2, index)
    numbers = [memory.fileno() for memory in memories] + [buffer.memory.fileno() for buffer in buffers]
    inheritable = [number for number in numbers if os.get_inheritable(number)]
    # Closing each once must succeed: no two handles have the same descriptor.
    for handle in (*memories, *buffers):
        handle.close()
    results.send((len(set(numbers)), inheritable))


@pytest.mark.parametrize("method", START_METHODS)
def test_the_same_memory_twice_in_one_childs_arguments(method: str) -> None:
    memory = Memory(10)
    buffer = memory.map()
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        args = ([memory, memory.dup()], [buffer, memory.map()], theirs)
        child = get_context(method).Process(target=touch_all, args=args)
        child.start()
        distinct, inheritable = ours.recv()
        child.join()
        assert child.exitcode == 0
        del args
    if method != "fork":  # where the child has the very objects of the parent
        assert distinct == 4
    assert inheritable == []
    assert buffer.get_values("<2H", 0) == (1, 1)


@pytest.mark.parametrize("method", START_METHODS)
@pytest.mark.parametrize("count", [FORKSERVER_FDS - 1, FORKSERVER_FDS, FORKSERVER_FDS + 1, 300])
def test_many_handles_in_one_childs_arguments(method: str, count: int) -> None:
    memories = [Memory(10) for _ in range(count)]
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        child = get_context(method).Process(target=touch_all, args=(memories, [], theirs))
        child.start()
        assert ours.recv() == (count, [])
        child.join()
        assert child.exitcode == 0
    assert [int.from_bytes(memory.pread(2), "little") for memory in memories] == list(range(count))


def wait_for(conn: Any, _memory: Memory) -> None:
    conn.recv()


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_descriptors_for_a_launch_are_closed_after_it(method: str) -> None:
    """At the latest when a handle is closed or dropped, or another is shared."""
    memory, other = Memory(10), Memory(10)
    identity = memory.identity
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        child = get_context(method).Process(target=wait_for, args=(theirs, memory))
        child.start()
        other.close()
        copies = [
            fd for fd in open_fds() if os.fstat(fd)[:2] and (os.fstat(fd).st_dev, os.fstat(fd).st_ino) == identity
        ]
        assert copies == [memory.fileno()]
        second = get_context(method).Process(target=wait_for, args=(theirs, memory))
        second.start()
        assert len(_launching) == 1
        del memory
        gc.collect()
        assert len(_launching) == 0
        ours.send(None)
        ours.send(None)
        child.join()
        second.join()


def test_a_launch_that_fails_leaves_nothing() -> None:
    memory = Memory(10)
    with assert_no_leaks():
        child = get_context("spawn").Process(target=print, args=(memory, lambda: None))
        with pytest.raises((pickle.PicklingError, AttributeError)):
            child.start()
        del child


class Protocolled(Memory):
    """A subclass that travels in its own way, by the other method for it."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (str, (self.name,))


def test_a_subclass_with_its_own_reduce_ex_keeps_it() -> None:
    assert pickle.loads(dumps(Protocolled(10, name="by name"))) == "by name"


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_sharing_closes_what_was_for_an_earlier_launch(method: str) -> None:
    memory = Memory(10)
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        children = [get_context(method).Process(target=wait_for, args=(theirs, memory)) for _ in range(2)]
        for child in children:
            child.start()
            assert len(_launching) == 1
        ours.send(None)
        ours.send(None)
        for child in children:
            child.join()


def check_one_descriptor(_memory: Memory) -> None:
    assert len(_launching) == 0
    assert len([what for what in open_fds().values() if what.endswith(":launched (deleted)")]) == 1


def test_a_fork_has_nothing_of_its_parents_launches() -> None:
    memory = Memory(10, name="launched")
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        spawned = get_context("spawn").Process(target=wait_for, args=(theirs, memory))
        spawned.start()
        assert len(_launching) == 1
        forked = get_context("fork").Process(target=check_one_descriptor, args=(memory,))
        forked.start()
        forked.join()
        assert forked.exitcode == 0
        ours.send(None)
        spawned.join()


def test_a_descriptor_that_was_not_inherited() -> None:
    number = os.dup(0)
    os.close(number)
    shared = _InheritedFd.__new__(_InheritedFd)
    shared._wrapper = popen_spawn_posix._DupFd(number)
    assert_lost(Memory._own(shared.claim(), "x"), "the memory was not inherited: Bad file descriptor")


def test_importing_changes_nothing_but_the_picklers_table(run_python: Any) -> None:
    run_python(
        "import multiprocessing, multiprocessing.reduction, threading, os\n"
        "import multiprocessing.connection, multiprocessing.context as context\n"
        "before = {m: dict(vars(m)) for m in (multiprocessing, multiprocessing.reduction, context)}\n"
        "table = set(multiprocessing.reduction.ForkingPickler._extra_reducers)\n"
        "fds = os.listdir('/proc/self/fd')\n"
        "import mpmemory, mpmemory.pool, mpmemory.queues, mpmemory.shared_memory\n"
        "for module, names in before.items():\n"
        "    for name, value in names.items():\n"
        "        assert vars(module)[name] is value, (module, name)\n"
        "new = set(multiprocessing.reduction.ForkingPickler._extra_reducers) - table\n"
        "names = 'Memory SharedBuffer SharedMemory ShareableList RangeLock RobustLock Lifeline '\n"
        "names += 'Connection SimpleQueue Queue JoinableQueue Counter'\n"
        "assert {kind.__name__ for kind in new} == set(names.split()), new\n"
        "assert all(kind.__module__.startswith('mpmemory.') for kind in new)\n"
        "assert threading.active_count() == 1 and os.listdir('/proc/self/fd') == fds\n"
        "assert multiprocessing.get_start_method(allow_none=True) is None\n"
    )
