"""Warp functions that Numba's simulator lacks, in lock step over the threads of a warp; and casts that wrap as a GPU's do.

Full masks only, and blocks of whole warps in one dimension. A lane that does not reach a call breaks the barrier: the first
exception tells why.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda.simulator.kernelapi import FakeCUDAModule, FakeCUDAShared

_warps: dict[int, tuple[threading.Barrier, list[Any]]] = {}
_lock = threading.Lock()


def _exchange(value: Any, pick: Callable[[list[Any], int], Any]) -> Any:
    thread: Any = threading.current_thread()
    at = thread.threadIdx.x
    with _lock:
        barrier, slots = _warps.setdefault(at >> 5, (threading.Barrier(32, timeout=60), [0] * 32))
    slots[at & 31] = value
    barrier.wait()
    found = pick(slots, at & 31)
    barrier.wait()
    return found


def _ballot(self: Any, mask: int, predicate: Any) -> Any:
    return _exchange(bool(predicate), lambda slots, _: sum(1 << lane for lane in range(32) if slots[lane]))


def _shuffle(self: Any, mask: int, value: Any, flip: int) -> Any:
    return _exchange(value, lambda slots, lane: slots[lane ^ flip])


def _from_lane(self: Any, mask: int, value: Any, source: int) -> Any:
    return _exchange(value, lambda slots, _: slots[source])


def _shared_array(self: Any, shape: int, dtype: Any, alignment: None = None) -> Any:
    """One array for each line that asks; the simulator itself may give threads that ask at the same time one each."""
    asker = sys._getframe(1)
    made = np.empty(shape, str(dtype))
    return self._allocations.setdefault((asker.f_code.co_filename, asker.f_lineno), made)  # which no other thread divides


def install(*modules: ModuleType) -> None:
    """Gives the simulator what it lacks, and kernels' modules casts to unsigned and signed integers of a width."""
    sys.setswitchinterval(5e-4)  # the simulator's block manager spins with the GIL held
    FakeCUDAModule.ballot_sync, FakeCUDAModule.shfl_xor_sync, FakeCUDAModule.shfl_sync = _ballot, _shuffle, _from_lane
    cuda.shfl_xor_sync = lambda mask, value, flip: _exchange(value, lambda slots, lane: slots[lane ^ flip])
    FakeCUDAModule.syncwarp = lambda self, mask=0: _exchange(0, lambda slots, lane: None)
    FakeCUDAShared.array = _shared_array
    FakeCUDAModule.popc = lambda self, value: (int(value) & 0xFFFFFFFF).bit_count()
    for module in modules:
        for bits in (8, 16, 32, 64):
            for name, cast in ((f"uint{bits}", _unsigned(bits)), (f"int{bits}", _signed(bits))):
                if hasattr(module, name):
                    setattr(module, name, cast)


def before_launch() -> None:
    """A barrier that was broken stays so."""
    _warps.clear()


def _unsigned(bits: int) -> Callable[[Any], int]:
    # Python's integers between casts: as wide as Numba's, which makes 64 bits of a sum of two uint32.
    return lambda value: int(value) & ((1 << bits) - 1)


def _signed(bits: int) -> Callable[[Any], int]:
    return lambda value: ((int(value) + (1 << bits - 1)) & ((1 << bits) - 1)) - (1 << bits - 1)
