"""`python -m mpmemory`: what this machine offers; `ls`: who holds which memory; `demo`: a short tour."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import time
from typing import Any

from . import _holders, _machine
from ._demo import demo

_WATCH_INTERVAL = 1.0  # seconds
_LINE = "{:<20.20} {:>9} {:>9} {:>9}  {:>8} {:>4} {:>4}  {}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mpmemory", description="What this machine offers to shared memory, and who holds which memory."
    )
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    commands = parser.add_subparsers(dest="command", metavar="command")
    ls = commands.add_parser("ls", help="list all memory of mpmemory, with the processes that hold it")
    ls.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON, sizes in bytes")
    ls.add_argument("--pid", type=int, help="of this process only")
    ls.add_argument("--watch", action="store_true", help="again and again, until Ctrl-C")
    commands.add_parser("demo", help="create, share, kill a worker, and look what remains: half a minute")
    options = parser.parse_args(arguments)
    try:
        if options.command == "ls":
            return _ls(options.pid, as_json=options.json, watch=options.watch)
        if options.command == "demo":
            return demo()
        return _describe(as_json=options.json)
    except KeyboardInterrupt:
        return 130  # as a shell has it: 128 + SIGINT
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _describe(*, as_json: bool) -> int:
    found = _machine.describe()
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    advice = found.pop("advice")
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {_in_words(name, value)}")
    for line in advice:
        print(f"\n{line}")
    return 0


def _in_words(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(value)
    if name.startswith(("memory", "dev")):
        return _size(value)
    return str(value)


def _ls(pid: int | None, *, as_json: bool, watch: bool) -> int:
    while True:
        try:
            census = _holders.take_census(pid)
        except OSError as error:
            print(f"python -m mpmemory ls: {error}", file=sys.stderr)
            return 1
        if watch and sys.stdout.isatty():
            print("\033[H\033[2J", end="")
        if as_json:
            print(json.dumps(dataclasses.asdict(census), indent=None if watch else 2), flush=True)
        else:
            print(*_table(census), sep="\n", flush=True)
        if not watch:
            return 0
        time.sleep(_WATCH_INTERVAL)


def _table(census: _holders.Census) -> list[str]:
    """Return the lines: one for each memory, and one for each further process that holds it."""
    lines = [_LINE.format("LABEL", "SIZE", "RESIDENT", "MADE BY", "HELD BY", "FDS", "MAPS", "COMMAND")]
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for memory in census.memories:
        creator = "-" if memory.creator is None else f"{memory.creator}{'' if memory.creator_lives else ' †'}"
        start = [memory.label or "-", _size(memory.size), _size(memory.resident), creator]
        for holder in memory.holders:
            lines.append(_LINE.format(*start, holder.pid, holder.fds, holder.mappings, holder.command)[:columns])
            start = ["", "", "", ""]
    processes = {holder.pid for memory in census.memories for holder in memory.holders}
    resident = _size(sum(memory.resident or 0 for memory in census.memories))
    size = _size(sum(memory.size for memory in census.memories))
    lines.append(f"{len(census.memories)} memories in {len(processes)} processes: {size}, {resident} of it resident")
    if any(memory.creator_lives is False for memory in census.memories):
        lines.append("† has ended")
    if census.unseen:
        lines.append(f"{census.unseen} processes of other users could not be looked into")
    return lines


def _size(number: float | None) -> str:
    if number is None:
        return "-"
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" or number >= 10 else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TB"


if __name__ == "__main__":
    sys.exit(main())
