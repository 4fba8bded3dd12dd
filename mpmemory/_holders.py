"""Who holds which memory: a look at all processes of this machine, in /proc."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ._backends import platform

# How a memory shows up in /proc/<pid>/fd and /proc/<pid>/maps; see the backends.
_LINK = re.compile(r"/memfd:mpmemory:(\d+):(.*) \(deleted\)|/dev/shm/mpmemory-[0-9a-f]{16} \(deleted\)", re.DOTALL)
# Start, end, permissions, offset, device, inode, path (proc(5)).
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ ([0-9a-f]+):([0-9a-f]+) (\d+) +(.*)")

Identity = tuple[int, int]  # device and inode


@dataclass
class Holder:
    """A process that holds a memory."""

    pid: int
    command: str
    fds: int = 0
    mappings: int = 0


@dataclass
class Held:
    """A memory that somebody holds. Sizes are in bytes."""

    label: str | None  # None where the backend has no place for it
    creator: int | None  # the process that made it, if the memory says so
    size: int = 0
    resident: int | None = None  # None if it cannot be told: there are mappings only
    creator_lives: bool | None = None
    holders: list[Holder] = field(default_factory=list)


@dataclass
class Census:
    """What was found."""

    memories: list[Held]
    unseen: int  # processes of other users, which could not be looked into


def take_census(pid: int | None = None) -> Census:
    """Return all memory of this package that processes of this machine hold; or process `pid` alone.

    Raises OSError (ENOTSUP) where there is no /proc, ProcessLookupError if there is no such process.
    """
    if not platform.has_proc():
        raise OSError("this system has no /proc, and nothing else says who holds which memory")
    if pid is not None and not os.path.isdir(f"/proc/{pid}"):
        raise ProcessLookupError(f"there is no process {pid}")
    found: dict[Identity, Held] = {}
    unseen = 0
    for number in _processes() if pid is None else [pid]:
        try:
            _look_into(number, found)
        except PermissionError:
            unseen += 1
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
    for memory in found.values():
        if memory.creator is not None:
            memory.creator_lives = os.path.exists(f"/proc/{memory.creator}")
    return Census(sorted(found.values(), key=lambda memory: -memory.size), unseen)


def _processes() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _look_into(pid: int, found: dict[Identity, Held]) -> None:
    holders: dict[Identity, Holder] = {}

    def hold(identity: Identity, link: re.Match[str]) -> tuple[Held, Holder]:
        memory = found.get(identity)
        if memory is None:
            memory = found[identity] = Held(link[2], int(link[1]) if link[1] else None)
        holder = holders.get(identity)
        if holder is None:
            holder = holders[identity] = Holder(pid, _command(pid))
            memory.holders.append(holder)
        return memory, holder

    for path in _paths(f"/proc/{pid}/fd"):
        try:
            link = _LINK.fullmatch(os.readlink(path))
            if link is None:
                continue
            status = os.stat(path)
        except FileNotFoundError:  # closed meanwhile
            continue
        memory, holder = hold((status.st_dev, status.st_ino), link)
        memory.size, memory.resident = status.st_size, status.st_blocks * 512  # stat(2): in units of 512 bytes
        holder.fds += 1
    for identity, path, nbytes in _mappings(pid, "mpmemory"):
        link = _LINK.fullmatch(path)
        if link is not None:
            memory, holder = hold(identity, link)
            memory.size = max(memory.size, nbytes)
            holder.mappings += 1


def _mappings(pid: int, *words: str) -> Iterator[tuple[Identity, str, int]]:
    """Yield file, path and bytes of each mapping of a process that has one of `words` in its path."""
    with open(f"/proc/{pid}/maps", errors="surrogateescape") as maps:
        for line in maps:
            # First that: most of some hundred lines are of no interest.
            if any(word in line for word in words) and (mapping := _MAPPING.match(line)):
                device = os.makedev(int(mapping[3], 16), int(mapping[4], 16))
                yield (device, int(mapping[5])), mapping[6], int(mapping[2], 16) - int(mapping[1], 16)


def _paths(folder: str) -> Iterable[str]:
    return [f"{folder}/{name}" for name in os.listdir(folder)]


def _command(pid: int) -> str:
    with open(f"/proc/{pid}/cmdline", errors="replace") as file:
        return file.read().replace("\0", " ").strip()
