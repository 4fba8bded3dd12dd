"""At the limits of the system: what is promised, or an error that says what is missing; never a hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import in_namespace

from mpmemory import _backends

TOUR = Path(__file__).with_name("tour.py")

BACKENDS = [name for name, backend in _backends.BACKENDS.items() if backend.available()]

# Each thread of it would take its part of the address space.
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}


def tour(prefix: Sequence[str], *actions: str, backend: str = "memfd") -> dict[str, str]:
    """Return what did not go as ever."""
    done = subprocess.run(
        [*prefix, sys.executable, "-W", "error", str(TOUR), *actions],
        env={**ENVIRONMENT, "MPMEMORY_BACKEND": backend},
        text=True,
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, str] = json.loads(done.stdout)
    return {name: what for name, what in found.items() if what != "done"}


def limited(option: str, value: int) -> list[str]:
    return ["sh", "-c", f'ulimit {option} {value}; exec "$@"', "-"]


@pytest.mark.parametrize("number", [256, 64, 32, 16])
def test_few_descriptors(number: int) -> None:
    found = tour(limited("-n", number))
    text = f"Too many open files (the limit of this process is {number}, see `ulimit -n`)"
    assert text in found.pop("memory_of_all_kinds")
    if number < 64:
        for name in ("pool", "shared_arrays"):
            assert "Too many open files" in found.pop(name, "Too many open files")
    assert found == {}


def test_little_address_space() -> None:
    found = tour(limited("-v", 600_000))
    assert "cannot map 1073741824 bytes of memory 'mpmemory': Cannot allocate memory" in found.pop("mapped")
    assert found == {}


def test_small_files() -> None:
    found = tour(limited("-f", 1 << 10), "memory", "queue", "mapped", "reserved")
    for name, size in (("mapped", 1 << 30), ("reserved", 100 << 20)):
        assert f"cannot have memory of {size} bytes: File too large" in found.pop(name)
    assert found.pop("queue", "File too large").endswith("File too large")
    assert found == {}


def test_a_mapping_of_the_maximum_number(run_python: Any) -> None:
    """vm.max_map_count: an OSError that says so, not a crash."""
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    if limit > 200_000 or sys.version_info < (3, 13):
        pytest.skip("needs many mappings, and a descriptor for each before Python 3.13")
    run_python(
        "import errno, mpmemory, itertools\n"
        "memory = mpmemory.Memory(1)\n"
        "kept = []\n"
        "try:\n"
        "    for _ in range(300_000): kept.append(memory.map())\n"
        "except OSError as error:\n"
        "    assert error.errno == errno.ENOMEM and 'cannot map 1 bytes' in str(error), error\n"
        "else: raise SystemExit('no limit met')\n"
        "kept.clear(); memory.map()\n"
    )


def test_a_small_cgroup(small_cgroup: list[str]) -> None:
    found = tour(small_cgroup, "memory", "queue", "handles_in_a_pipe", "shared_memory", "locks", "mapped", "reserved")
    assert "cannot reserve 104857600 bytes of memory" in found.pop("reserved")
    assert found == {}


def test_a_worker_takes_more_than_its_cgroup_has(small_cgroup: list[str], run_python: Any) -> None:
    """The kernel kills it, and its task fails."""
    done = run_python(
        "import mpmemory\n"
        "def work(size):\n"
        "    with open('/proc/self/oom_score_adj', 'w') as file: file.write('1000')\n"
        "    mpmemory.SharedBuffer(size).clear(1)\n"
        "    return size\n"
        "if __name__ == '__main__':\n"
        "    with mpmemory.Pool(1) as pool:\n"
        "        results = [pool.apply_async(work, (size << 20,)) for size in (1, 200, 2)]\n"
        "        for result in results:\n"
        "            try: print(result.get(60) >> 20)\n"
        "            except mpmemory.WorkerLostError as error: print(error.exitcode)\n"
        "        pool.close(); pool.join()\n",
        prefix=small_cgroup,
    )
    assert done.stdout.split() == ["1", str(-signal.SIGKILL), "2"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dev_shm_of_one_megabyte(backend: str, small_shm: list[str]) -> None:
    found = tour(small_shm, backend=backend)
    if backend == "posix":  # where the backend finds no room it says so; the others never look there
        assert {"mapped", "reserved"} <= set(found)
        assert all("No space left on device" in what for what in found.values())
    else:
        assert found == {}


NO_SHM = """
folder=$(mktemp -d) && mount -t tmpfs tmpfs "$folder"
for name in null zero full random urandom tty; do touch "$folder/$name"; mount --bind "/dev/$name" "$folder/$name"; done
mount --rbind "$folder" /dev
"""


@pytest.mark.parametrize("backend", ["memfd", "file"])
def test_without_dev_shm(backend: str) -> None:
    found = tour(in_namespace(NO_SHM), backend=backend)
    if backend == "file":  # there a block has a name in /dev/shm
        assert found.pop("shared_memory").startswith("FileNotFoundError")
    assert found == {}


def test_the_posix_backend_is_not_there_without_dev_shm(run_python: Any) -> None:
    done = run_python(
        "import mpmemory\nmpmemory.Memory(1)\n",
        check=False,
        prefix=in_namespace(NO_SHM),
        env={**ENVIRONMENT, "MPMEMORY_BACKEND": "posix"},
    )
    assert "MPMEMORY_BACKEND='posix' is not available on this system" in done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_proc(backend: str, without_proc: list[str]) -> None:
    """Pools and queues are those of multiprocessing, blocks are POSIX objects, and there are no locks."""
    found = tour(without_proc, backend=backend)
    assert found.pop("locks").endswith("locks on ranges of memory need Linux, with /proc")
    assert found == {}
