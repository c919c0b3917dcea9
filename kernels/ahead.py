"""Shared memory of a warp: copies into it from VRAM that run while the warp works on others, and its loads and stores.

A copy needs no register while it is under way, so that as many are in flight as there is room in shared memory. Lanes begin
copies, each its own, and close them as a batch; who has waited for a batch sees what he copied himself, and behind a
``syncwarp`` what the whole warp did. Loads and stores keep the order in which they are written.

Addresses are 64-bit numbers that begin at :func:`shared_at`. Kernels use their lower 32 bits; a simulator needs all.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from numba.cuda.core import config

from kvortex.kernels.ptx import statement

ALIGNED = None if config.ENABLE_CUDASIM else 16  # of a shared array that copies go to


@statement("{ .reg .b64 t; cvta.to.shared.u64 t, $1; cvt.u32.u64 $0, t; }", "l", "r", pure=True)
def shared_at(address):  # type: ignore[no-untyped-def]
    """Where a shared array lies, by ``array.ctypes.data``."""
    return address


@statement("cp.async.cg.shared.global [$0], [$1], 16;", "rl")
def copy16(target, address):  # type: ignore[no-untyped-def]
    """Begins a copy of 16 bytes of VRAM, which nobody writes while the kernel runs; both addresses are multiples of 16."""
    assert int(target) % 16 == int(address) % 16 == 0
    ctypes.memmove(int(target), int(address), 16)


@statement("cp.async.cg.shared.global [$0], [$1], 16, $2;", "rlr")
def copy16_of(target, address, nbytes):  # type: ignore[no-untyped-def]
    """As :func:`copy16` of fewer bytes, or none, and zeros behind them."""
    assert int(target) % 16 == int(address) % 16 == 0
    ctypes.memset(int(target), 0, 16)
    ctypes.memmove(int(target), int(address), int(nbytes))


@statement("{ .reg .pred p; setp.lt.u32 p, $2, $3; @p cp.async.ca.shared.global [$0], [$1], 4; }", "rlrr")
def copy4_below(target, address, at, end):  # type: ignore[no-untyped-def]
    """As :func:`copy16` of 4 bytes, if one number is below another."""
    if at < end:
        assert int(target) % 4 == int(address) % 4 == 0
        ctypes.memmove(int(target), int(address), 4)


@statement("cp.async.commit_group;", "")
def close_batch():  # type: ignore[no-untyped-def]
    """Makes a batch of what this lane began since the last one, or of nothing."""


@statement("cp.async.wait_group 1;", "")
def wait_for_last_but_one():  # type: ignore[no-untyped-def]
    """Until all batches of this lane but the last one are there."""


@statement("cp.async.wait_group 3;", "")
def wait_for_last_but_three():  # type: ignore[no-untyped-def]
    """Likewise, but the last three."""


@statement("cp.async.wait_group 0;", "")
def wait_for_all():  # type: ignore[no-untyped-def]
    """Until no batch of this lane is under way."""


def _get(text: str, result: str, cell: Any) -> Callable[..., Any]:
    @statement(text, "r", result)
    def get(address):  # type: ignore[no-untyped-def]
        found = cell.from_address(int(address))
        return found.value if result != "v" else tuple(found)

    return get  # type: ignore[no-any-return]


def _put(text: str, cell: Any) -> Callable[..., Any]:
    @statement(text, "rr")
    def put(address, value):  # type: ignore[no-untyped-def]
        cell.from_address(int(address)).value = int(value)

    return put  # type: ignore[no-any-return]


get16 = _get("ld.shared.v4.u32 {$0,$1,$2,$3}, [$4];", "v", ctypes.c_uint32 * 4)
get4 = _get("ld.shared.u32 $0, [$1];", "r", ctypes.c_uint32)
get2 = _get("ld.shared.u16 $0, [$1];", "r", ctypes.c_uint16)  # PTX takes a wider register, and fills it with zeros
get1 = _get("ld.shared.u8 $0, [$1];", "r", ctypes.c_uint8)
put4 = _put("st.shared.u32 [$0], $1;", ctypes.c_uint32)
put2 = _put("st.shared.u16 [$0], $1;", ctypes.c_uint16)
put1 = _put("st.shared.u8 [$0], $1;", ctypes.c_uint8)


@statement("st.shared.v4.u32 [$0], {$1,$2,$3,$4};", "rv")
def put16(address, words):  # type: ignore[no-untyped-def]
    """Four words at a multiple of 16."""
    (ctypes.c_uint32 * 4).from_address(int(address))[:] = [int(each) & 0xFFFFFFFF for each in words]
