"""Loads and stores of one lane: 16 bytes, or 8, 4, 2, 1 where an address is not aligned to more.

``load*`` are for memory that nobody writes while the kernel runs: ``ld.global.nc``, without allocation in L1, since each
byte is read once; ``cached*`` are for such memory that is read again and again. ``early*`` are for such memory too, where
several loads are to be in flight before the first word is used: the assembler moves ``.nc`` loads to where their words are
used, behind stores and other loads' work, and never more than two were in flight; others stay before the stores that follow
them. They are plain loads, so a warp may also read by them what it wrote itself, behind a ``syncwarp``. ``fresh*`` are for
memory that a DMA writes while the kernel runs: ``ld.global.cg``, which never sees a stale line of L1. Stores are plain, so
that what a gather wrote is still in L2 when the DMA reads it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from kvortex.kernels.ptx import statement

_CONSTANT, _CACHED, _FRESH = "ld.global.nc.L1::no_allocate", "ld.global.nc", "ld.global.cg"
# bytes -> PTX type, register, ctypes type
_SCALARS: dict[int, tuple[str, str, Any]] = {
    8: ("u64", "l", ctypes.c_uint64),
    4: ("u32", "r", ctypes.c_uint32),
    2: ("u16", "h", ctypes.c_uint16),
    1: ("u8", "h", ctypes.c_uint8),
}


@statement(f"{_CONSTANT}.v4.u32 {{$0,$1,$2,$3}}, [$4];", "l", "v")
def load16(address):  # type: ignore[no-untyped-def]
    """The 16 bytes at ``address`` (a multiple of 16), as four 32-bit words."""
    return tuple((ctypes.c_uint32 * 4).from_address(int(address)))


@statement("ld.global.L1::no_allocate.v4.u32 {$0,$1,$2,$3}, [$4];", "l", "v")
def early16(address):  # type: ignore[no-untyped-def]
    """As :func:`load16`."""
    return tuple((ctypes.c_uint32 * 4).from_address(int(address)))


@statement("ld.global.v4.u32 {$0,$1,$2,$3}, [$4];", "l", "v")
def early_cached16(address):  # type: ignore[no-untyped-def]
    """As :func:`load16`, of what is read again."""
    return tuple((ctypes.c_uint32 * 4).from_address(int(address)))


@statement(
    "{ .reg .b64 p; createpolicy.fractional.L2::evict_first.b64 p, 1.0; "
    "ld.global.L2::cache_hint.v4.u32 {$0,$1,$2,$3}, [$4], p; }",
    "l",
    "v",
)
def early_once16(address):  # type: ignore[no-untyped-def]
    """As :func:`early_cached16`, of lines that several loads of a warp read together and nobody later: the first to leave L2,
    which keeps what the warp writes meanwhile."""
    return tuple((ctypes.c_uint32 * 4).from_address(int(address)))


@statement("ld.global.L1::no_allocate.u32 $0, [$1];", "l", "r")
def early4(address):  # type: ignore[no-untyped-def]
    """4 bytes, as :func:`early16` loads its own."""
    return ctypes.c_uint32.from_address(int(address)).value


@statement("bar.warp.sync 0xffffffff;", "", together=True, before="")
def all_here():  # type: ignore[no-untyped-def]
    """Keeps loads of a whole warp before what follows, where no store does that. All lanes must come to it.

    From 9.0 on it is no instruction. Before it would be a call, over which every loaded word is kept in a register of its own,
    more than there are: there it is left out.
    """


@statement("mov.b32 $0, $1;", "r", "r")
def afresh(number):  # type: ignore[no-untyped-def]
    """The same number, of which the compiler does not know that: what is made of it is made here, and not before a loop, over
    which it would have registers."""
    return number


@statement(f"{_FRESH}.v4.u32 {{$0,$1,$2,$3}}, [$4];", "l", "v")
def fresh16(address):  # type: ignore[no-untyped-def]
    """As :func:`load16`."""
    return tuple((ctypes.c_uint32 * 4).from_address(int(address)))


@statement("st.global.v4.u32 [$0], {$1,$2,$3,$4};", "lv")
def store16(address, words):  # type: ignore[no-untyped-def]
    """Puts the four words of :func:`load16` at ``address`` (a multiple of 16)."""
    (ctypes.c_uint32 * 4).from_address(int(address))[:] = words


def _load(nbytes: int, way: str) -> Callable[..., Any]:
    ptx, register, cell = _SCALARS[nbytes]

    @statement(f"{way}.{ptx} $0, [$1];", "l", register)
    def load(address):  # type: ignore[no-untyped-def]
        return cell.from_address(int(address)).value

    return load  # type: ignore[no-any-return]


def _store(nbytes: int) -> Callable[..., Any]:
    ptx, register, cell = _SCALARS[nbytes]

    @statement(f"st.global.{ptx} [$0], $1;", "l" + register)
    def store(address, value):  # type: ignore[no-untyped-def]
        cell.from_address(int(address)).value = value

    return store  # type: ignore[no-any-return]


load8, load4, load2, load1 = (_load(nbytes, _CONSTANT) for nbytes in (8, 4, 2, 1))
cached8, cached4, cached2, cached1 = (_load(nbytes, _CACHED) for nbytes in (8, 4, 2, 1))
early_cached8, early_cached4, early_cached2 = (_load(nbytes, "ld.global") for nbytes in (8, 4, 2))
fresh8, fresh4, fresh2, fresh1 = (_load(nbytes, _FRESH) for nbytes in (8, 4, 2, 1))
store8, store4, store2, store1 = (_store(nbytes) for nbytes in (8, 4, 2, 1))
