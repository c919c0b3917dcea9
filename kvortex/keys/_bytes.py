"""Eight bytes at a time, anywhere in a buffer, from compiled code."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic  # type: ignore[untyped-decorator]
def store_big_endian(typingctx: Any, buffer: Any, at: Any, number: Any) -> Any:
    """``buffer[at : at + 8] =`` the low 64 bits of a number, the highest byte first.

    Numba would store byte after byte, and the loads of 16 bytes that follow would wait for all of them.
    """

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, values[0]).data
        place = builder.bitcast(builder.gep(data, [values[1]]), ir.IntType(64).as_pointer())
        builder.store(builder.bswap(values[2]), place, align=1)
        return context.get_dummy_value()

    return types.void(buffer, types.int64, types.uint64), emit
