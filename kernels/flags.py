"""Counters in VRAM through which a running kernel and DMAs on other streams wait for each other.

A flag is a 32-bit number that only grows, and wraps. ``cuStreamWaitValue32`` and :func:`behind` compare cyclically, so a
flag is never reset, and no operation is spent on it between transfers.

Besides, numbers by which the threads of one launch tell each other how far they are (:func:`take`, :func:`join`, :func:`tell`,
:func:`told`): whoever comes last puts them back to 0.
"""

from __future__ import annotations

import ctypes
import threading
import time

from kvortex.kernels.ptx import statement

_lock = threading.Lock()  # of the simulator's threads


@statement("{ .reg .u32 t; ld.acquire.sys.global.u32 t, [$1]; sub.u32 t, t, $2; shr.u32 $0, t, 31; }", "lr", "r")
def behind(address, value):  # type: ignore[no-untyped-def]
    """1 while the flag at ``address`` has not reached ``value``, else 0. What was written before it did is visible then."""
    return (ctypes.c_uint32.from_address(int(address)).value - int(value) & 0xFFFFFFFF) >> 31


@statement("fence.acq_rel.sys; red.relaxed.sys.global.add.u32 [$0], 1;", "l")
def raise_flag(address):  # type: ignore[no-untyped-def]
    """Adds 1 to the flag; what this thread wrote before is visible to who sees that, a DMA included."""
    cell = ctypes.c_uint32.from_address(int(address))
    cell.value = cell.value + 1


@statement("nanosleep.u32 $0;", "r")
def nap(nanoseconds):  # type: ignore[no-untyped-def]
    """Leaves the multiprocessor to others for about that long."""
    time.sleep(int(nanoseconds) * 1e-9)


@statement("atom.relaxed.gpu.global.add.u32 $0, [$1], 1;", "l", "r")
def take(address):  # type: ignore[no-untyped-def]
    """Adds 1 to the 32-bit number at ``address``, and gives what it was: no two threads get the same."""
    cell = ctypes.c_uint32.from_address(int(address))
    with _lock:
        cell.value = cell.value + 1
        return (cell.value - 1) & 0xFFFFFFFF


@statement("atom.acq_rel.gpu.global.add.u32 $0, [$1], 1;", "l", "r")
def join(address):  # type: ignore[no-untyped-def]
    """As :func:`take`; what who came before had written is visible, and so will be to others what this thread has: of its warp
    too, behind a ``syncwarp``."""
    return take(address)


@statement("st.relaxed.gpu.global.u32 [$0], $1;", "lr")
def tell(address, number):  # type: ignore[no-untyped-def]
    """Puts a number where other threads ask for it; it says nothing of what else this thread has written."""
    ctypes.c_uint32.from_address(int(address)).value = int(number)


@statement("ld.relaxed.gpu.global.u32 $0, [$1];", "l", "r")
def told(address):  # type: ignore[no-untyped-def]
    """What was put there last, as far as it has come here."""
    return ctypes.c_uint32.from_address(int(address)).value


@statement("red.relaxed.gpu.global.or.b32 [$0], 0x80000000;", "l")
def mark(address):  # type: ignore[no-untyped-def]
    """Sets the highest bit of the 32-bit number at ``address``; who takes of it after this thread has, sees that."""
    cell = ctypes.c_uint32.from_address(int(address))
    with _lock:
        cell.value = cell.value | 0x80000000
