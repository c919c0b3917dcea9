"""C functions called by address from compiled code: any number of integers, exact, without the GIL, cached on disk."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numba
import numpy as np
import pytest
from numba import njit

from kvortex.devices.native import call, memcpy_address

ROOT = Path(__file__).resolve().parents[2]


@njit(nogil=True)
def copy(memcpy, target, source, nbytes):
    return call(memcpy, (target, source, nbytes))


@njit(nogil=True)
def eleven(function, a, b, c, d, e, f, g, h, i, j, k):
    return call(function, (a, b, c, d, e, f, g, h, i, j, k))


@njit(nogil=True)
def one(function, a):
    return call(function, (a,))


@njit(nogil=True)
def none(function):
    return call(function, ())


@pytest.mark.parametrize("nbytes", [0, 1, 7, 4096, 100_003])
def test_memcpy(nbytes: int) -> None:
    source = np.random.default_rng(nbytes).integers(0, 256, nbytes + 2, np.uint8)
    target = np.zeros_like(source)
    copy(memcpy_address(), target.ctypes.data + 1, source.ctypes.data + 1, nbytes)
    wanted = np.zeros_like(source)
    wanted[1 : 1 + nbytes] = source[1 : 1 + nbytes]
    assert (target == wanted).all()


def test_the_address_of_memcpy_is_found_once() -> None:
    assert memcpy_address() == memcpy_address() > 0


def test_eleven_arguments_of_every_width_arrive_exactly() -> None:
    """As many as a kernel launch has: five of them do not fit in registers on x86, three on Arm."""
    seen: list[tuple[int, ...]] = []
    prototype = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_longlong] * 11)
    function = prototype(lambda *values: seen.append(values) or -7)
    address = ctypes.cast(function, ctypes.c_void_p).value
    values = [
        np.int64(-1),
        np.int64((1 << 40) + 3),
        np.int32(-5),
        np.uint32(0xFFFF_FFFF),
        np.int8(-128),
        np.uint8(255),
        np.int16(-2),
        np.uint64(0x7FFF_FFFF_FFFF_FFFF),
        np.int64(-(1 << 63)),
        np.int32(1 << 30),
        np.uint16(65535),
    ]
    assert eleven(address, *values) == -7
    assert seen == [tuple(int(value) for value in values)]


def test_unsigned_64_bit_arguments_and_no_arguments() -> None:
    seen: list[int] = []
    taker = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_ulonglong)(lambda value: seen.append(value) or 2)
    assert one(ctypes.cast(taker, ctypes.c_void_p).value, np.uint64(0xFFFF_0000_0000_0001)) == 2
    assert seen == [0xFFFF_0000_0000_0001]
    giver = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 719)
    assert none(ctypes.cast(giver, ctypes.c_void_p).value) == 719


@pytest.mark.parametrize("code", [0, 1, 999, -1, 2**31 - 1, -(2**31)])
def test_the_result_is_a_32_bit_int(code: int) -> None:
    function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_longlong)(lambda _: code)
    assert one(ctypes.cast(function, ctypes.c_void_p).value, 0) == code


@pytest.mark.parametrize("value", [1.5, True, (1, 2)])
def test_what_is_no_integer_is_refused_by_the_compiler(value: object) -> None:
    with pytest.raises(numba.TypingError):
        one(memcpy_address(), value)


def test_no_gil_is_held_during_a_call() -> None:
    usleep = ctypes.cast(ctypes.CDLL(None).usleep, ctypes.c_void_p).value
    one(usleep, 1)
    sleeper = threading.Thread(target=one, args=(usleep, 400_000))
    sleeper.start()
    time.sleep(0.01)
    assert sleeper.is_alive(), "this thread could not run while the C function did"
    sleeper.join()


CACHED = """
import ctypes, sys
from numba import njit
from kvortex.devices.native import call

@njit(nogil=True, cache=True)
def add(function, a, b):
    return call(function, (a, b))

function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)(lambda a, b: a + b)
padding = [ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0) for _ in range(int(sys.argv[1]))]
other = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)(lambda a, b: a * b)
address = [ctypes.cast(f, ctypes.c_void_p).value for f in (function, other)]
print(add(address[0], 6, 7), add(address[1], 6, 7), sum(add.stats.cache_hits.values()), sum(add.stats.cache_misses.values()))
"""


def test_compiled_code_is_cached_across_processes(tmp_path: Path) -> None:
    """Addresses are arguments, so a later process, with other addresses, runs what an earlier one compiled."""
    script = tmp_path / "cached.py"
    script.write_text(CACHED)
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}

    def run(argument: str) -> str:
        command = [sys.executable, str(script), argument]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout.strip()

    assert run("0") == "13 42 0 1"
    assert run("100") == "13 42 1 0"
