"""The crash matrix: who dies, how, when, on which channel, with which start method.

In the middle is the bystander: it starts who dies and who survives, and sees that the survivors go on.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import select
import signal
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from typing import Any, NamedTuple

from deaths import EXITCODES, HOW, Trap, at, awaits, die_at
from roads import ROADS, Item, PipeRoad, RangeLockRoad, check_item, make_item
from supervise import show_stacks_when_asked

import mpmemory
from mpmemory import Memory

LIMIT = 30.0
"""What takes longer hangs, in seconds."""

LAST = 4
"""The number of the item at which somebody dies."""


class Cell(NamedTuple):
    who: str
    how: str
    when: str
    channel: str
    method: str

    def __str__(self) -> str:
        return f"{self.who}, {self.how}, {self.when}, {self.channel}, {self.method}"


WHO = ["sender", "receiver", "worker", "parent", "fork server", "resource tracker"]
WHEN = ["before send", "in flight", "after receive", "holding a lock", "holding arrays", "in a callback"]
POOLS = ["Pool", "stock Pool"]
CHANNELS = [*ROADS, *POOLS]
METHODS = ["fork", "forkserver", "spawn"]


def is_possible(cell: Cell) -> bool:
    who, how, when, channel, method = cell
    if who == "fork server" and method != "forkserver":
        return False
    if (who, channel) in [("fork server", "stock Pool"), ("parent", "stock Pool")]:
        return False  # its workers stay, waiting for each other's lock, or print tracebacks: nothing of ours is in that
    if who in ("fork server", "resource tracker"):
        return how.startswith("SIG")  # they run no code of ours
    if channel in POOLS:
        # A worker receives, runs and sends: each moment of it is once in the matrix.
        moments = {
            "sender": ("before send", "in flight", "in a callback"),
            "receiver": ("in a callback",),
            "worker": ("after receive", "holding a lock", "holding arrays", "in a callback"),
            "parent": WHEN,
        }
        if when not in moments[who]:
            return False
    if when == "in a callback":
        # There it is in a thread: SystemExit ends just that, and what the parent says meanwhile is not sure.
        if channel == "stock Queue":
            return who != "parent" and (who, how) != ("sender", "SystemExit")
        return (who, how, channel) != ("parent", "SystemExit", "Pool")
    return True


def all_cells() -> list[Cell]:
    cells = (Cell(*values) for values in itertools.product(WHO, HOW, WHEN, CHANNELS, METHODS))
    return [cell for cell in cells if is_possible(cell)]


def pairwise(cells: list[Cell]) -> list[Cell]:
    """Return few of the cells that have, together, all pairs of values that are in any of them."""
    bits: dict[Any, int] = {}
    masks = []
    for cell in cells:
        pairs = itertools.combinations(enumerate(cell), 2)
        masks.append(sum(1 << bits.setdefault(pair, len(bits)) for pair in pairs))
    left = (1 << len(bits)) - 1
    chosen = []
    while left:
        best = max(range(len(cells)), key=lambda index: (masks[index] & left).bit_count())
        chosen.append(cells[best])
        left &= ~masks[best]
    return chosen


# --- what processes do ----------------------------------------------------------------------------


class Tools:
    """What all processes of a cell have, beside its channel."""

    def __init__(self, ctx: Any) -> None:
        self.memory = Memory(1 << 16)
        self.lock = self.memory.lock(0, 100)
        self.robust = ctx.RobustLock()

    def close(self) -> None:
        self.memory.close()


def hold(tools: Tools) -> None:
    """Get to the places where something is held."""
    if awaits("holding a lock"):
        tools.robust.acquire()
        tools.lock.acquire()
        at("holding a lock")
        tools.lock.release()
        tools.robust.release()
    if awaits("holding arrays"):
        from mpmemory import arrays

        held = [arrays.full(100_000, 7.0), arrays.full(10, 7.0), tools.memory.map().ndarray((100,))]
        held[2][:] = 7
        at("holding arrays")


def check_tools(tools: Tools, cell: Cell) -> None:
    """See that nothing is locked, and who had the lock is known to have died."""
    for owner_died in (cell.when == "holding a lock" and cell.who not in WHO[4:], False):
        assert tools.robust.acquire(timeout=LIMIT)
        assert tools.robust.owner_died == owner_died
        tools.robust.release()
    assert tools.lock.acquire(timeout=LIMIT)
    tools.lock.release()
    if cell.when == "holding arrays":
        assert (tools.memory.map().ndarray((100,)) == 7).all()


def arm(cell: Cell | None, control: Any) -> None:
    """Begin a process; in who is to die, set when."""
    show_stacks_when_asked()

    def die() -> None:
        assert cell is not None
        control.send("dying")
        HOW[cell.how]()

    die_at(cell and cell.when, die)  # nowhere, also in a fork of who is to die


def send(cell: Cell | None, name: str, road: PipeRoad, control: Any, tools: Tools) -> None:
    arm(cell, control)
    for number in range(LAST):
        road.put(make_item(name, number, big=road.big))
    hold(tools)
    at("before send")
    road.put(make_item(name, LAST, big=road.big, trap=Trap()))
    if awaits("in flight"):
        road.flush()
    at("in flight")
    while control.recv() == "more":
        at("after receive")
        for number in range(LAST + 1, 2 * LAST):
            road.put(make_item(name, number, big=road.big))
    road.flush()


def receive(cell: Cell | None, name: str, road: PipeRoad, control: Any, tools: Tools) -> None:
    arm(cell, control)
    at("before send")
    control.recv()
    at("in flight")
    while True:
        item = road.get(LIMIT)
        road.done()
        sender, number, nbytes = check_item(item)
        control.send((number, nbytes))
        if sender == "stop":
            return
        if number == LAST:
            at("after receive")
            hold(tools)


def work(cell: Cell | None, name: str, requests: PipeRoad, replies: PipeRoad, control: Any, tools: Tools) -> None:
    arm(cell, control)
    control.recv()
    while True:
        item = requests.get(LIMIT)
        requests.done()
        sender, number, _ = check_item(item)
        if sender == "stop":
            replies.flush()
            control.recv()  # names end with their creator
            return
        if number == LAST:
            at("after receive")
            hold(tools)
            at("before send")
        replies.put(make_item(name, number, big=replies.big))
        if number == LAST:
            if awaits("in flight"):
                replies.flush()
            at("in flight")


def relay(there: PipeRoad, back: PipeRoad, control: Any) -> None:
    """Put or get as told: a child of who dies."""
    arm(None, control)
    for command, *arguments in iter(control.recv, ("end",)):
        if command == "put":
            for number in arguments:
                there.put(make_item("relay", number, big=there.big))
        else:
            for _ in range(arguments[0]):
                item = there.get(LIMIT)
                there.done()
                sender, number, nbytes = check_item(item, dead="boss")
                control.send((sender, number, nbytes))
                if command == "echo":
                    back.put(make_item("relay", number, big=back.big))
    there.flush()
    back.flush()
    control.send("bye")


def be_boss(cell: Cell, there: PipeRoad, back: PipeRoad, control: Any, others: list[Any], tools: Tools) -> None:
    """Start two relays, and die."""
    arm(cell, control)
    ctx = mpmemory.get_context(cell.method)
    for other in others:
        ctx.Process(target=relay, args=(there, back, other)).start()
        other.close()
    control.recv()
    act_as_boss(there, back, lambda: control.send("sent"), tools)


def act_as_boss(there: PipeRoad, back: PipeRoad, sent: Callable[[], object], tools: Tools) -> None:
    at("before send")
    there.put(make_item("boss", LAST, big=there.big, trap=Trap()))
    at("in flight")
    sent()
    check_item(back.get(LIMIT))
    back.done()
    at("after receive")
    hold(tools)


# --- what the bystander does ----------------------------------------------------------------------


def await_end(process: Any) -> None:
    """Wait for the end of a process: not by its sentinel, which its children may have as well."""
    await_pid(process.pid)
    process.join()


def await_pid(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it was collected already
        watch = os.pidfd_open(pid)
        assert select.select([watch], [], [], LIMIT)[0], f"process {pid} does not end"
        os.close(watch)


class Bench:
    """The bystander's side of a cell."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.ctx = mpmemory.get_context(cell.method)
        self.tools = Tools(self.ctx)
        self.processes: dict[str, Any] = {}
        self.controls: dict[str, Any] = {}
        self.roads: list[PipeRoad] = []
        self.messages = self.bytes = 0

    def road(self) -> PipeRoad:
        self.roads.append(ROADS[self.cell.channel](self.ctx))
        return self.roads[-1]

    def pipe(self, name: str) -> Any:
        """Return the other end of a new control."""
        self.controls[name], theirs = multiprocessing.Pipe()
        return theirs

    def start(self, target: Callable[..., None], name: str, *roads: PipeRoad) -> None:
        theirs = self.pipe(name)
        cell = self.cell if name == "victim" else None
        self.processes[name] = self.ctx.Process(target=target, args=(cell, name, *roads, theirs, self.tools))
        self.processes[name].start()
        theirs.close()

    def tell(self, name: str, what: object) -> None:
        self.controls[name].send(what)

    def hear(self, name: str) -> Any:
        assert self.controls[name].poll(LIMIT), f"{name} says nothing"
        return self.controls[name].recv()

    def await_death(self, name: str = "victim") -> list[Any]:
        """Wait until who is to die has died; return what it has said before."""
        said = list(iter(lambda: self.hear(name), "dying"))
        process = self.processes[name]
        await_end(process)
        assert process.exitcode == EXITCODES[self.cell.how], process.exitcode
        return said

    def got(self, nbytes: int) -> None:
        self.messages += 1
        self.bytes += nbytes

    def take(self, road: PipeRoad) -> tuple[str, int]:
        """Receive an item, and check it."""
        item = road.get(LIMIT)
        road.done()
        return self.look_at(item)

    def look_at(self, item: Item) -> tuple[str, int]:
        sender, number, nbytes = check_item(item, dead="victim")
        self.got(nbytes)
        return sender, number

    def end(self) -> None:
        for name, process in self.processes.items():
            await_end(process)
            assert process.exitcode == (EXITCODES[self.cell.how] if name == "victim" else 0), process.exitcode
        for road in self.roads:
            road.only_get()
            if road.ends:
                with contextlib.suppress(EOFError):
                    item = road.get(LIMIT)
                    raise AssertionError(f"{item} is one too many")
            road.close()
        for control in self.controls.values():
            control.close()
        self.tools.close()


