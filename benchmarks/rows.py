"""The rows of the table: what is done, and what it is measured against. README.md has the questions."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import multiprocessing
import os
import signal
import socket
import statistics
import struct
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from multiprocessing.shared_memory import ShareableList, SharedMemory
from typing import Any

import numpy as np

import mpmemory
from mpmemory import CACHE_LINE_SIZE, PAGE_SIZE, Memory, Seal, SharedBuffer, WorkerLostError, arrays

from .measure import Comparison, Side, shielded

Array = np.ndarray[Any, Any]
Row = Callable[[], Generator[Comparison, None, None]]

SMALL = 4096
LARGE = 16 << 20

# The flags that the library uses here. MFD_NOEXEC_SEAL (0x8) is not in Python, and only in Linux 6.3 on.
MEMFD_FLAGS = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (0x8 if Seal.EXEC in Memory(0).seals else 0)


# --- making memory --------------------------------------------------------------------------------


def small() -> Generator[Comparison, None, None]:
    yield Comparison(
        200,
        Side("SharedBuffer of 4 KB", _small_buffer),
        (Side("SharedMemory", partial(_small_shared_memory, SharedMemory)), Side("bare calls", _small_bare)),
    )


def _small_buffer() -> None:
    buffer = SharedBuffer(SMALL)
    buffer[0] = 1
    buffer.close()


def _small_shared_memory(kind: Any) -> None:
    memory = kind(create=True, size=SMALL)
    memory.buf[0] = 1
    memory.close()
    memory.unlink()


def _small_bare() -> None:
    fd, mapping = _bare(SMALL)
    mapping[0] = 1
    mapping.close()
    os.close(fd)


def large() -> Generator[Comparison, None, None]:
    data = b"\xa5" * LARGE  # not bytes(LARGE), which would be one page of zeros, mapped again and again
    yield Comparison(
        1,
        Side("SharedBuffer.from_bytes of 16 MB", partial(_large_buffer, data)),
        (
            Side("SharedMemory, copied into", partial(_large_shared_memory, data)),
            Side("bare calls, copied into", partial(_large_bare, data)),
        ),
    )


def _large_buffer(data: bytes) -> None:
    buffer = SharedBuffer.from_bytes(data)
    _touch(buffer.buf)
    buffer.close()


def _large_shared_memory(data: bytes) -> None:
    memory = SharedMemory(create=True, size=len(data))
    view = memory.buf
    assert view is not None
    view[:] = data
    _touch(view)
    memory.close()
    memory.unlink()


def _large_bare(data: bytes) -> None:
    fd, mapping = _bare(len(data))
    mapping[:] = data
    with memoryview(mapping) as view:
        _touch(view)
    mapping.close()
    os.close(fd)


def _bare(size: int) -> tuple[int, mmap.mmap]:
    fd = os.memfd_create("bare", MEMFD_FLAGS)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    os.ftruncate(fd, size)
    return fd, mmap.mmap(fd, size)


def _touch(view: memoryview) -> None:
    """Read a byte of each page: what was written without the mapping is not in its page table yet."""
    view[::PAGE_SIZE].tobytes()


# --- the drop-ins ---------------------------------------------------------------------------------


def shared_memory() -> Generator[Comparison, None, None]:
    kinds = mpmemory.SharedMemory, SharedMemory
    yield _drop_in("a block of 4 KB", [partial(_small_shared_memory, kind) for kind in kinds])
    blocks = [kind(create=True, size=SMALL) for kind in kinds]
    try:
        yield _drop_in("attach to it", [partial(_attach, type(block), block.name) for block in blocks])
    finally:
        for block in blocks:
            block.close()
            block.unlink()
    items = [kind(range(100)) for kind in (mpmemory.ShareableList, ShareableList)]
    try:
        yield _drop_in("ShareableList, an item", [partial(_increment, each) for each in items])
    finally:
        for each in items:
            each.shm.close()
            each.shm.unlink()


def _drop_in(what: str, actions: Sequence[Callable[[], object]]) -> Comparison:
    ours, stock = actions
    return Comparison(200, Side(what, ours), (Side("multiprocessing.shared_memory", stock),))


def _attach(kind: Any, name: str) -> None:
    memory = kind(name)
    memory.buf[0] = 1
    memory.close()


def _increment(items: Any) -> None:
    items[50] += 1


# --- locks ----------------------------------------------------------------------------------------


def lock() -> Generator[Comparison, None, None]:
    memory = Memory(PAGE_SIZE)
    description = os.open(f"/proc/self/fd/{memory.fileno()}", os.O_RDWR | os.O_CLOEXEC)
    stock = multiprocessing.get_context("fork").Lock()
    yield Comparison(
        1000,
        Side("RangeLock, acquired and released", partial(_lock, memory.lock(0, 8))),
        (
            Side("bare fcntl", partial(_lock_bare, description)),
            Side("multiprocessing.Lock", partial(_lock, stock)),
            Side("RobustLock", partial(_lock, mpmemory.RobustLock())),
        ),
    )
    os.close(description)
    for ours in (memory.lock(0, 8), mpmemory.RobustLock()):
        name = type(ours).__name__
        fairness: dict[str, list[float]] = {name: [], "Lock": []}
        yield Comparison(
            1,
            Side(f"{name}, 4 processes, 2000 times", partial(_contend, ours, fairness[name])),
            (Side("multiprocessing.Lock", partial(_contend, stock, fairness["Lock"])),),
        )
        shares = ", ".join(f"{kind} {statistics.median(values):.2f}" for kind, values in fairness.items())
        print(f"{'':13} fairness, the least share of a process to the greatest (1 is fair): {shares}")


def _lock(lock: Any) -> None:
    lock.acquire()
    lock.release()


_WRITE_LOCK, _NO_LOCK = (struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 8, 0) for kind in (fcntl.F_WRLCK, fcntl.F_UNLCK))


def _lock_bare(fd: int) -> None:
    fcntl.fcntl(fd, 37, _WRITE_LOCK)  # F_OFD_SETLK
    fcntl.fcntl(fd, 37, _NO_LOCK)


def _contend(lock: Any, fairness: list[float]) -> None:
    """Have 4 processes take turns until they have had the lock 2,000 times, and note how evenly."""
    counts = SharedBuffer(5 * CACHE_LINE_SIZE)
    with shielded():
        children = [multiprocessing.get_context("fork").Process(target=_take, args=(lock, counts, i)) for i in range(4)]
        for child in children:
            child.start()
    for child in children:
        child.join()
    shares = counts.view("q")[:: CACHE_LINE_SIZE // 8].tolist()[:4]
    fairness.append(min(shares) / max(shares))


def _take(lock: Any, counts: SharedBuffer, index: int) -> None:
    numbers = counts.view("q")
    mine, total = index * CACHE_LINE_SIZE // 8, 4 * CACHE_LINE_SIZE // 8
    while numbers[total] < 2000:
        with lock:
            numbers[total] += 1
        numbers[mine] += 1


# --- sending a handle -----------------------------------------------------------------------------


def handle() -> Generator[Comparison, None, None]:
    ours, theirs = socket.socketpair()
    with ours, theirs, Memory(SMALL) as memory, _echo_child() as connection:
        yield Comparison(
            20,
            Side("Memory there and back through a Pipe", partial(_round_trip, connection, memory)),
            (
                Side("an int", partial(_round_trip, connection, 1)),
                Side("a socket", partial(_round_trip, connection, ours)),
            ),
        )


@contextlib.contextmanager
def _echo_child(pipe: Callable[[], Any] = multiprocessing.Pipe) -> Iterator[Any]:
    here, there = pipe()
    with here:
        child = multiprocessing.get_context("spawn").Process(target=_echo, args=(there,), daemon=True)
        try:
            with shielded(), there:
                child.start()
            yield here
        finally:
            here.close()  # the child ends, after a claim that is under way
            if child.pid is not None:
                child.join(1)
                child.terminate()
                child.join()


def _echo(connection: Connection) -> None:
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            item = connection.recv()
            connection.send(item)
            _close(item)


def _round_trip(connection: Connection, item: object) -> None:
    connection.send(item)
    _close(connection.recv())


def _close(item: object) -> None:
    if isinstance(item, Memory | socket.socket):
        item.close()


# --- messages -------------------------------------------------------------------------------------


def message() -> Generator[Comparison, None, None]:
    context = mpmemory.get_context("spawn")
    with Memory(SMALL) as memory, _echo_child() as stock, _echo_child(context.Pipe) as ours:
        for name, item, calls in (
            ("an int", 1, 200),
            ("a Memory", memory, 20),
            ("an array of 1 MB", np.ones(1 << 17), 10),
            ("an array of 16 MB", np.ones(1 << 21), 2),
            ("an array of 64 MB", np.ones(1 << 23), 1),
        ):
            peers = [Side("the stock Pipe", partial(_round_trip, stock, item))]
            if isinstance(item, np.ndarray):
                peers.append(Side("two memcpys", partial(_copy_twice, item, np.empty_like(item))))
            yield Comparison(
                calls, Side(f"{name} over our Pipe and back", partial(_round_trip, ours, item)), tuple(peers)
            )


def _copy_twice(source: Array, target: Array) -> None:
    target[:] = source
    source[:] = target


# --- pools ----------------------------------------------------------------------------------------


def pool() -> Generator[Comparison, None, None]:
    """Latency and throughput of tasks that do nothing."""
    with _pools() as (ours, stock, executor), Memory(SMALL) as memory:
        yield Comparison(
            50,
            Side("Pool.apply of nothing", partial(ours.apply, _same, (1,))),
            (
                Side("the stock Pool", partial(stock.apply, _same, (1,))),
                Side("ProcessPoolExecutor", lambda: executor.submit(_same, 1).result()),
            ),
        )
        yield Comparison(
            50,
            Side("a handle through our Pool and back", partial(_echo_handle, ours, memory)),
            (
                Side("an int", partial(ours.apply, _same, (1,))),
                Side("the stock Pool", partial(_echo_handle, stock, memory)),
            ),
        )
        yield Comparison(
            1,
            Side("Pool.imap of 1000 times nothing", partial(_drain, ours.imap)),
            (
                Side("the stock Pool", partial(_drain, stock.imap)),
                Side("ProcessPoolExecutor", partial(_drain, executor.map)),
                *_joblib(lambda parallel, delayed: parallel(delayed(_same)(x) for x in range(1000))),
            ),
        )


def pool_arrays() -> Generator[Comparison, None, None]:
    """Arrays to a worker and back."""
    with _pools() as (ours, stock, executor):
        for size in (0.1, 1, 16, 64):
            array = np.ones(int(size * (1 << 17)))
            yield Comparison(
                10 if size < 16 else 1,
                Side(f"{size} MB through our Pool and back", partial(ours.apply, _same, (array,))),
                (
                    Side("the stock Pool", partial(stock.apply, _same, (array,))),
                    Side("ProcessPoolExecutor", partial(_submit, executor, array)),
                    *_joblib(partial(_joblib_echo, array)),
                ),
            )
        yield Comparison(
            1,
            Side("1000 results of 600 KB kept, our Pool", partial(_keep, ours)),
            (Side("the stock Pool", partial(_keep, stock)),),
        )


def shared_arrays() -> Generator[Comparison, None, None]:
    """Arrays that all tasks get, by reference and as copies; and what that costs arrays in private memory."""
    with _pools() as (ours, stock, _):
        large, small = arrays.zeros(1 << 27), arrays.zeros(1 << 17)
        yield Comparison(
            5,
            Side("a shared array of 1 GB to 100 tasks", partial(_share, ours, large)),
            (Side("of 1 MB", partial(_share, ours, small)), Side("100 times nothing", partial(_share, ours, 0))),
        )
        del large, small
        private = np.zeros(1 << 19)
        yield Comparison(
            1,
            Side("a shared array of 4 MB to 100 tasks", partial(_share, ours, arrays.array(private))),
            (
                Side("a copy for each, our Pool", partial(_share, ours, private)),
                Side("a copy for each, the stock Pool", partial(_share, stock, private)),
                *_joblib(partial(_joblib_share, private), max_nbytes="1M"),
            ),
        )
    for array in (np.zeros(100), np.zeros((20, 20))[:, ::2]):
        yield Comparison(
            1000,
            Side(f"pickling {array.size} private numbers", partial(ForkingPickler.dumps, array)),
            (Side("without mpmemory.arrays", partial(_Without.dumps, array)),),
        )
    yield Comparison(
        20,
        Side("100 small arrays, made and dropped", partial(_make_100, partial(arrays.zeros, 100))),
        (
            Side("in private memory", partial(_make_100, partial(np.zeros, 100))),
            Side("in SharedMemory each", partial(_make_100, _array_in_shared_memory)),
        ),
    )


class _Without(ForkingPickler):
    """The pickler of multiprocessing as it is if `mpmemory.arrays` is never imported."""

    _extra_reducers = {  # noqa: RUF012
        kind: reduce
        for kind, reduce in ForkingPickler._extra_reducers.items()  # type: ignore[attr-defined]
        if kind is not np.ndarray
    }


def _share(pool: Any, array: Array | int) -> None:
    pool.map(_nothing, [array] * 100, chunksize=1)


def _joblib_share(array: Array, parallel: Any, delayed: Any) -> None:
    parallel(delayed(_nothing)(array) for _ in range(100))


def _nothing(_: object) -> None:
    pass


def _make_100(make: Callable[[], object]) -> None:
    kept = [make() for _ in range(100)]
    del kept


def _array_in_shared_memory() -> Any:
    memory = SharedMemory(create=True, size=800)
    array: Array = np.ndarray((100,), buffer=memory.buf)
    memory.unlink()
    return memory, array


def pool_deaths() -> Generator[Comparison, None, None]:
    """A worker is killed: until its task fails, and the next one has been done."""
    with mpmemory.get_context("fork").Pool(2) as ours:
        yield Comparison(
            1,
            Side("a killed worker, and another task", partial(_survive, ours)),
            (Side("a new ProcessPoolExecutor", _replace_executor),),
        )


@contextlib.contextmanager
def _pools() -> Iterator[tuple[Any, Any, ProcessPoolExecutor]]:
    """Start two workers of each kind, and let all of them work."""
    with shielded():
        ours = mpmemory.get_context("forkserver").Pool(2)
        stock = multiprocessing.get_context("forkserver").Pool(2)
        executor = ProcessPoolExecutor(2, multiprocessing.get_context("forkserver"))
    with ours, stock, executor:
        for run in (ours.map, stock.map, executor.map):
            list(run(_same, range(20)))
        yield ours, stock, executor


def _same(item: Any) -> Any:
    return item


def _echo_handle(pool: Any, memory: Memory) -> None:
    pool.apply(_same, (memory,)).close()


def _submit(executor: ProcessPoolExecutor, item: object) -> object:
    return executor.submit(_same, item).result()


def _drain(imap: Callable[..., Iterator[object]]) -> None:
    for _ in imap(_same, range(1000)):
        pass


def _keep(pool: Any) -> None:
    kept = list(pool.imap_unordered(np.zeros, [75_000] * 1000))
    assert len(kept) == 1000


def _joblib(run: Callable[[Any, Any], object], max_nbytes: str | None = None) -> tuple[Side, ...]:
    """Return a side that runs joblib (loky), if it is installed."""
    try:
        from joblib import Parallel, delayed
    except ImportError:
        return ()
    # Its workers stay. Arrays of more than `max_nbytes` it writes to a file, once a call, and shares that.
    return (Side("joblib", lambda: run(Parallel(n_jobs=2, max_nbytes=max_nbytes), delayed)),)


def _joblib_echo(array: Array, parallel: Any, delayed: Any) -> object:
    return parallel([delayed(_same)(array)])


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _survive(pool: Any) -> None:
    with contextlib.suppress(WorkerLostError):
        pool.apply(_die)
    pool.apply(_same, (1,))


def _replace_executor() -> None:
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(2, fork) as broken, contextlib.suppress(BrokenProcessPool):
        broken.submit(_die).result()
    with ProcessPoolExecutor(2, fork) as executor:
        executor.submit(_same, 1).result()


# --- starting a process ---------------------------------------------------------------------------


def start() -> Generator[Comparison, None, None]:
    with contextlib.ExitStack() as stack:
        handles = [stack.enter_context(Memory(SMALL)) for _ in range(100)]
        for method in multiprocessing.get_all_start_methods():
            for count in (1, 100):
                yield Comparison(
                    1,
                    Side(f"{method}, handles as arguments: {count}", partial(_start, method, handles[:count])),
                    (
                        Side("none", partial(_start, method, [])),
                        Side("none, but the import", partial(_start, method, [Memory])),
                    ),
                )


def _start(method: str, items: Sequence[object]) -> None:
    # A built-in as the target: the child imports nothing but what its arguments need.
    process = mpmemory.get_context(method).Process(target=len, args=(items,))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"the {method} child ended with {process.exitcode}")


# --- importing ------------------------------------------------------------------------------------


def imports() -> Generator[Comparison, None, None]:
    yield Comparison(
        1,
        Side("python -c 'import mpmemory'", partial(_python, "import mpmemory")),
        (
            Side(
                "multiprocessing's modules",
                partial(_python, "import multiprocessing.context, multiprocessing.pool, multiprocessing.connection"),
            ),
            Side("no import", partial(_python, "pass")),
        ),
    )


def _python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


ROWS: dict[str, Row] = {
    "small": small,
    "large": large,
    "shared-memory": shared_memory,
    "lock": lock,
    "handle": handle,
    "message": message,
    "pool": pool,
    "pool-arrays": pool_arrays,
    "arrays": shared_arrays,
    "pool-deaths": pool_deaths,
    "start": start,
    "import": imports,
}
