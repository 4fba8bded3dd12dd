"""Replace `multiprocessing.shared_memory` by changing one import, and see what `kill -9` leaves behind.

    python examples/replace_shared_memory.py [--start-method {fork,forkserver,spawn}]

The program below runs twice, once with each import. It creates a block of 8 MB, has a child process attach
by name and double the numbers in it, and adds them up. Then it is killed, with all that it started: as a
machine that runs out of memory does it, or a container that is stopped.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import mpmemory
from mpmemory.shared_memory import SharedMemory

PROGRAM = """
import multiprocessing
import sys

from {package}.shared_memory import SharedMemory

COUNT = 1_000_000


def double(name):
    block = SharedMemory(name)
    numbers = block.buf.cast("q")
    for index in range(0, COUNT, 100):
        numbers[index] *= 2
    numbers.release()  # with the standard library, close() is a BufferError otherwise
    block.close()


if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    block = SharedMemory(create=True, size=8 * COUNT)
    numbers = block.buf.cast("q")
    for index in range(0, COUNT, 100):
        numbers[index] = index
    child = multiprocessing.Process(target=double, args=(block.name,))
    child.start()
    child.join()
    print(block.name, sum(numbers[::100]), flush=True)
    sys.stdin.read()
"""

EXPECTED = str(2 * sum(range(0, 1_000_000, 100)))
SHM = Path("/dev/shm")  # where Linux shows the shared memory that has a name


def run_and_kill(package: str, method: str) -> str:
    """Run the program with that import, kill it, and return the name of its block."""
    # A short path: the fork server has a socket in it.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        path = Path(folder, "program.py")
        path.write_text(PROGRAM.format(package=package))
        # In a session of its own, so that all of it can be killed at once.
        program = subprocess.Popen(
            [sys.executable, path, method],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "TMPDIR": folder},
        )
        assert program.stdout
        name, _, total = program.stdout.readline().strip().partition(" ")
        os.killpg(program.pid, signal.SIGKILL)
        program.communicate()
    if total != EXPECTED:
        raise SystemExit(f"{package}: expected {EXPECTED}, found {total!r}")
    print(f"  two processes, one block {name!r}: the sum is {total}, as it should be")
    print("  kill -9")
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description="Replace multiprocessing.shared_memory by changing one import.")
    parser.add_argument("--start-method", choices=mpmemory.get_all_start_methods(), default=mpmemory.get_start_method())
    method = parser.parse_args().start_method

    print("from multiprocessing.shared_memory import SharedMemory")
    left = SHM / run_and_kill("multiprocessing", method)
    if left.exists():
        print(f"  left behind: {left} with {left.stat().st_size / 1e6:.0f} MB, until somebody removes it")
        left.unlink()
    else:
        print("  left behind: nothing to be seen on this system")

    print("from mpmemory.shared_memory import SharedMemory")
    name = run_and_kill("mpmemory", method)
    if (SHM / name).exists():
        raise SystemExit(f"expected nothing, found {SHM / name}")
    try:
        SharedMemory(name)
    except FileNotFoundError as error:
        print(f"  left behind: nothing. {error}")
    else:
        raise SystemExit(f"expected no memory, found {name}")


if __name__ == "__main__":
    main()