def drain(bench: Bench, road: PipeRoad) -> Iterator[tuple[str, int]]:
    """Receive what a dead sender has left in a road of its own."""
    with contextlib.suppress(EOFError, ConnectionResetError):
        while True:
            yield bench.take(road)


def check_sender(bench: Bench) -> None:
    cell = bench.cell
    road = bench.road()
    bench.start(send, "survivor", road)
    victims = road if road.shared else bench.road()
    bench.start(send, "victim", victims)
    if not road.shared:
        victims.only_get()
    seen: list[tuple[str, int]] = []
    if cell.when == "after receive":
        while ("victim", LAST) not in seen:
            seen.append(bench.take(victims))
        bench.tell("victim", "more")
    if not road.shared and cell.how == "SystemExit":  # it waits until its handles have been received
        seen += drain(bench, victims)
    bench.await_death()
    check_tools(bench.tools, cell)
    if not road.shared:
        seen += drain(bench, victims)
        bench.roads.remove(victims)
        victims.close()
    while ("survivor", LAST) not in seen:
        seen.append(bench.take(road))
    bench.tell("survivor", "more")
    bench.start(send, "newcomer", road)
    while not {("survivor", 2 * LAST - 1), ("newcomer", LAST)} <= set(seen):
        seen.append(bench.take(road))
    for name in ("survivor", "newcomer"):
        bench.tell(name, "end")
    for name, count in {"survivor": 2 * LAST, "newcomer": LAST + 1}.items():
        assert [number for sender, number in seen if sender == name] == list(range(count))
    numbers = [number for sender, number in seen if sender == "victim"]
    assert numbers == list(range(len(numbers)))
    if road.exact or isinstance(road, RangeLockRoad):
        assert len(numbers) == LAST + (cell.when in ("in flight", "after receive"))
    finish_joinable(road, 0)


