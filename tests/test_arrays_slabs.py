"""Slabs, which small arrays share; and the limit of descriptors."""

from __future__ import annotations

import gc
import itertools
import sys
from types import FrameType
from typing import Any

from conftest import LIMITED, Array, address, mappings, open_fds

from mpmemory import _slabs, arrays
from mpmemory._slabs import Slabs


def test_small_arrays_share_slabs_which_go_with_the_last() -> None:
    before = open_fds()
    kept = [arrays.full(100, index) for index in range(10_000)]
    assert all((a == index).all() for index, a in enumerate(kept))
    assert {address(a) % _slabs.ALIGNMENT for a in kept} == {0}
    identities = {arrays.memory_of(a).identity for a in kept}
    assert len(identities) == -(-10_000 // (_slabs.SLAB_SIZE // 832))
    last = kept[-1][50:]
    del kept
    gc.collect()
    assert len([line for line in mappings() if _slabs.SLAB in line]) == 1
    assert last.tolist() == [9999] * 50
    del last
    gc.collect()
    assert [line for line in mappings() if _slabs.SLAB in line] == []
    assert open_fds() == before


def test_arrays_without_items_at_the_end_of_a_slab() -> None:
    kept = [arrays.zeros(0) for _ in range(2 * _slabs.SLAB_SIZE // _slabs.ALIGNMENT)]
    assert all(arrays.is_shared(a) for a in kept)


def test_ten_thousand_small_arrays_under_a_limit_of_256_descriptors(run_python: Any) -> None:
    run_python(
        "import resource, numpy as np\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "import mpmemory\n"
        "from mpmemory import arrays\n"
        "def double(them):\n"
        "    for a in them: a *= 2\n"
        "    return them\n"
        "if __name__ == '__main__':\n"
        "    kept = [arrays.full(128, index) for index in range(10_000)]\n"
        "    for method in ('fork', 'spawn'):\n"
        "        with mpmemory.get_context(method).Pool(1) as pool:\n"
        "            found = pool.apply(double, (kept,))\n"
        "        found[-1][:] += 1\n"
        "    assert all((a == 4 * index).all() for index, a in enumerate(kept[:-1]))\n"
        "    assert (kept[-1] == (4 * 9999 + 3)).all(), kept[-1]\n"
    )


def test_a_thousand_large_arrays_under_a_limit_of_1024_descriptors(run_python: Any) -> None:
    run_python(
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))\n"
        "from mpmemory import arrays\n"
        "from mpmemory.connection import Pipe\n"
        "kept = [arrays.zeros(100_000) for index in range(1000)]\n"
        "left, right = Pipe()\n"
        "for index, a in enumerate(kept):\n"
        "    left.send(a)\n"
        "    right.recv()[-1] = index\n"
        "assert [a[-1] for a in kept] == list(range(1000))\n"
    )


def test_out_of_descriptors(run_python: Any) -> None:
    run_python(
        LIMITED + "from mpmemory import arrays, HandleLostError\n"
        "small = arrays.zeros(10)\n"
        "expect_the_limit(lambda: arrays.zeros(100_000))\n"
        "with no_descriptors_left():\n"
        "    arrays.zeros(10)\n"  # there is room in the slab
    )


def test_a_signal_handler_makes_arrays_of_its_own() -> None:
    # Between any two instructions of the function that looks for a place; lines, where Python 3.12 tells no more.
    names = itertools.count(1)
    kept: list[tuple[int, Array]] = []

    def make() -> None:
        name = next(names)
        kept.append((name, arrays.full(8, name)))

    def interrupt(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code is not Slabs.allocate.__code__:
            return interrupt if event == "call" else None
        frame.f_trace_opcodes = True
        if event in ("line", "opcode"):
            sys.settrace(None)
            make()
            sys.settrace(interrupt)
        return interrupt

    tracer = sys.gettrace()
    sys.settrace(interrupt)
    try:
        make()
        make()
    finally:
        sys.settrace(tracer)
    assert len(kept) > 10
    assert all((a == name).all() for name, a in kept)
