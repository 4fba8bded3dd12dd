"""Locks next to a model: who may hold what, whatever is acquired, released and killed."""

from __future__ import annotations

from typing import Any

from conftest import is_free
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mpmemory import Memory, RangeLock, get_context
from mpmemory.connection import Connection, Pipe

SIZE = 8
RANGES = [(0, 4), (2, 4), (4, 4), (0, 8), (7, 1)]


def obey(memory: Memory, conn: Connection) -> None:
    mine: dict[Any, RangeLock] = {}
    while True:
        action, key = conn.recv()
        if action == "acquire":
            start, length, shared = key
            lock = mine.get(key) or mine.setdefault(key, memory.lock(start, length, shared=shared))
            conn.send(lock.acquire(blocking=False))
        else:
            mine[key].release()
            conn.send(True)


class Exclusion(RuleBasedStateMachine):
    """Processes that acquire, release and are killed, next to a list of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory(SIZE)
        self.processes: list[tuple[Any, Any]] = []
        self.held: list[tuple[int, Any]] = []

    @initialize()
    def start(self) -> None:
        self.processes = [self.new() for _ in range(3)]

    def new(self) -> tuple[Any, Any]:
        left, right = Pipe()
        with right:
            child = get_context("fork").Process(target=obey, args=(self.memory, right), daemon=True)
            child.start()
        return child, left

    def ask(self, who: int, *message: Any) -> Any:
        conn = self.processes[who][1]
        conn.send(message)
        return conn.recv()

    def in_the_way(self, key: Any) -> list[Any]:
        start, length, shared = key
        return [
            (who, other)
            for who, other in self.held
            if other[0] < start + length and start < other[0] + other[1] and not (shared and other[2])
        ]

    @rule(who=st.integers(0, 2), place=st.sampled_from(RANGES), shared=st.booleans())
    def acquire(self, who: int, place: Any, shared: bool) -> None:
        key = (*place, shared)
        expected = not self.in_the_way(key)
        assert self.ask(who, "acquire", key) == expected
        if expected:
            self.held.append((who, key))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: Any) -> None:
        who, key = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        assert self.ask(who, "release", key)

    @rule(who=st.integers(0, 2))
    def kill(self, who: int) -> None:
        child, conn = self.processes[who]
        conn.close()
        child.kill()
        child.join()
        child.close()
        self.processes[who] = self.new()
        self.held = [(holder, key) for holder, key in self.held if holder != who]

    @invariant()
    def what_is_free_here_is_free_in_the_model(self) -> None:
        for start, length in RANGES:
            for shared in (False, True):
                expected = not self.in_the_way((start, length, shared))
                assert is_free(self.memory.lock(start, length, shared=shared)) == expected

    def teardown(self) -> None:
        for child, conn in self.processes:
            conn.close()
            child.kill()
            child.join()
            child.close()


TestExclusion = Exclusion.TestCase
TestExclusion.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
