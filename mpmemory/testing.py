"""Leak checks for tests: what a piece of code leaves behind in this process and in those that it started.

There is a fixture `no_memory_leaks` for pytest, too: see `pytest_mpmemory`.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import stat
import time
from collections.abc import Iterable, Iterator
from multiprocessing import forkserver, process, resource_sharer, resource_tracker
from typing import Any

from . import _holders, _mappings, _names, _segments, _sharer, reduction
from ._backends import platform

__all__ = ["assert_no_leaks"]

_SHM = "/dev/shm"

# What is left in this process alone is waited for so long, in seconds: only a thread could still give it up.
_MOMENT = 2.0

# What there is: a key that says what it is, how many or how many bytes there are of it, and the same in words.
_Things = dict[tuple[Any, ...], tuple[int, str]]


@contextlib.contextmanager
def assert_no_leaks(*, timeout: float = 10.0) -> Iterator[None]:
    """Check that the block leaves nothing behind that was not there before; a context manager, and a decorator.

    These are looked at, and named in the error:

    - descriptors of this process, and what they are on;
    - its mappings of shared memory, by their bytes;
    - processes started by this one, and by those in turn, running or not waited for;
    - memory of this package that any of these processes holds: label, size, and who holds it. That of the `file`
      backend cannot be told from other files, and is found in this process only, as a descriptor or mapping;
    - names in /dev/shm but those of semaphores, whatever made them, unless a process outside of this tree has the
      object open or mapped. If nobody has it, nobody can tell who left it: a process of this tree, another program, or,
      with pytest-xdist, another worker.

    What goes by itself is waited for, `timeout` seconds at most: processes that are ending, and memory that other
    processes of the tree keep warm for some seconds. What this process keeps for later use is given up at once, and
    garbage is collected; if then something is left in this process alone, that is waited for no longer than 2 seconds.
    What multiprocessing starts once and keeps (the resource tracker, the fork server) does not count, nor do the
    descriptors that a `Process` object keeps when its process has been joined.

    What a variable holds has not gone. Variables of the block live on behind it: put the code into a function, or close
    what it opens. If the block raises, that is the error, and nothing is checked. What other threads open meanwhile
    counts as well.

    Where there is no /proc, mappings and memory of other processes cannot be seen, of processes just the children that
    multiprocessing knows, and descriptors as far as /dev/fd lists them.

    Raises AssertionError, which says what is left.
    """
    before = _look()
    yield
    start = time.monotonic()
    pause = 0.001
    while _left(before):
        _give_up(timeout)
        left = _left(before)
        if not left:
            break
        if time.monotonic() - start >= (timeout if _may_go(left) else min(timeout, _MOMENT)):
            raise AssertionError("\n  ".join(["left behind:", *(text for _, text in left.values())]))
        _wait_for_an_end(left, pause)
        pause = min(2 * pause, 0.1)


def _look() -> _Things:
    pids = _processes()
    things: _Things = {}
    for fd, target in _descriptors():
        things["descriptor", fd, target] = 1, f"descriptor {fd}: {target}"
    things.update(_mapped())
    for pid in pids:
        things["process", pid] = 1, f"process {pid}: {_command(pid)}"
    things.update(_memories([os.getpid(), *pids]))
    with contextlib.suppress(FileNotFoundError), os.scandir(_SHM) as entries:
        for entry in entries:
            # Not a folder of a program that keeps its files here, nor a semaphore, which is no memory.
            if not entry.is_file(follow_symlinks=False) or entry.name.startswith("sem."):
                continue
            things["name", entry.name, entry.inode()] = 1, entry.path
    return things


def _left(before: _Things) -> _Things:
    kept = _kept_by_multiprocessing()
    left: _Things = {}
    names: list[tuple[Any, ...]] = []
    for key, (amount, text) in _look().items():
        if amount <= before.get(key, (0, ""))[0] or key[:2] in kept:
            continue
        if key[0] == "name":
            names.append(key)
        else:
            left[key] = amount, text
    if names:
        left.update(_of_this_tree(names))
    return left


def _may_go(left: _Things) -> bool:
    """Return whether it is about other processes, too, and not just what this one failed to give up."""
    own = {"descriptor", "mapping"}
    return any(key[0] not in own and key[::2] != ("memory", os.getpid()) for key in left)


def _give_up(timeout: float) -> None:
    """Give up what this process keeps for later use only."""
    for _ in multiprocessing.active_children():  # reaps those that have ended
        pass
    gc.collect()
    reduction.release_launched()
    _segments.warm.release(float("inf"))
    _mappings.release(float("inf"))
    _names._release_withdrawn()
    # Their threads start again when they are needed; but what nobody has received yet would be lost.
    sharers: list[Any] = [_sharer._sharer, resource_sharer._resource_sharer]  # type: ignore[attr-defined]
    for sharer in sharers:
        if not sharer._cache:
            sharer.stop(timeout)


def _wait_for_an_end(left: _Things, seconds: float) -> None:
    """Wait until one of the processes that are left ends; `seconds` at most, since the rest has no event."""
    pidfds = []
    try:
        for key in left:
            if key[0] == "process" and not _has_ended(key[1]):
                with contextlib.suppress(ProcessLookupError):
                    pidfds.append(platform.open_pidfd(key[1]))
        platform.poll([pidfd for pidfd in pidfds if pidfd >= 0], seconds)
    finally:
        for pidfd in pidfds:
            if pidfd >= 0:
                os.close(pidfd)


def _kept_by_multiprocessing() -> set[tuple[str, Any]]:
    """Return the starts of the keys of what multiprocessing keeps to the end of this process, or of its own objects."""
    tracker: Any = resource_tracker._resource_tracker
    server: Any = forkserver._forkserver
    fds = [tracker._fd, server._forkserver_alive_fd]
    ended: list[Any] = [child._popen for child in list(process._dangling)]  # type: ignore[attr-defined]
    for popen in ended:
        if popen is not None and popen.returncode is not None and popen.finalizer is not None:
            fds += popen.finalizer._args or ()  # closed with the Popen
    return {*(("descriptor", fd) for fd in fds), ("process", tracker._pid), ("process", server._forkserver_pid)}


# --- this process ---------------------------------------------------------------------------------


def _descriptors() -> Iterator[tuple[int, str]]:
    folder = "/proc/self/fd" if platform.has_proc() else "/dev/fd"
    for entry in os.listdir(folder):
        try:
            yield int(entry), os.readlink(f"{folder}/{entry}")
        except FileNotFoundError:  # the listing's own
            continue
        except OSError:  # no link: another system than Linux
            with contextlib.suppress(OSError):
                status = os.fstat(int(entry))
                yield int(entry), f"{stat.filemode(status.st_mode)} {status.st_dev}:{status.st_ino}"


def _mapped() -> _Things:
    sizes: dict[tuple[_holders.Identity, str], int] = {}
    if platform.has_proc():
        # Of memory that can be shared, whatever its name: memfds, too, are "(deleted)".
        for identity, path, nbytes in _holders._mappings(os.getpid(), "(deleted)", _SHM):
            sizes[identity, path] = sizes.get((identity, path), 0) + nbytes
    return {("mapping", *key): (size, f"mapping of {key[1]}: {size} bytes in all") for key, size in sizes.items()}


# --- the processes --------------------------------------------------------------------------------


def _processes() -> list[int]:
    """Return the processes that were started by this one, and by those in turn."""
    found = {child.pid for child in multiprocessing.active_children() if child.pid is not None}
    pending = [os.getpid(), *found]
    while pending:
        new = set(_children(pending.pop())) - found
        found |= new
        pending += new
    return sorted(found)


def _children(pid: int) -> Iterator[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended, or there is no /proc
        for thread in os.listdir(f"/proc/{pid}/task"):
            with (
                contextlib.suppress(FileNotFoundError, ProcessLookupError),
                open(f"/proc/{pid}/task/{thread}/children") as file,
            ):
                yield from map(int, file.read().split())


def _command(pid: int) -> str:
    try:
        command = _holders._command(pid)
    except (FileNotFoundError, ProcessLookupError):
        command = ""
    return "ended, but nobody has waited for it" if _has_ended(pid) else command


def _has_ended(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in {"Z", "X"}
    except (FileNotFoundError, ProcessLookupError):
        return platform.has_proc()


def _memories(pids: Iterable[int]) -> _Things:
    found: dict[_holders.Identity, _holders.Held] = {}
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            _holders._look_into(pid, found)
    return {
        ("memory", identity, holder.pid): (
            1,
            f"memory {memory.label!r} of {memory.size} bytes: {holder.fds} descriptors and {holder.mappings} mappings "
            f"of process {holder.pid}{' (this one)' if holder.pid == os.getpid() else f': {holder.command}'}",
        )
        for identity, memory in found.items()
        for holder in memory.holders
    }


# --- names in /dev/shm ----------------------------------------------------------------------------


def _of_this_tree(names: list[tuple[Any, ...]]) -> _Things:
    """Return those that no process outside of this tree has open or mapped, or owns, and that have not gone since."""
    paths: dict[_holders.Identity, tuple[tuple[Any, ...], str]] = {}
    for key in names:
        path = f"{_SHM}/{key[1]}"
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(path)
            if status.st_ino == key[2] and status.st_uid == os.geteuid():
                paths[status.st_dev, status.st_ino] = key, path
    holders: dict[_holders.Identity, list[int]] = {identity: [] for identity in paths}
    for pid in _holders._processes() if paths and platform.has_proc() else ():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            for identity in _in_shm(pid) & paths.keys():
                holders[identity].append(pid)
    tree = {os.getpid(), *_processes()}
    found: _Things = {}
    for identity, (key, path) in paths.items():
        if tree.issuperset(holders[identity]):
            who = ", ".join(f"process {pid}" for pid in holders[identity])
            found[key] = 1, f"{path}: {f'held by {who}' if who else 'nobody has it open or mapped'}"
    return found


def _in_shm(pid: int) -> set[_holders.Identity]:
    """Return what a process has of /dev/shm, by device and inode: a name can be given to something else."""
    found = {identity for identity, _, _ in _holders._mappings(pid, _SHM)}
    for fd in _holders._paths(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(fd).startswith(_SHM):
                status = os.stat(fd)
                found.add((status.st_dev, status.st_ino))
    return found
