"""Digests of records (:mod:`kvortex.digests.keys`) while a warp moves or reads a piece of one.

Each thread has two 64-bit sums. A warp goes 512 bytes, a row, with each of its 16-byte steps, so a thread stays in the same
four columns. It adds up words times their row's numbers, a sum for each column and half, and multiplies these by the columns'
numbers when a piece ends: two multiplications a word and half in the loop, of 32 bits by 32, and none of 64 by 64. The upper
halves of rows' numbers have sums of 32 bits to themselves, which join the others in the end: carries would cost an addition
each. Where addresses or the offset in the record allow only narrower lanes, parts of words are added by themselves.

``numbers`` is the address of a table in VRAM: ``C`` (the halves of each column side by side), then ``R``.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from kvortex.kernels.lane import all_here, early_cached16, store1, store2, store4, store8, store16
from kvortex.kernels.move import CONSTANT, FRESH, four_of, put_four
from kvortex.kernels.ptx import statement

_U32, _U64 = types.uint32, types.uint64
ROWS_AT = _U64(128 * 16)  # where R begins in the table
# Both numbers of a row as words, the lower one of each first. Loads through the constant path are moved to the front of a
# piece, where registers run out.
_row_of: Any = early_cached16
_lock = threading.Lock()  # of the simulator's threads


@statement("ld.global.nc.v2.u64 {$0,$1}, [$2];", "l", "d")
def _pair(address):  # type: ignore[no-untyped-def]
    """Two numbers of the table, which nobody writes."""
    return tuple((ctypes.c_uint64 * 2).from_address(int(address)))


@statement(
    "{ .reg .u32 a, b; mov.b64 {a, b}, $3; mad.lo.cc.u32 a, $1, $2, a; madc.hi.u32 b, $1, $2, b; mov.b64 $0, {a, b}; }",
    "rrl",
    "l",
    pure=True,
)
def _plus_product(word, other, total):  # type: ignore[no-untyped-def]
    """``total`` and all 64 bits of a product of two words: one instruction, of which the compiler would make three.

    By a carry, which becomes that instruction too, since products by ``mad.wide`` were added up apart where two of them go to
    one total: two additions more for each pair.
    """
    return (int(total) + int(word) * int(other)) & 0xFFFFFFFFFFFFFFFF


@statement("prmt.b32 $0, $1, 0, 0x0123;", "r", "r", pure=True)
def _turned(word):  # type: ignore[no-untyped-def]
    """A word with its bytes reversed."""
    return int.from_bytes(int(word).to_bytes(4, "little"), "big")


def _exchange(distance: int, value: str) -> str:
    halves = " ".join(f"shfl.sync.bfly.b32 {half}, {half}, {distance}, 31, 0xffffffff;" for half in "ab")
    return f"mov.b64 {{a, b}}, {value}; {halves} mov.b64 t, {{a, b}}; add.u64 s, s, t;"


# Leaves the sum over all lanes in ``s``, of the first number in lanes 0 to 15 and of the second in the others; where it belongs
# in ``t``; and in ``p`` whether this is the one lane of the 16 that puts it there.
_REDUCED = (
    ".reg .u64 s, t; .reg .u32 a, b; .reg .pred p; setp.ge.u32 p, $3, 16; selp.b64 s, $2, $1, p; selp.b64 t, $1, $2, p; "
    + " ".join([_exchange(16, "t"), *(_exchange(distance, "s") for distance in (8, 4, 2, 1))])
    + " shr.u32 b, $3, 4; mul.wide.u32 t, b, 8; add.u64 t, t, $0; and.b32 a, $3, 15; setp.eq.u32 p, a, 0;"
)
_ADD = "@p red.relaxed.gpu.global.add.u64 [t], s;"


@statement("{ " + _REDUCED + _ADD + " }", "lllr")
def add_up(address, first, second, lane):  # type: ignore[no-untyped-def]
    """Adds both sums of all lanes of a warp to the two numbers at ``address``. All lanes must call it."""
    cells = (ctypes.c_uint64 * 2).from_address(int(address))
    with _lock:
        cells[0] = cells[0] + int(first) & 0xFFFFFFFFFFFFFFFF
        cells[1] = cells[1] + int(second) & 0xFFFFFFFFFFFFFFFF


@statement(
    "{ .reg .pred q; " + _REDUCED + " setp.ne.and.u64 q, $4, 0, p; setp.eq.and.u64 p, $4, 0, p; @q st.global.u64 [t], s; "
    + _ADD + " }",
    "lllrl",
)  # fmt: skip
def settle(address, first, second, lane, alone):  # type: ignore[no-untyped-def]
    """:func:`add_up`; or, where ``alone`` is not 0, puts both sums at ``address``, which may be pinned memory of the host.

    Both lanes that write do so in one store of 16 bytes, and a plain one: the host looks when an event behind the kernel has
    passed, and what a kernel wrote, to the host's memory too, is there before such an event passes.
    """
    add_up(address, first, second, lane)  # no warp here: threads come one by one, to cells that were 0


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def columns_of(numbers, offset, lane):  # type: ignore[no-untyped-def]
    """Both numbers of the four columns that a lane of 16 bytes is in, where the warp begins at ``offset`` in the record."""
    at = numbers + ((offset * _U64(4) + _U64(lane) * _U64(64)) & _U64(0x7C0))
    a, b, c, d = _pair(at), _pair(at + _U64(16)), _pair(at + _U64(32)), _pair(at + _U64(48))
    return a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def no_sums():  # type: ignore[no-untyped-def]
    """Sums of four columns: of both halves by the lower words of rows' numbers, then by the upper words."""
    none, zero = _U64(0), _U32(0)
    return none, none, none, none, none, none, none, none, zero, zero, zero, zero, zero, zero, zero, zero


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def row16(s, words, row):  # type: ignore[no-untyped-def]
    """Adds the lane's 16 bytes of a row, whose two numbers are the four words ``row``."""
    p, q, r, t = _U32(words[0]), _U32(words[1]), _U32(words[2]), _U32(words[3])
    low, high = _U32(row[0]), _U32(row[1])
    a, b = _plus_product(low, p, s[0]), _plus_product(low, q, s[1])
    c, d = _plus_product(low, r, s[2]), _plus_product(low, t, s[3])
    i, j, k, l = _U32(s[8] + high * p), _U32(s[9] + high * q), _U32(s[10] + high * r), _U32(s[11] + high * t)  # noqa: E741
    p, q, r, t = _U32(_turned(p)), _U32(_turned(q)), _U32(_turned(r)), _U32(_turned(t))
    low, high = _U32(row[2]), _U32(row[3])
    e, f = _plus_product(low, p, s[4]), _plus_product(low, q, s[5])
    g, h = _plus_product(low, r, s[6]), _plus_product(low, t, s[7])
    m, n, o, u = _U32(s[12] + high * p), _U32(s[13] + high * q), _U32(s[14] + high * r), _U32(s[15] + high * t)
    return a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, u


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _joined(low, high):  # type: ignore[no-untyped-def]
    return low + (_U64(high) << _U64(32))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def both_sums(s, c):  # type: ignore[no-untyped-def]
    """The thread's two sums, of those of its columns and their numbers."""
    first = c[0] * _joined(s[0], s[8]) + c[2] * _joined(s[1], s[9]) + c[4] * _joined(s[2], s[10]) + c[6] * _joined(s[3], s[11])
    second = c[1] * _joined(s[4], s[12]) + c[3] * _joined(s[5], s[13])
    return first, second + c[5] * _joined(s[6], s[14]) + c[7] * _joined(s[7], s[15])


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def digest_word(first, second, value, offset, numbers):  # type: ignore[no-untyped-def]
    """A part of a word, or a whole one, that lies at ``offset`` in the record."""
    word = value << (_U64(8) * (offset & _U64(3)))
    column = _pair(numbers + ((offset * _U64(4)) & _U64(0x7F0)))
    row = _pair(numbers + ROWS_AT + (offset >> _U64(9)) * _U64(16))
    return first + row[0] * (column[0] * word), second + row[1] * (column[1] * _U64(_turned(word)))


