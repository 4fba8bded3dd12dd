"""Channels between two processes: one small adapter for each, to a child that sends everything back."""

from __future__ import annotations

import ctypes
import importlib
import os
from functools import partial
from typing import Any

PATIENCE = 3600.0  # seconds that a message may take to come


class Channel:
    """What a channel is asked for; its constructor starts the child. `most` is the largest message, in bytes."""

    name = ""
    method = "spawn"  # so that the child has nothing of the parent
    most: int | None = None

    def __init__(self, most: int) -> None:
        import multiprocessing

        context: Any = multiprocessing.get_context(self.method)
        self.end, there = self.ends(min(most, self.most or most))
        self.child = context.Process(target=echo, args=(there,), daemon=True)
        self.child.start()
        there.let_go()

    def ends(self, most: int) -> tuple[Any, Any]:
        """Make both ends, for messages of up to `most` bytes; each has send, recv, and let_go."""
        raise NotImplementedError

    def round_trip(self, array: Any) -> None:
        """Send an array and have it back."""
        self.end.send(array)
        self.end.recv()

    def close(self) -> None:
        """End the child."""
        try:
            if self.child.is_alive():
                self.end.say_bye()
                self.child.join(5)
        finally:
            self.child.kill()
            self.child.join()
            self.end.let_go()


def echo(end: Any) -> None:
    """Send back what comes: what the child does."""
    while True:
        item = end.recv()
        if item is None or end.is_bye(item):
            break
        end.send(item)
    end.let_go()


class _End:
    """The end of a pipe, or of two queues, one for each direction."""

    def __init__(self, outgoing: Any, incoming: Any) -> None:
        self._outgoing, self._incoming = outgoing, incoming
        self.send = getattr(outgoing, "send", None) or outgoing.put
        self.recv = getattr(incoming, "recv", None) or incoming.get

    def __reduce__(self) -> Any:
        return type(self), (self._outgoing, self._incoming)

    def say_bye(self) -> None:
        self.send(self.bye())

    def bye(self) -> Any:
        return None

    def is_bye(self, item: Any) -> bool:
        return item is None

    def let_go(self) -> None:
        for each in {id(each): each for each in (self._outgoing, self._incoming)}.values():
            if hasattr(each, "fileno"):  # a pipe's; the ends of a queue may be in use in the same process
                each.close()


class _Pipes(Channel):
    module = ""

    def ends(self, most: int) -> tuple[Any, Any]:
        here, there = importlib.import_module(self.module).Pipe()
        return _End(here, here), _End(there, there)


class _Queues(Channel):
    module = ""
    kind = "Queue"

    def ends(self, most: int) -> tuple[Any, Any]:
        context = importlib.import_module(self.module).get_context(self.method)
        out, back = (getattr(context, self.kind)() for _ in range(2))
        return _End(out, back), _End(back, out)


class OurPipe(_Pipes):
    """`mpmemory.Pipe`."""

    name = "mpmemory.Pipe"
    module = "mpmemory"


class StockPipe(_Pipes):
    """`multiprocessing.Pipe`."""

    name = "multiprocessing.Pipe"
    module = "multiprocessing"


class OurQueue(_Queues):
    """`mpmemory.Queue`, one for each direction."""

    name = "mpmemory.Queue"
    module = "mpmemory"


class StockQueue(_Queues):
    """`multiprocessing.Queue`, one for each direction."""

    name = "multiprocessing.Queue"
    module = "multiprocessing"


class TorchQueue(_Queues):
    """`torch.multiprocessing.Queue`: a tensor is moved to shared memory once, and goes both ways by reference."""

    name = "torch Queue"
    module = "torch.multiprocessing"

    def round_trip(self, array: Any) -> None:
        import torch

        super().round_trip(torch.from_numpy(array))  # a new one each time: a tensor that was sent stays there


class FasterFifo(Channel):
    """`faster_fifo.Queue`, one for each direction: rings of bytes in shared memory, for pickles."""

    name = "faster-fifo"
    most = 64 << 20  # as much memory is taken for a queue, twice

    def ends(self, most: int) -> tuple[Any, Any]:
        import faster_fifo
        import faster_fifo_reduction  # noqa: F401 (what lets it be sent to a child that is spawned)

        out, back = (faster_fifo.Queue(most + (1 << 16)) for _ in range(2))
        return _PatientEnd(out, back), _PatientEnd(back, out)


