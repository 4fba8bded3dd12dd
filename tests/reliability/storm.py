"""A storm: processes that send, receive, grow, lock and die at random, and what must hold all the same.

Arguments: start method, seed, seconds. All that is random comes from the seed; what the scheduler makes of it does
not.

- What is received is right, by its checksum, and was received by nobody else.
- Of what went through the SimpleQueue a death takes along two items at most: one that its victim had counted and not
  sent, and one that it had received and not ticked off.
- Two numbers under a RobustLock are the same, unless their owner died.
- A task of the pool fails only if it, or its worker, was killed.
- In the end nothing is left: see `mpmemory.testing`.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
import zlib
from collections import deque
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from queue import Empty
from typing import Any

import numpy as np
from deaths import HOW
from supervise import failing_at_once, report, show_stacks_when_asked, until

import mpmemory
from mpmemory import Memory, SharedBuffer, SharedMemory, WorkerLostError, arrays, testing

ACTORS = 4
LIMIT = 30.0
CAPACITY = 1 << 24  # items that an actor can number
GROWN = 32 << 20  # bytes: the memory that all grow becomes no larger
DEATHS = ["SIGKILL", "SIGSEGV", "os._exit"]
# 255: the pool's thread and this one asked the fork server at once, as all do that start a process.
EXITCODES = {-signal.SIGKILL, -signal.SIGSEGV, 3, 255}

# The board: for each actor 64 bytes, of which 8 are how many items it has numbered, and 8 how many it has received, of
# each of the two queues, and 8 the bytes of all received; behind them the two numbers under the lock, and whether it is
# over. (An Event has a lock, which who is killed may have.)
SENT, RECEIVED, BYTES = 0, 2, 4
STRIDE = 64
FIRST, SECOND, OVER = (STRIDE * place for place in (6, 7, 8))


class Stage:
    """What all actors share."""

    def __init__(self, ctx: Any) -> None:
        self.strict = ctx.SimpleQueue()
        self.loose = ctx.Queue()
        self.lock = ctx.RobustLock()
        self.board = SharedBuffer(STRIDE * 9)
        self.seen = SharedBuffer(
            CAPACITY * (ACTORS + 1) * 2
        )  # a byte for each item of each queue; most is never touched
        self.growing = Memory(4096)

    def count(self, actor: int, what: int, by: int) -> int:
        """Count up; return what it was."""
        place = STRIDE * actor + 8 * what
        number: int = self.board.get_value("<q", place)
        self.board.set_value("<q", place, number + by)
        return number

    def total(self, what: int) -> int:
        return sum(self.board.get_value("<q", STRIDE * actor + 8 * what) for actor in range(ACTORS + 1))

    def close(self) -> None:
        self.strict.close()
        self.loose.close()
        self.loose.join_thread()
        self.board.close()
        self.seen.close()
        self.growing.close()


class Actor:
    def __init__(self, stage: Stage, index: int, choice: random.Random) -> None:
        self.stage = stage
        self.index = index
        self.choice = choice
        self.blocks: deque[SharedMemory] = deque()
        self.kept: deque[Any] = deque(maxlen=20)  # what was received is held for a while, and then right still

    def contents(self) -> tuple[Any, int]:
        """Make something to send; return it and its checksum."""
        data = self.choice.randbytes(self.choice.choice([10, 1000, 20_000, 100_000]))
        check = zlib.crc32(data)
        kind = self.choice.randrange(6)
        if kind == 0:
            return data, check
        if kind == 1:
            return np.frombuffer(data, "u1"), check
        if kind == 2:
            return arrays.array(np.frombuffer(data, "u1")), check
        if kind == 3:
            return Memory.from_bytes(data), check
        if kind == 4:
            return arrays.frozen(np.frombuffer(data, "u1")), check
        block = SharedMemory(create=True, size=len(data))
        block.buf[:] = data  # type: ignore[index]
        self.blocks.append(block)
        if len(self.blocks) > 4:
            old = self.blocks.popleft()
            old.close()
            old.unlink()
        return ("block", block.name), check

    def send(self, strict: bool) -> None:
        contents, check = self.contents()
        number = self.stage.count(self.index, SENT + strict, 1)
        item = strict, self.index, number, check, contents
        (self.stage.strict if strict else self.stage.loose).put(item)

    def receive(self, strict: bool, timeout: float) -> bool:
        if not strict:
            try:
                item = self.stage.loose.get(timeout=timeout)
            except Empty:
                return False
        else:
            reader = self.stage.strict._reader
            if not reader.poll(timeout):
                return False
            try:
                item = reader.receive_datagram(wait=False).object()
            except BlockingIOError:  # somebody else was faster
                return True
        self.look_at(item)
        return True

    def look_at(self, item: Any) -> None:
        strict, sender, number, check, contents = item
        place = (sender * 2 + strict) * CAPACITY + number % CAPACITY
        assert self.stage.seen[place] == 0, f"item {number} of {sender} was received twice"
        self.stage.seen[place] = 1
        if isinstance(contents, tuple):
            try:
                contents = SharedMemory(contents[1])
            except FileNotFoundError:  # unlinked, or its creator is dead
                contents = None
        nbytes = check_contents(contents, check)
        self.stage.count(self.index, RECEIVED + strict, 1)
        self.stage.count(self.index, BYTES, nbytes)
        self.kept.append((contents, check))

    def look_again(self) -> None:
        if self.kept:
            check_contents(*self.kept.popleft())

    def change(self) -> None:
        """Change two numbers under the lock, and die in between, perhaps."""
        stage = self.stage
        assert stage.lock.acquire(timeout=LIMIT)
        number = stage.board.get_value("<q", FIRST)
        if stage.lock.owner_died:
            stage.board.set_value("<q", SECOND, number)
        assert stage.board.get_value("<q", SECOND) == number, "changed without the lock"
        stage.board.set_value("<q", FIRST, number + 1)
        if self.choice.random() < 0.02 and self.index < ACTORS:
            HOW[self.choice.choice(DEATHS)]()
        stage.board.set_value("<q", SECOND, number + 1)
        stage.lock.release()

    def grow(self) -> None:
        memory = self.stage.growing
        size = memory.size
        if size < GROWN:
            with contextlib.suppress(ValueError):  # somebody has grown it further
                memory.grow(size + 4096)
        assert memory.size >= min(size + 4096, GROWN), "it has shrunk"
        with memory.map() as buffer:
            buffer[len(buffer) - 1] = 1

    def act(self) -> None:
        strict = self.choice.random() < 0.5
        actions = [
            lambda: self.send(strict),
            lambda: self.receive(strict, 0.01),
            lambda: self.receive(strict, 0.01),
            self.look_again,
            self.change,
            self.grow,
        ]
        self.choice.choice(actions)()

    def leave(self) -> None:
        self.kept.clear()
        for block in self.blocks:
            block.close()
            block.unlink()


def check_contents(contents: Any, check: int) -> int:
    if contents is None:
        return 0
    if isinstance(contents, Memory):
        data: Any = contents.pread(contents.size)
    else:
        data = contents.buf if isinstance(contents, SharedMemory) else contents
    assert zlib.crc32(data) == check, "wrong contents"
    return len(data)


def act(stage: Stage, index: int, seed: str) -> None:
    """Act at random until the storm is over, or death."""
    show_stacks_when_asked()
    choice = random.Random(seed)
    actor = Actor(stage, index, choice)
    while not stage.board[OVER]:
        actor.act()
        if choice.random() < 0.003:
            HOW[choice.choice(DEATHS)]()
    actor.leave()


def task(seed: str) -> Any:
    choice = random.Random(seed)
    if choice.random() < 0.05:
        HOW[choice.choice(DEATHS)]()
    data = np.frombuffer(choice.randbytes(choice.choice([100, 100_000])), "u1")
    make: Any = choice.choice([np.copy, arrays.array, arrays.frozen])
    return zlib.crc32(data.tobytes()), make(data)


def storm(method: str, seed: str, seconds: float) -> dict[str, int]:
    ctx = mpmemory.get_context(method)
    stage = Stage(ctx)
    choice = random.Random(seed)
    conductor = Actor(stage, ACTORS, choice)
    actors: dict[int, Any] = {}
    deaths = tasks = lost_tasks = 0
    generation = 0

    def start(index: int) -> None:
        nonlocal generation
        generation += 1
        actors[index] = ctx.Process(target=act, args=(stage, index, f"{seed} {generation}"))
        actors[index].start()

    end = time.monotonic() + seconds
    told = 0.0
    with ctx.Pool(2) as pool:
        results: deque[Any] = deque()
        for index in range(ACTORS):
            start(index)
        while time.monotonic() < end:
            if time.monotonic() > told + 1:
                told = time.monotonic()
                report(deaths=deaths, generation=generation)
            indices: dict[Any, int] = {process.sentinel: index for index, process in actors.items()}
            for ready in wait(list(indices), 0.001):
                index = indices[ready]
                actors[index].join()
                # If the pool's thread is just collecting it, that returns at once.
                until(lambda: actors[index].exitcode is not None, LIMIT)  # noqa: B023
                assert actors[index].exitcode in EXITCODES, f"an actor ended with {actors[index].exitcode}"
                deaths += 1
                start(index)
            conductor.act()
            if choice.random() < 0.02:  # anywhere, not just at places
                with contextlib.suppress(ProcessLookupError):
                    # Not workers that are still starting: a pool whose workers all end before they are ready breaks.
                    workers = [worker.pid for worker in list(pool._scheduler._workers) if worker.ready]
                    victims = [process.pid for process in actors.values()]
                    os.kill(choice.choice(victims + workers), signal.SIGKILL)
            while len(results) < 8:
                tasks += 1
                results.append(pool.apply_async(task, (f"{seed} task {tasks}",)))
            if results[0].ready():
                try:
                    check, array = results.popleft().get()
                except WorkerLostError:
                    lost_tasks += 1
                else:
                    assert zlib.crc32(array) == check, "wrong result"
                    del array
        results.clear()
    pool.join()
    del pool
    stage.board[OVER] = 1
    ends: dict[Any, Any] = {process.sentinel: process for process in actors.values()}
    while ends:
        for ready in wait(list(ends), 0.01):
            process = ends.pop(ready)
            process.join()
            deaths += process.exitcode != 0
        # They may wait for somebody who receives.
        while conductor.receive(True, 0) or conductor.receive(False, 0):
            pass
    while conductor.receive(True, 0) or conductor.receive(False, 0):
        pass
    conductor.leave()
    assert stage.lock.acquire(timeout=LIMIT)
    stage.lock.release()
    lost = stage.total(SENT + 1) - stage.total(RECEIVED + 1)
    assert 0 <= lost <= 2 * deaths, f"{lost} items are lost by {deaths} deaths"
    found = {
        "deaths": deaths + lost_tasks,
        "messages": stage.total(RECEIVED) + stage.total(RECEIVED + 1),
        "bytes": stage.total(BYTES),
        "tasks": tasks,
    }
    stage.close()
    return found


def main() -> None:
    show_stacks_when_asked()
    method, seed, seconds = sys.argv[1:]
    forkserver.set_forkserver_preload(["storm"])
    testing._SHM = "/dev/shm/not this one"  # see crash_cells.py
    resource_tracker.ensure_running()
    forkserver.ensure_running()
    with testing.assert_no_leaks(timeout=LIMIT):
        found = storm(method, seed, float(seconds))
    report(**found)


if __name__ == "__main__":
    with failing_at_once():
        main()