def _digester(
    get16: Any,
    get8: Any,
    get4: Any,
    get2: Any,
    get1: Any,
    *,
    write: bool,
    held: bool,
    aligned: bool = False,
    few: bool = False,
) -> Callable[..., Any]:
    get_four = four_of(get16)

    @cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
    def four(dst, words, rows, s):  # type: ignore[no-untyped-def]
        n, p, q, r = _row_of(rows), _row_of(rows + _U64(16)), _row_of(rows + _U64(32)), _row_of(rows + _U64(48))
        if write:
            put_four(dst, words)
        return row16(row16(row16(row16(s, words[0], n), words[1], p), words[2], q), words[3], r)

    @cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
    def move(dst, src, nbytes, lane, offset, columns, numbers):  # type: ignore[no-untyped-def]
        first, second = _U64(0), _U64(0)
        align = _U64(0)
        if not aligned:
            align = src | offset
        if write:
            align = align | dst
        at = _U64(lane)
        if align & _U64(15) == _U64(0):
            at = at * _U64(16)
            rows = numbers + ROWS_AT + ((offset + at) >> _U64(9)) * _U64(16)
            s = no_sums()
            # Eight loads in flight: 4 KiB a warp and turn.
            while not few and at + _U64(8 * 512) <= nbytes + _U64(lane * 16):
                a, b = get_four(src + at), get_four(src + at + _U64(2048))
                if not write:
                    all_here()
                s = four(dst + at + _U64(2048), b, rows + _U64(64), four(dst + at, a, rows, s))
                at += _U64(4096)
                rows += _U64(128)
            while at + _U64(4 * 512) <= nbytes + _U64(lane * 16):  # four loads in flight: 2 KiB a warp and turn
                a = get_four(src + at)
                if not write:
                    all_here()
                s = four(dst + at, a, rows, s)
                at += _U64(2048)
                rows += _U64(64)
            while at + _U64(16) <= nbytes:
                words, row = get16(src + at), _row_of(rows)
                if write:
                    store16(dst + at, words)
                s = row16(s, words, row)
                at += _U64(512)
                rows += _U64(16)
            if held:
                first, second = both_sums(s, columns)
            else:
                first, second = both_sums(s, columns_of(numbers, offset, lane))
            at = (nbytes & ~_U64(15)) + _U64(lane)
        elif align & _U64(7) == _U64(0):
            at = at * _U64(8)
            while at + _U64(8) <= nbytes:
                value = _U64(get8(src + at))
                if write:
                    store8(dst + at, value)
                first, second = digest_word(first, second, value & _U64(0xFFFFFFFF), offset + at, numbers)
                first, second = digest_word(first, second, value >> _U64(32), offset + at + _U64(4), numbers)
                at += _U64(256)
            at = (nbytes & ~_U64(7)) + _U64(lane)
        elif align & _U64(3) == _U64(0):
            at = at * _U64(4)
            while at + _U64(4) <= nbytes:
                value = _U64(get4(src + at))
                if write:
                    store4(dst + at, value)
                first, second = digest_word(first, second, value, offset + at, numbers)
                at += _U64(128)
            at = (nbytes & ~_U64(3)) + _U64(lane)
        elif align & _U64(1) == _U64(0):
            at = at * _U64(2)
            while at + _U64(2) <= nbytes:
                value = _U64(get2(src + at))
                if write:
                    store2(dst + at, value)
                first, second = digest_word(first, second, value, offset + at, numbers)
                at += _U64(64)
            at = (nbytes & ~_U64(1)) + _U64(lane)
        while at < nbytes:
            value = _U64(get1(src + at))
            if write:
                store1(dst + at, value)
            first, second = digest_word(first, second, value, offset + at, numbers)
            at += _U64(32)
        return first, second

    return move  # type: ignore[no-any-return]


# The counterparts of those in kvortex.kernels.move, which also give a thread's two sums; and one that only reads. Those
# that end in ``held`` are given what :func:`columns_of` gives; the others, which have no registers for that, None, and ask when
# a piece ends.
# ``digest_aligned`` reads what begins at multiples of 16, in memory and in the record: narrower lanes would cost registers;
# and ``digest_few`` too, with no more than four loads in flight, for kernels that have no registers for eight. Who has shared
# memory to spare digests faster: :mod:`kvortex.kernels.digest_staged`.
digest_move_held: Any = _digester(*CONSTANT, write=True, held=True)
digest_move: Any = _digester(*CONSTANT, write=True, held=False)
digest_move_fresh: Any = _digester(*FRESH, write=True, held=False)
digest_read_held: Any = _digester(*FRESH, write=False, held=True)
digest_aligned: Any = _digester(*CONSTANT, write=False, held=False, aligned=True)
digest_few: Any = _digester(*CONSTANT, write=False, held=False, aligned=True, few=True)
