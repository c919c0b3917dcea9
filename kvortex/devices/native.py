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


@intrinsic  # type: ignore[untyped-decorator]
def store_tuple(typingctx: Any, address: Any, values: Any, like: Any) -> Any:
    """Writes a tuple of integers and arrays to an address, for :func:`load_tuple`; gives the bytes that it takes.

    Does not compile where ``values`` are of other types than ``like``, which is what they will be loaded as.

    Arrays are borrowed: whoever stored them keeps them, and their memory, until they were loaded and used.
    """
    if not isinstance(address, types.Integer) or not isinstance(values, types.BaseTuple) or values != like:
        return None
    if not all(isinstance(kind, (types.Integer, types.Array)) for kind in values):
        return None

    def emit(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        value = given[1]
        for at, kind in enumerate(signature.args[1]):
            if isinstance(kind, types.Array):  # without its owner, whose count must not change behind the owner's back
                array = context.make_array(kind)(context, builder, value=builder.extract_value(value, at))
                array.meminfo, array.parent = (ir.Constant(field.type, None) for field in (array.meminfo, array.parent))
                value = builder.insert_value(value, array._getvalue(), at)
        number = context.cast(builder, given[0], signature.args[0], types.int64)
        builder.store(value, builder.inttoptr(number, value.type.as_pointer()), align=8)
        return context.get_constant(types.int64, context.get_abi_sizeof(value.type))

    return types.int64(address, values, like), emit


@intrinsic  # type: ignore[untyped-decorator]
def load_tuple(typingctx: Any, address: Any, like: Any) -> Any:
    """The tuple that :func:`store_tuple` wrote; ``like`` is one of the same types."""
    if not isinstance(address, types.Integer) or not isinstance(like, types.BaseTuple):
        return None

    def emit(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        number = context.cast(builder, given[0], signature.args[0], types.int64)
        return builder.load(builder.inttoptr(number, given[1].type.as_pointer()), align=8)

    return like(address, like), emit


@intrinsic  # type: ignore[untyped-decorator]
def release(typingctx: Any) -> Any:
    """Whoever sees a store from below sees the stores above, also on processors that would not keep that order."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.fence("release")
        return context.get_dummy_value()

    return types.void(), emit


@functools.cache
def libc_address(name: str) -> int:
    """Address of a function of the C library."""
    return ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value or 0


def memcpy_address() -> int:
    """Address of the C library's ``memcpy``."""
    return libc_address("memcpy")