def finish_joinable(road: Any, lost: int) -> None:
    if hasattr(road, "join"):
        road.join(lost)


def loses_what_it_unpickles(bench: Bench, road: PipeRoad) -> bool:
    return bench.cell.when == "in a callback" and not isinstance(road, RangeLockRoad)


def start_two(bench: Bench, target: Callable[..., None], count: int) -> tuple[list[PipeRoad], list[PipeRoad]]:
    """Start a survivor and a victim, each with so many roads; return those to the survivor, and to the victim."""
    roads = [bench.road() for _ in range(count)]
    bench.start(target, "survivor", *roads)
    victims = roads if roads[0].shared else [bench.road() for _ in range(count)]
    bench.start(target, "victim", *victims)
    return roads, victims


def request(bench: Bench, road: PipeRoad, numbers: range) -> None:
    for number in numbers:
        road.put(make_item("bystander", number, big=road.big, trap=Trap() if number == LAST else None))


def check_receiver(bench: Bench) -> None:
    when = bench.cell.when
    (road,), (victims,) = start_two(bench, receive, 1)
    if when == "before send":
        bench.await_death()
    request(bench, road, range(LAST + 1))
    if victims is not road:
        request(bench, victims, range(LAST + 1))
    seen: list[Any] = []
    if when != "before send":
        bench.tell("victim", "go")
        seen += bench.await_death()
    check_tools(bench.tools, bench.cell)
    if victims is not road:
        seen.clear()
        for _ in range(LAST + 1 if when in ("before send", "in flight") else 0):
            bench.take(victims)  # what nobody receives from a stock channel stays until its sender ends
        bench.roads.remove(victims)
        victims.flush()
        victims.close()
    request(bench, road, range(LAST + 1, 2 * LAST))
    bench.tell("survivor", "go")
    road.put(make_item("stop", 2 * LAST, big=False))
    while not seen or seen[-1][0] != 2 * LAST:
        seen.append(bench.hear("survivor"))
    for _, nbytes in seen:
        bench.got(nbytes)
    expected = set(range(2 * LAST + 1))
    lost = {LAST} if victims is road and loses_what_it_unpickles(bench, road) else set()
    assert sorted(number for number, _ in seen) == sorted(expected - lost), seen
    finish_joinable(road, len(lost))


