"""Pools of workers: one small adapter for each, all with the interface of `Workers`.

Workers are started as the fork server does it, where there is a choice. Tasks go one by one (chunksize 1).
"""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

START_METHOD = "forkserver"


class Workers:
    """What a pool is asked for. It is started by its constructor, with the number of workers."""

    name = ""

    def __init__(self, workers: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """End the workers."""
        raise NotImplementedError

    def submit(self, function: Callable[..., Any], *args: Any) -> Callable[[float], Any]:
        """Start a task, and return what waits for its result: for so many seconds at most."""
        raise NotImplementedError

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        """Do one task."""
        raise NotImplementedError

    def map(self, function: Callable[..., Any], items: Iterable[Any]) -> list[Any]:
        """Do a task for each item, and return all results."""
        return list(self.imap(function, items))

    def imap(self, function: Callable[..., Any], items: Iterable[Any]) -> Iterator[Any]:
        """Do a task for each item, and return results in their order, one by one."""
        raise NotImplementedError

    def give(self, array: Any) -> Any:
        """Return what this pool's users send where others send an array in private memory."""
        return array

    def share(self, array: Any) -> Any:
        """Return what this pool's users make of an array, once, that all tasks are to get."""
        return array


class Stock(Workers):
    """`multiprocessing.Pool`."""

    name = "multiprocessing"
    module = "multiprocessing"

    def __init__(self, workers: int) -> None:
        self.pool = importlib.import_module(self.module).get_context(START_METHOD).Pool(workers)

    def close(self) -> None:
        self.pool.terminate()
        self.pool.join()

    def submit(self, function: Callable[..., Any], *args: Any) -> Callable[[float], Any]:
        get: Callable[[float], Any] = self.pool.apply_async(function, args).get
        return get

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.pool.apply(function, args)

    def map(self, function: Callable[..., Any], items: Iterable[Any]) -> list[Any]:
        results: list[Any] = self.pool.map(function, items, chunksize=1)
        return results

    def imap(self, function: Callable[..., Any], items: Iterable[Any]) -> Iterator[Any]:
        results: Iterator[Any] = self.pool.imap(function, items)
        return results


class Ours(Stock):
    """`mpmemory.Pool`."""

    name = "mpmemory"
    module = "mpmemory"

    def share(self, array: Any) -> Any:
        from mpmemory import arrays

        return arrays.array(array)


class Multiprocess(Stock):
    """`multiprocess.Pool`: that of the standard library, with dill as its pickler."""

    name = "multiprocess"
    module = "multiprocess"

    def __init__(self, workers: int) -> None:
        importlib.import_module("multiprocess.resource_tracker").ensure_running()  # it unblocks SIGINT: see `shielded`
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        super().__init__(workers)


class Torch(Stock):
    """`torch.multiprocessing.Pool`: tensors, each moved to shared memory once and sent by reference."""

    name = "torch"
    module = "torch.multiprocessing"

    def give(self, array: Any) -> Any:
        import torch

        return torch.from_numpy(array)  # a new one each time: a tensor that was sent stays in shared memory

    def share(self, array: Any) -> Any:
        return self.give(array).share_memory_()


class Executor(Workers):
    """`concurrent.futures.ProcessPoolExecutor`."""

    name = "ProcessPoolExecutor"

    def __init__(self, workers: int) -> None:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        self.executor = ProcessPoolExecutor(workers, multiprocessing.get_context(START_METHOD))

    def close(self) -> None:
        self.executor.shutdown(cancel_futures=True)

    def submit(self, function: Callable[..., Any], *args: Any) -> Callable[[float], Any]:
        return self.executor.submit(function, *args).result

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.executor.submit(function, *args).result()

    def imap(self, function: Callable[..., Any], items: Iterable[Any]) -> Iterator[Any]:
        return self.executor.map(function, items)


class Joblib(Workers):
    """`joblib.Parallel` on loky's workers, which stay; arguments of 1 MB and more go as mapped files, its default."""

    name = "joblib"

    def __init__(self, workers: int) -> None:
        from joblib import Parallel, delayed
        from joblib.externals.loky import get_reusable_executor

        if workers == 1:
            raise ValueError("one worker is the calling process itself")

        self._workers, self._delayed, self._executor = workers, delayed, get_reusable_executor
        self._parallel = partial(Parallel, n_jobs=workers, batch_size=1)  # one for each call; the workers stay

    def close(self) -> None:
        self._executor().shutdown(wait=True, kill_workers=True)

    def submit(self, function: Callable[..., Any], *args: Any) -> Callable[[float], Any]:
        """Use the executor below: Parallel itself has no such thing."""
        future = self._executor(max_workers=self._workers, timeout=300, reuse=True).submit(function, *args)
        result: Callable[[float], Any] = future.result
        return result

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        return self._parallel()([self._delayed(function)(*args)])[0]

    def map(self, function: Callable[..., Any], items: Iterable[Any]) -> list[Any]:
        results: list[Any] = self._parallel()(self._delayed(function)(item) for item in items)
        return results

    def imap(self, function: Callable[..., Any], items: Iterable[Any]) -> Iterator[Any]:
        results: Iterator[Any] = self._parallel(return_as="generator")(self._delayed(function)(item) for item in items)
        return results


class Mpire(Workers):
    """`mpire.WorkerPool` with keep_alive; one pool for single tasks and one for maps, which do not mix in one."""

    name = "mpire"

    def __init__(self, workers: int) -> None:
        from mpire import WorkerPool

        self._make: Any = partial(WorkerPool, workers, start_method=START_METHOD, keep_alive=True)
        self._pools: dict[str, Any] = {}

    def _pool(self, kind: str) -> Any:
        if kind not in self._pools:
            self._pools[kind] = self._make()
        return self._pools[kind]

    def close(self) -> None:
        for pool in self._pools.values():
            pool.terminate()

    def submit(self, function: Callable[..., Any], *args: Any) -> Callable[[float], Any]:
        get: Callable[[float], Any] = self._pool("apply").apply_async(function, args).get
        return get

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        return self._pool("apply").apply(function, args)

    def map(self, function: Callable[..., Any], items: Iterable[Any]) -> list[Any]:
        results: list[Any] = self._pool("map").map(function, list(items), chunk_size=1, concatenate_numpy_output=False)
        return results

    def imap(self, function: Callable[..., Any], items: Iterable[Any]) -> Iterator[Any]:
        results: Iterator[Any] = self._pool("map").imap(function, list(items), chunk_size=1)
        return results


class Ray(Workers):
    """`ray` on this machine: tasks are remote functions, and an array for all tasks is put into its store once."""

    name = "ray"

    def __init__(self, workers: int) -> None:
        # Before the import: no figures are sent to its makers, and no hints about settings are printed.
        os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
        import ray

        self._ray = ray
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="FATAL")
        self._remote: dict[Any, Any] = {}

    def close(self) -> None:
        self._ray.shutdown()

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        if function not in self._remote:
            self._remote[function] = self._ray.remote(max_retries=0)(function)
        return self._remote[function].remote(*args)

    def submit(self, function: Callable[..., Any], *args: Any) -> Callable[[float], Any]:
        reference = self._call(function, *args)
        return lambda timeout: self._ray.get(reference, timeout=timeout)

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        return self._ray.get(self._call(function, *args))

    def map(self, function: Callable[..., Any], items: Iterable[Any]) -> list[Any]:
        results: list[Any] = self._ray.get([self._call(function, item) for item in items])
        return results

    def imap(self, function: Callable[..., Any], items: Iterable[Any]) -> Iterator[Any]:
        references = [self._call(function, item) for item in items]
        return (self._ray.get(reference) for reference in references)

    def share(self, array: Any) -> Any:
        return self._ray.put(array)


POOLS: dict[str, type[Workers]] = {
    kind.name: kind for kind in (Ours, Stock, Executor, Joblib, Mpire, Multiprocess, Torch, Ray)
}
