"""Quotients of 32-bit numbers.

Python's own asks whether the divisor is 0, and keeps what the variable had before if it is: a register over every loop around
it, of which none may be left.
"""

from __future__ import annotations

from kvortex.kernels.ptx import statement


@statement("div.u32 $0, $1, $2;", "rr", "r", pure=True)
def quotient(number, divisor):  # type: ignore[no-untyped-def]
    """How often a divisor, at least 1, goes into a number."""
    return int(number) // int(divisor)