def check_worker(bench: Bench) -> None:
    when = bench.cell.when
    (requests, replies), (to_victim, from_victim) = start_two(bench, work, 2)
    separate = to_victim is not requests
    request(bench, to_victim, range(LAST + 1))
    if separate:
        from_victim.only_get()
    bench.tell("victim", "go")
    seen: list[tuple[str, int]] = []
    if separate and bench.cell.how == "SystemExit":  # it waits until its handles have been received
        seen += drain(bench, from_victim)
    bench.await_death()
    check_tools(bench.tools, bench.cell)
    if separate:
        seen += drain(bench, from_victim)
        for road in (to_victim, from_victim):
            bench.roads.remove(road)
            road.flush()
            road.close()
    again = when == "in a callback" and isinstance(requests, RangeLockRoad)  # it was not taken yet
    expected = set(range(LAST + (when == "in flight")))
    if not separate:
        while len(seen) < len(expected):
            seen.append(bench.take(replies))
        assert {number for _, number in seen} == expected
    request(bench, requests, range(LAST + 1, 2 * LAST))
    bench.tell("survivor", "go")
    missing = set(range(2 * LAST)) - expected - set(range(LAST + 1, 2 * LAST))
    if separate:
        missing = set(range(LAST + 1)) - {number for _, number in seen}
    elif again:
        missing = set()
    for number in sorted(missing):  # what was lost is asked for again
        request(bench, requests, range(number, number + 1))
    requests.put(make_item("stop", -1, big=False))
    while {number for _, number in seen} != set(range(2 * LAST)):
        seen.append(bench.take(replies))
    bench.tell("survivor", "end")
    assert len(seen) == 2 * LAST, seen
    finish_joinable(requests, int(not separate and loses_what_it_unpickles(bench, requests)))
    finish_joinable(replies, 0)


