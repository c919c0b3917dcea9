"""Shares of a launch's work, which warps take as they come.

A launch beside a model gets multiprocessors one after another, as the model's kernels leave them. Were its work dealt out
before, the CTA that came last would do its part when all others have ended, and the model's next kernel would wait for
that. So each warp takes the next share from a counter, one ahead of what it works on; who comes when all are taken
leaves at once.

Each warp finds once that nothing is left, and the last one to find that puts the counter back: it is 0 before a launch and
behind it, and launches that share a counter follow one another on one stream.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from numba import cuda

from kvortex.kernels.lane import store4
from kvortex.kernels.ptx import statement
from kvortex.kernels.warp import uint32, uniform

_lock = threading.Lock()  # of the simulator's threads


@statement(
    "{ .reg .pred p; .reg .u32 t; mov.u32 t, 0; setp.eq.u32 p, $2, 0; @p atom.relaxed.gpu.global.add.u32 t, [$1], 1; "
    "mov.u32 $0, t; }",
    "lr",
    "r",
)
def ask(counter, lane):  # type: ignore[no-untyped-def]
    """Lane 0 takes the next share of the 32-bit number at ``counter``: :func:`answer` of it is the same in all lanes."""
    if int(lane) != 0:
        return 0
    cell = ctypes.c_uint32.from_address(int(counter))
    with _lock:
        cell.value = cell.value + 1
        return (cell.value - 1) & 0xFFFFFFFF


answer: Any = uniform


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def leave(counter, share, shares, warps, lane):  # type: ignore[no-untyped-def]
    """For a warp whose ``share`` is none of ``shares``, which it does not ask for again."""
    if share == uint32(shares + warps - uint32(1)) and lane == uint32(0):
        store4(counter, uint32(0))
