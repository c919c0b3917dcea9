"""Single memory operations in compiled code that plain array accesses are not: atomic, ordered, or only a hint.

They are what lets readers look while a writer writes (``_reads.py``). LLVM may tear, repeat or reorder plain loads and
stores as it likes when nobody else is supposed to look; these it may not. On x86-64 and 64-bit Arm each is one instruction,
or none.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def _pointer(context: Any, builder: Any, signature: Any, values: Any, indices: int) -> Any:
    """Address of an element: the first argument is the array, then come its indices, which must not be negative."""
    kind = signature.args[0]
    array = context.make_array(kind)(context, builder, values[0])
    at = [context.cast(builder, values[1 + i], signature.args[1 + i], types.intp) for i in range(indices)]
    at += [context.get_constant(types.intp, 0)] * (kind.ndim - indices)
    shape = cgutils.unpack_tuple(builder, array.shape, kind.ndim)
    strides = cgutils.unpack_tuple(builder, array.strides, kind.ndim)
    return cgutils.get_item_pointer2(context, builder, array.data, shape, strides, kind.layout, at)


@intrinsic  # type: ignore[untyped-decorator]
def load(typingctx: Any, array: Any, row: Any, column: Any) -> Any:
    """``array[row, column]``, read whole and at this place in the program (relaxed atomic)."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = _pointer(context, builder, signature, values, 2)
        return builder.load_atomic(pointer, "monotonic", array.dtype.bitwidth // 8)

    return array.dtype(array, row, column), emit


@intrinsic  # type: ignore[untyped-decorator]
def load_item(typingctx: Any, array: Any, at: Any) -> Any:
    """``array[at]`` of a 1-d array, likewise."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = _pointer(context, builder, signature, values, 1)
        return builder.load_atomic(pointer, "monotonic", array.dtype.bitwidth // 8)

    return array.dtype(array, at), emit


@intrinsic  # type: ignore[untyped-decorator]
def store(typingctx: Any, array: Any, row: Any, column: Any, value: Any) -> Any:
    """``array[row, column] = value``, written whole and at this place in the program (relaxed atomic)."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = _pointer(context, builder, signature, values, 2)
        word = context.cast(builder, values[3], signature.args[3], array.dtype)
        builder.store_atomic(word, pointer, "monotonic", array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, row, column, value), emit


@intrinsic  # type: ignore[untyped-decorator]
def store_item(typingctx: Any, array: Any, at: Any, value: Any) -> Any:
    """``array[at] = value`` of a 1-d array, likewise."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = _pointer(context, builder, signature, values, 1)
        word = context.cast(builder, values[2], signature.args[2], array.dtype)
        builder.store_atomic(word, pointer, "monotonic", array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, at, value), emit


@intrinsic  # type: ignore[untyped-decorator]
def fence_acquire(typingctx: Any) -> Any:
    """No load from below is done before the loads above."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.fence("acquire")
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typingctx: Any, array: Any, row: Any) -> Any:
    """Has the cache line of ``array[row]`` on its way, and waits for nothing. No row is out of bounds."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        pointer = builder.bitcast(_pointer(context, builder, signature, values, 1), byte)
        form = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, form, "llvm.prefetch.p0i8")
        builder.call(function, [pointer, word(0), word(3), word(1)])  # to read, keep, data
        return context.get_dummy_value()

    return types.void(array, row), emit


@intrinsic  # type: ignore[untyped-decorator]
def lowest_bit(typingctx: Any, word: Any) -> Any:
    """Number of the lowest bit that is set in an int64 which is not 0."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.cttz(values[0], ir.IntType(1)(1))

    return types.int64(types.int64), emit
