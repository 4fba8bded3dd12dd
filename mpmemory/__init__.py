"""Shared memory for Python's multiprocessing that pickles as a file descriptor.

Serves as a drop-in for `import multiprocessing as mp`: all names of its `__all__` are here, next
to `Memory`, `SharedBuffer`, and drop-ins for `SharedMemory` and `ShareableList`.
"""

from multiprocessing import AuthenticationError as AuthenticationError
from multiprocessing import BufferTooShort as BufferTooShort
from multiprocessing import Process as Process
from multiprocessing import ProcessError as ProcessError
from multiprocessing import TimeoutError as TimeoutError
from types import ModuleType as _ModuleType
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from . import _backends as _backends  # first: it refuses systems that cannot do it
from .buffer import CACHE_LINE_SIZE as CACHE_LINE_SIZE
from .buffer import PAGE_SIZE as PAGE_SIZE
from .buffer import SharedBuffer as SharedBuffer
from .buffer import align as align
from .context import default_context as _default
from .context import get_context as get_context
from .errors import HandleLostError as HandleLostError
from .errors import MpMemoryError as MpMemoryError
from .errors import PoolError as PoolError
from .errors import SealedError as SealedError
from .errors import WorkerLostError as WorkerLostError
from .locks import RangeLock as RangeLock
from .locks import RobustLock as RobustLock
from .memory import Memory as Memory
from .memory import Seal as Seal

if _TYPE_CHECKING:
    from . import arrays as arrays
    from .shared_memory import ShareableList as ShareableList
    from .shared_memory import SharedMemory as SharedMemory

__version__ = "0.1.0"

# The functions of multiprocessing, on our default context: by name, so that editors and type checkers see them.
Array = _default.Array
Barrier = _default.Barrier
BoundedSemaphore = _default.BoundedSemaphore
Condition = _default.Condition
Event = _default.Event
JoinableQueue = _default.JoinableQueue
Lock = _default.Lock
Manager = _default.Manager
Pipe = _default.Pipe
Pool = _default.Pool
Queue = _default.Queue
RLock = _default.RLock
RawArray = _default.RawArray
RawValue = _default.RawValue
Semaphore = _default.Semaphore
SimpleQueue = _default.SimpleQueue
Value = _default.Value
active_children = _default.active_children
allow_connection_pickling = _default.allow_connection_pickling
cpu_count = _default.cpu_count
current_process = _default.current_process
freeze_support = _default.freeze_support
get_all_start_methods = _default.get_all_start_methods
get_logger = _default.get_logger
get_start_method = _default.get_start_method
log_to_stderr = _default.log_to_stderr
parent_process = _default.parent_process
reducer = _default.reducer
set_executable = _default.set_executable
set_forkserver_preload = _default.set_forkserver_preload
set_start_method = _default.set_start_method


def __getattr__(name: str) -> _Any:
    if name == "arrays":  # needs NumPy, which is optional
        import importlib

        return importlib.import_module(".arrays", __name__)
    if name in ("ShareableList", "SharedMemory"):  # not every process needs them
        return getattr(_default, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    name
    for name, value in globals().items()
    if not name.startswith("_") and (value is reducer or not isinstance(value, _ModuleType))
]
__all__ += ["ShareableList", "SharedMemory"]
