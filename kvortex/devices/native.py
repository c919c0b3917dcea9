"""Calling C functions by address from compiled code that holds no GIL.

The addresses are plain integers handed in at run time, so that the compiled code can be cached on disk.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic  # type: ignore[untyped-decorator]
def call(typingctx: Any, address: Any, arguments: Any) -> Any:
    """``int f(...)`` at ``address`` with a tuple of integers, each widened to 64 bits; gives the int that it returns.

    On the 64-bit ABIs of x86 and Arm under Linux an integer or pointer argument of any width occupies one 64-bit
    register or stack slot, so widening all of them is exact.
    """
    if not isinstance(address, types.Integer) or not isinstance(arguments, types.BaseTuple):
        return None
    if not all(isinstance(kind, types.Integer) for kind in arguments):
        return None
    count = len(arguments)

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        word = ir.IntType(64)
        form = ir.FunctionType(ir.IntType(32), [word] * count)
        target = builder.inttoptr(context.cast(builder, values[0], signature.args[0], types.int64), form.as_pointer())
        words = [
            context.cast(builder, builder.extract_value(values[1], at), kind, types.int64)
            for at, kind in enumerate(signature.args[1])
        ]
        return builder.call(target, words)

    return types.int32(address, arguments), emit


@functools.cache
def memcpy_address() -> int:
    """Address of the C library's ``memcpy``."""
    return ctypes.cast(ctypes.CDLL(None).memcpy, ctypes.c_void_p).value or 0