class _PatientEnd(_End):
    def __init__(self, outgoing: Any, incoming: Any) -> None:
        super().__init__(outgoing, incoming)
        self.send = partial(outgoing.put, timeout=PATIENCE)  # the default is 10 seconds, which other sides may take
        self.recv = partial(incoming.get, timeout=PATIENCE)


class ArrayQueues(Channel):
    """`arrayqueues.ArrayQueue`, one for each direction, to a forked child; what arrives is a view of a slot."""

    name = "arrayqueues"
    method = "fork"
    most = 16 << 20  # a ring has at least three slots, and all of it is written to when it is made

    def ends(self, most: int) -> tuple[Any, Any]:
        import numpy as np

        if not hasattr(np, "product"):
            np.product = np.prod  # type: ignore[attr-defined]  # its version 1.4 has not heard of NumPy 2
        from arrayqueues.shared_arrays import ArrayQueue

        out, back = (ArrayQueue(4 * most / 1e6) for _ in range(2))
        return _ArrayEnd(out, back), _ArrayEnd(back, out)


class _ArrayEnd(_End):
    def bye(self) -> Any:
        import numpy as np

        return np.zeros(1, "i1")  # nothing but arrays can be sent

    def is_bye(self, item: Any) -> bool:
        return bool(item.dtype == "i1")


class Iceoryx(Channel):
    """`iceoryx2`: publish-subscribe of byte slices, and an event service to be woken by, one for each direction.

    A sample is lent in shared memory, the array is copied into it, and the other side reads it there: natively.
    """

    name = "iceoryx2"

    def __init__(self, most: int) -> None:
        import iceoryx2  # noqa: F401 (here, so that a missing package is seen before a child is started)

        super().__init__(most)

    def ends(self, most: int) -> tuple[Any, Any]:
        name = f"mpmemory-benchmark-{os.getpid()}-{id(self)}"
        here, there = _IceoryxEnd(name, "out", "back"), _IceoryxEnd(name, "back", "out")
        here.open()
        return here, there

    def round_trip(self, array: Any) -> None:
        if not self.end.met:  # what is published before anyone has subscribed is not delivered
            self.end.wait()
        super().round_trip(array)


class _IceoryxEnd:
    def __init__(self, name: str, outgoing: str, incoming: str) -> None:
        self._name, self._outgoing, self._incoming = name, outgoing, incoming
        self._opened = self.met = False

    def open(self) -> None:
        import iceoryx2 as iox

        iox.set_log_level(iox.LogLevel.Error)
        builder = iox.NodeBuilder.new().signal_handling_mode(iox.SignalHandlingMode.Disabled)
        self._node = node = builder.create(iox.ServiceType.Ipc)
        self._parts: list[Any] = []

        def service(direction: str) -> tuple[Any, Any]:
            name = iox.ServiceName.new(f"{self._name}/{direction}")
            data = node.service_builder(name).publish_subscribe(iox.Slice[ctypes.c_uint8]).open_or_create()
            event = node.service_builder(name).event().open_or_create()
            self._parts += [data, event]
            return data, event

        (data, event), (data_in, event_in) = service(self._outgoing), service(self._incoming)
        growing = data.publisher_builder().initial_max_slice_len(4096)
        self._publisher = growing.allocation_strategy(iox.AllocationStrategy.PowerOfTwo).create()
        self._notifier = event.notifier_builder().create()
        self._subscriber = data_in.subscriber_builder().create()
        self._listener = event_in.listener_builder().create()
        self._opened = True

    def wait(self) -> None:
        """Wait for the first word of the other side."""
        self.recv()
        self.met = True

    def send(self, array: Any) -> None:
        sample = self._publisher.loan_slice_uninit(array.nbytes)
        ctypes.memmove(sample.payload_ptr, array.ctypes.data, array.nbytes)
        sample.assume_init().send()
        self._notifier.notify()

    def recv(self) -> Any:
        import numpy as np

        if not self._opened:  # the child's
            self.open()
            self.send(np.zeros(1, "i1"))
        while (sample := self._subscriber.receive()) is None:
            self._listener.blocking_wait()
        return np.frombuffer(sample.payload().as_memory_view(), np.uint8)

    def say_bye(self) -> None:
        import numpy as np

        self.send(np.zeros(1, "i1"))

    def is_bye(self, item: Any) -> bool:
        return bool(item.nbytes == 1)

    def let_go(self) -> None:
        """Close nothing: ports and services go with their objects."""


CHANNELS: dict[str, type[Channel]] = {
    kind.name: kind for kind in (OurPipe, StockPipe, OurQueue, StockQueue, Iceoryx, FasterFifo, ArrayQueues, TorchQueue)
}
