"""Loads and stores of one lane: 16 bytes, or 8, 4, 2, 1 where an address is not aligned to more.

Every line of Numba's CUDA extension API is in this file. Each function is its own reference: the plain Python body runs
in the simulator, and the registered PTX replaces it when a kernel is compiled.

Loads are ``ld.global.nc`` (nobody writes a kernel's source while it runs) without allocation in L1 (each byte is read
once); stores are plain, so that what a gather wrote is still in L2 when the DMA reads it. All are volatile in LLVM's
eyes, which keeps several loads in flight before the first store.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.core import config
from numba.cuda.extending import lower_builtin, type_callable

_I64 = ir.IntType(64)
_WORDS = types.UniTuple(types.uint32, 4)
# bytes -> PTX type, register constraint, LLVM type of the register, Numba type, ctypes type
_SCALARS: dict[int, tuple[str, str, Any, Any, Any]] = {
    8: ("u64", "l", ir.IntType(64), types.uint64, ctypes.c_uint64),
    4: ("u32", "r", ir.IntType(32), types.uint32, ctypes.c_uint32),
    2: ("u16", "h", ir.IntType(16), types.uint16, ctypes.c_uint16),
    1: ("u8", "h", ir.IntType(16), types.uint16, ctypes.c_uint8),
}


def load16(address):  # type: ignore[no-untyped-def]
    """The 16 bytes at ``address`` (a multiple of 16), as four 32-bit words."""
    return tuple((ctypes.c_uint32 * 4).from_address(int(address)))


def store16(address, words):  # type: ignore[no-untyped-def]
    """Puts the four words of :func:`load16` at ``address`` (a multiple of 16)."""
    (ctypes.c_uint32 * 4).from_address(int(address))[:] = words


def _scalar(nbytes: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    cell = _SCALARS[nbytes][4]

    def load(address):  # type: ignore[no-untyped-def]
        return cell.from_address(int(address)).value

    def store(address, value):  # type: ignore[no-untyped-def]
        cell.from_address(int(address)).value = value

    if not config.ENABLE_CUDASIM:
        _register_scalar(nbytes, load, store)
    return load, store


def _register_wide() -> None:
    words = [ir.IntType(32)] * 4

    @type_callable(load16)
    def type_load(context):  # type: ignore[no-untyped-def]
        return lambda address: _WORDS if isinstance(address, types.Integer) else None

    @lower_builtin(load16, types.Integer)
    def lower_load(context, builder, sig, args):  # type: ignore[no-untyped-def]
        form = ir.FunctionType(ir.LiteralStructType(words), [_I64])
        text = "ld.global.nc.L1::no_allocate.v4.u32 {$0,$1,$2,$3}, [$4];"
        line = ir.InlineAsm(form, text, "=r,=r,=r,=r,l", side_effect=True)
        loaded = builder.call(line, [context.cast(builder, args[0], sig.args[0], types.uint64)])
        return context.make_tuple(builder, sig.return_type, [builder.extract_value(loaded, i) for i in range(4)])

    @type_callable(store16)
    def type_store(context):  # type: ignore[no-untyped-def]
        return lambda address, value: types.void if isinstance(address, types.Integer) and value == _WORDS else None

    @lower_builtin(store16, types.Integer, types.UniTuple)
    def lower_store(context, builder, sig, args):  # type: ignore[no-untyped-def]
        line = ir.InlineAsm(
            ir.FunctionType(ir.VoidType(), [_I64, *words]),
            "st.global.v4.u32 [$0], {$1,$2,$3,$4};",
            "l,r,r,r,r,~{memory}",
            side_effect=True,
        )
        address = context.cast(builder, args[0], sig.args[0], types.uint64)
        builder.call(line, [address, *(builder.extract_value(args[1], i) for i in range(4))])
        return context.get_dummy_value()


def _register_scalar(nbytes: int, load: Callable[..., Any], store: Callable[..., Any]) -> None:
    ptx, register, llvm, number, _ = _SCALARS[nbytes]

    @type_callable(load)
    def type_load(context):  # type: ignore[no-untyped-def]
        return lambda address: number if isinstance(address, types.Integer) else None

    @lower_builtin(load, types.Integer)
    def lower_load(context, builder, sig, args):  # type: ignore[no-untyped-def]
        text = f"ld.global.nc.L1::no_allocate.{ptx} $0, [$1];"
        line = ir.InlineAsm(ir.FunctionType(llvm, [_I64]), text, f"={register},l", side_effect=True)
        return builder.call(line, [context.cast(builder, args[0], sig.args[0], types.uint64)])

    @type_callable(store)
    def type_store(context):  # type: ignore[no-untyped-def]
        return lambda address, value: types.void if isinstance(address, types.Integer) and value == number else None

    @lower_builtin(store, types.Integer, number)
    def lower_store(context, builder, sig, args):  # type: ignore[no-untyped-def]
        form = ir.FunctionType(ir.VoidType(), [_I64, llvm])
        line = ir.InlineAsm(form, f"st.global.{ptx} [$0], $1;", f"l,{register},~{{memory}}", side_effect=True)
        builder.call(line, [context.cast(builder, args[0], sig.args[0], types.uint64), args[1]])
        return context.get_dummy_value()


if not config.ENABLE_CUDASIM:
    _register_wide()
load8, store8 = _scalar(8)
load4, store4 = _scalar(4)
load2, store2 = _scalar(2)
load1, store1 = _scalar(1)