def go_on(bench: Bench, unread: int) -> None:
    """See that relays exchange items, and that there are so many others on the way."""
    bench.tell("putter", ("put", *range(LAST + 1, 2 * LAST)))
    bench.tell("getter", ("get", LAST - 1 + unread))
    said = [bench.hear("getter") for _ in range(LAST - 1 + unread)]
    assert [number for sender, number, _ in said if sender == "relay"] == list(range(LAST + 1, 2 * LAST))
    assert [number for sender, number, _ in said if sender == "boss"] == [LAST] * unread
    for _, _, nbytes in said:
        bench.got(nbytes)


def end_relays(bench: Bench) -> None:
    for name in ("putter", "getter"):
        bench.tell(name, ("end",))
        assert bench.hear(name) == "bye"


def check_parent(bench: Bench) -> None:
    cell = bench.cell
    there, back = bench.road(), bench.road()
    others = [bench.pipe("putter"), bench.pipe("getter")]
    theirs = bench.pipe("victim")
    process = bench.ctx.Process(target=be_boss, args=(cell, there, back, theirs, others, bench.tools))
    bench.processes["victim"] = process
    process.start()
    for control in (theirs, *others):
        control.close()
    bench.tell("putter", ("put", 0, 1))
    bench.tell("getter", ("get", 2))
    assert [bench.hear("getter")[:2] for _ in range(2)] == [("relay", 0), ("relay", 1)]
    bench.tell("victim", "go")
    unread = 0
    said = bench.hear("victim")
    if said == "sent":
        bench.tell("getter", ("echo", 1))
        assert bench.hear("getter")[:2] == ("boss", LAST)
        said = bench.hear("victim")
    elif cell.when == "in flight":
        unread = 1
    assert said == "dying"
    if cell.how != "SystemExit":  # that waits for its children
        await_end(process)
    if cell.channel == "stock Queue" and cell.how != "SystemExit":
        # Its thread may not have written what was put, or may have had the queue's lock.
        unread = 0
        end_stock_relays(bench)
    else:
        go_on(bench, unread)
        end_relays(bench)
    await_end(process)
    check_tools(bench.tools, cell)


def end_stock_relays(bench: Bench) -> None:
    bench.tell("putter", ("end",))
    assert bench.hear("putter") == "bye"
    bench.tell("getter", ("end",))
    assert bench.hear("getter") == "bye"


def server_pid(who: str) -> int:
    if who == "fork server":
        forkserver.ensure_running()
        return forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined, no-any-return]
    resource_tracker.ensure_running()
    return resource_tracker._resource_tracker._pid  # type: ignore[attr-defined, no-any-return]


def kill_server(cell: Cell) -> None:
    pid = server_pid(cell.who)
    number = {"SIGKILL": signal.SIGKILL, "SIGSEGV": signal.SIGSEGV}[cell.how]
    watch = os.pidfd_open(pid)
    os.kill(pid, number)
    assert select.select([watch], [], [], LIMIT)[0]
    os.close(watch)


def check_server(bench: Bench) -> None:
    cell = bench.cell
    there, back = bench.road(), bench.road()
    ends = []
    for name in ("putter", "getter"):
        theirs = bench.pipe(name)
        process = bench.ctx.Process(target=relay, args=(there, back, theirs))
        process.start()
        ends.append(process)
        theirs.close()
    bench.tell("putter", ("put", 0, 1))
    bench.tell("getter", ("get", 2))
    assert [bench.hear("getter")[:2] for _ in range(2)] == [("relay", 0), ("relay", 1)]
    die_at(cell.when, lambda: kill_server(cell))

    def echo() -> None:
        bench.tell("getter", ("echo", 1))
        assert bench.hear("getter")[:2] == ("boss", LAST)

    act_as_boss(there, back, echo, bench.tools)
    go_on(bench, 0)
    if there.shared:
        bench.start(send, "newcomer", there)
        bench.tell("getter", ("get", LAST + 1))
        assert [bench.hear("getter")[:2] for _ in range(LAST + 1)] == [("newcomer", n) for n in range(LAST + 1)]
        bench.tell("newcomer", "end")
    end_relays(bench)
    check_tools(bench.tools, cell)
    for process in ends:
        await_end(process)
