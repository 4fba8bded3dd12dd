"""Runs cells of the crash matrix, of one start method, given as JSON; reports each, and sees that nothing is left."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from multiprocessing import forkserver

import crash_cells
import crash_pools
from crash_cells import LIMIT, POOLS, Bench, Cell, server_pid
from supervise import failing_at_once, report, session, show_stacks_when_asked, until

from mpmemory import testing


def check(cell: Cell) -> dict[str, int]:
    """Run a cell; return what was counted."""
    bench = Bench(cell)
    if cell.channel in POOLS:
        scenarios = {
            "parent": crash_pools.check_parent,
            "fork server": crash_pools.check_server,
            "resource tracker": crash_pools.check_server,
        }
        scenarios.get(cell.who, crash_pools.check_workers)(bench)
    else:
        scenarios = {
            "sender": crash_cells.check_sender,
            "receiver": crash_cells.check_receiver,
            "worker": crash_cells.check_worker,
            "parent": crash_cells.check_parent,
        }
        scenarios.get(cell.who, crash_cells.check_server)(bench)
    bench.end()
    return {"messages": bench.messages, "bytes": bench.bytes}


def reap_orphans() -> None:
    """Wait until all have ended that this session has, but those that multiprocessing keeps."""
    kept = {os.getpid(), server_pid("resource tracker"), server_pid("fork server")}

    def are_gone() -> bool:
        if not set(session(os.getsid(0))) <= kept:
            return False
        # Only now: those that have just ended are children of this process by the time that their parents have.
        with open(f"/proc/self/task/{os.getpid()}/children") as children:
            orphans = set(map(int, children.read().split())) - kept
        return all(os.waitpid(pid, os.WNOHANG)[0] for pid in orphans)

    assert until(are_gone, LIMIT), f"processes are left: {set(session(os.getsid(0))) - kept}"


def main() -> None:
    show_stacks_when_asked()
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans become children of this process
    forkserver.set_forkserver_preload(["crash_cells", "crash_pools"])
    # Names of ours are looked for when all of this session has ended; others are left by other programs at any time.
    testing._SHM = "/dev/shm/not this one"
    for values in json.loads(sys.argv[1]):
        cell = Cell(*values)
        report(begin=str(cell))
        reap_orphans()  # and start what was killed before
        with testing.assert_no_leaks(timeout=LIMIT):
            counted = check(cell)
            reap_orphans()
        report(**counted)


if __name__ == "__main__":
    with failing_at_once():
        main()
