"""Halves of a lane's words that are marked, one behind another in shared memory.

Of eight words bit ``2 r`` of ``marks`` is of the lower half of word r, bit ``16 + 2 r`` of its upper half. Marked lower halves
lie at ``first``, in the order of words, and marked upper ones at ``other``; each takes 2 bytes.
"""

from __future__ import annotations

import ctypes

from kvortex.kernels.ptx import statement


def _putting() -> str:
    lines = ["{ .reg .b32 t, a, b; .reg .pred p; mov.b32 a, $9; mov.b32 b, $10;"]
    for r in range(8):
        lines += [
            f"and.b32 t, $8, {1 << 2 * r}; setp.ne.u32 p, t, 0; @p st.shared.u16 [a], ${r}; @p add.u32 a, a, 2;",
            f"and.b32 t, $8, {1 << 16 + 2 * r}; setp.ne.u32 p, t, 0; shr.u32 t, ${r}, 16;",
            "@p st.shared.u16 [b], t; @p add.u32 b, b, 2;",
        ]
    return " ".join([*lines, "}"])


def _getting() -> str:
    lines = ["{ .reg .b32 m, t, u, a, b; .reg .pred p; mov.b32 m, $8; mov.b32 a, $9; mov.b32 b, $10;"]
    for r in range(8):
        lines += [
            f"and.b32 t, m, {1 << 2 * r}; setp.ne.u32 p, t, 0; mov.b32 t, 0; @p ld.shared.u16 t, [a]; @p add.u32 a, a, 2;",
            f"and.b32 u, m, {1 << 16 + 2 * r}; setp.ne.u32 p, u, 0; mov.b32 u, 0; @p ld.shared.u16 u, [b];",
            f"@p add.u32 b, b, 2; prmt.b32 ${r}, t, u, 0x5410;",
        ]
    return " ".join([*lines, "}"])


def _marked(marks: int, shift: int) -> list[int]:
    """Words of which this half is marked."""
    return [r for r in range(8) if int(marks) >> shift + 2 * r & 1]


@statement(_putting(), "wrrr")
def put_marked(words, marks, first, other):  # type: ignore[no-untyped-def]
    """Writes them."""
    for at, shift in ((int(first), 0), (int(other), 16)):
        for k, r in enumerate(_marked(marks, shift)):
            ctypes.c_uint16.from_address(at + 2 * k).value = int(words[r]) >> shift & 0xFFFF


@statement(_getting(), "rrr", "w")
def get_marked(marks, first, other):  # type: ignore[no-untyped-def]
    """Eight words of them, with 0 in halves that are not marked."""
    words = [0] * 8
    for at, shift in ((int(first), 0), (int(other), 16)):
        for k, r in enumerate(_marked(marks, shift)):
            words[r] |= ctypes.c_uint16.from_address(at + 2 * k).value << shift
    return tuple(words)
