"""Operations of the processor that no other thread can come between, on one element of a 1-d int64 array."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_ORDER = "seq_cst"  # what other threads see of the memory around it is in order, too


def _element(context: Any, builder: Any, signature: Any, values: Any) -> tuple[Any, list[Any]]:
    """Address of ``array[at]``, which is not checked, and the other arguments as int64."""
    kind, index = signature.args[:2]
    array = context.make_array(kind)(context, builder, values[0])
    at = context.cast(builder, values[1], index, types.intp)
    pointer = cgutils.get_item_pointer(context, builder, kind, array, [at])
    others = [context.cast(builder, *pair, types.int64) for pair in zip(values[2:], signature.args[2:], strict=True)]
    return pointer, others


@intrinsic  # type: ignore[untyped-decorator]
def fetch_add(typingctx: Any, array: Any, at: Any, value: Any) -> Any:
    """Adds to ``array[at]``, and gives what was there before; with a value of 0, an ordered load."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer, (added,) = _element(context, builder, signature, values)
        return builder.atomic_rmw("add", pointer, added, _ORDER)

    return types.int64(array, at, value), emit


@intrinsic  # type: ignore[untyped-decorator]
def exchange(typingctx: Any, array: Any, at: Any, value: Any) -> Any:
    """Writes ``array[at]``, and gives what was there before: an ordered store."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer, (written,) = _element(context, builder, signature, values)
        return builder.atomic_rmw("xchg", pointer, written, _ORDER)

    return types.int64(array, at, value), emit


@intrinsic  # type: ignore[untyped-decorator]
def compare_and_set(typingctx: Any, array: Any, at: Any, expected: Any, value: Any) -> Any:
    """Writes ``array[at]`` where it is ``expected``, and says whether it was."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer, (old, new) = _element(context, builder, signature, values)
        return builder.extract_value(builder.cmpxchg(pointer, old, new, _ORDER, _ORDER), 1)

    return types.boolean(array, at, expected, value), emit
