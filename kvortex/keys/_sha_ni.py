"""SHA-256's compression by the SHA instructions of x86, for compiled code.

Each of the three instructions is a line of inline assembly rather than one of LLVM's intrinsics: LLVM ends the process
where it is to compile such an intrinsic for a CPU that lacks the instruction, and assembles a line for any. So one
compiled function may hold both ways, be cached on disk, and be loaded on another machine; which way it goes is told at
run time, by :func:`available`.

How the instructions make up a compression: Gulley et al., "Intel SHA Extensions", 2013.
"""

from __future__ import annotations

import functools
import platform
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kvortex.keys._constants import ROUND_CONSTANTS

_FOUR = ir.VectorType(ir.IntType(32), 4)
_WORD = ir.IntType(64)
# Whatever calls the function below assembles its lines again, also where it comes from a cache on disk itself.
binding.initialize_native_asmparser()
# In AT&T's order: the target, which is also the first source, comes last.
_ROUNDS = ("sha256rnds2 %xmm0, $2, $0", "=x,0,x,{xmm0}")
_SCHEDULE_1 = ("sha256msg1 $2, $0", "=x,0,x")
_SCHEDULE_2 = ("sha256msg2 $2, $0", "=x,0,x")
# None of the three has an AVX form, and beside AVX code that left the upper halves of registers in use each takes a
# hundred times as long.
_CLEAN = ("vzeroupper", ",".join(f"~{{ymm{number}}}" for number in range(16)))


@functools.cache
def available() -> bool:
    """Whether the CPU that this process runs on has the instructions that :func:`compress` is made of."""
    if not _is_x86():
        return False
    try:
        features = binding.get_host_cpu_features()
    except RuntimeError:  # LLVM cannot tell
        return False
    return bool(features.get("sha") and features.get("avx"))


@intrinsic  # type: ignore[untyped-decorator]
def compress(typingctx: Any, state: Any, data: Any, at: Any, blocks: Any) -> Any:
    """Takes ``blocks`` (at least 1) times 64 bytes of ``data`` from ``at`` on into ``state``, (8,) uint32.

    Only to be called where :func:`available` says so. On other architectures it compiles to nothing.
    """

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if _is_x86():
            state, data = (context.make_array(signature.args[k])(context, builder, values[k]).data for k in range(2))
            _compress(builder, state, data, values[2], values[3])
        return context.get_dummy_value()

    return types.void(state, data, types.int64, types.int64), emit


def _is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def _compress(builder: Any, state: Any, data: Any, at: Any, blocks: Any) -> None:
    _assembly(builder, ir.VoidType(), *_CLEAN)
    ends = builder.bitcast(state, _FOUR.as_pointer())
    halves = [builder.load(builder.gep(ends, [_WORD(half)]), align=4) for half in range(2)]
    # The instructions want the state as FEBA and HGDC, from the lowest lane on.
    before = _picked(builder, *halves, 5, 4, 1, 0), _picked(builder, *halves, 7, 6, 3, 2)
    entry, loop, done = builder.block, builder.append_basic_block("sha256"), builder.append_basic_block("sha256.done")
    builder.branch(loop)
    builder.position_at_end(loop)
    count, feba, hgdc = (builder.phi(kind) for kind in (_WORD, _FOUR, _FOUR))
    place = builder.add(at, builder.mul(count, _WORD(64)))
    message = _message(builder, builder.bitcast(builder.gep(data, [place]), _FOUR.as_pointer()))
    after = _rounds(builder, feba, hgdc, message)
    following = builder.add(count, _WORD(1))
    for phi, first, next_ in zip((count, feba, hgdc), (_WORD(0), *before), (following, *after), strict=True):
        phi.add_incoming(first, entry)
        phi.add_incoming(next_, loop)
    builder.cbranch(builder.icmp_signed("<", following, blocks), loop, done)
    builder.position_at_end(done)
    builder.store(_picked(builder, *after, 3, 2, 7, 6), ends, align=4)
    builder.store(_picked(builder, *after, 1, 0, 5, 4), builder.gep(ends, [_WORD(1)]), align=4)


def _message(builder: Any, source: Any) -> list[Any]:
    """The sixteen big-endian words of a block, four to a vector."""
    swap = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_FOUR, [_FOUR]), "llvm.bswap.v4i32")
    return [builder.call(swap, [builder.load(builder.gep(source, [_WORD(k)]), align=1)]) for k in range(4)]


def _rounds(builder: Any, feba: Any, hgdc: Any, message: list[Any]) -> tuple[Any, Any]:
    """All 64 rounds, four at a time, and the sum with the state before them."""
    first, second = feba, hgdc
    for at in range(0, 64, 4):
        constants = ir.Constant(_FOUR, [ir.IntType(32)(constant) for constant in ROUND_CONSTANTS[at : at + 4]])
        words = builder.add(message[0], constants)
        hgdc = _assembly(builder, _FOUR, *_ROUNDS, hgdc, feba, words)
        feba = _assembly(builder, _FOUR, *_ROUNDS, feba, hgdc, _picked(builder, words, words, 2, 3, 0, 0))
        if at < 48:
            ahead = builder.add(
                _assembly(builder, _FOUR, *_SCHEDULE_1, message[0], message[1]),
                _picked(builder, message[2], message[3], 1, 2, 3, 4),
            )
            message.append(_assembly(builder, _FOUR, *_SCHEDULE_2, ahead, message[3]))
        del message[0]
    return builder.add(first, feba), builder.add(second, hgdc)


def _assembly(builder: Any, result: Any, line: str, constraints: str, *operands: Any) -> Any:
    form = ir.FunctionType(result, [operand.type for operand in operands])
    return builder.call(ir.InlineAsm(form, line, constraints, side_effect=not operands), operands)


def _picked(builder: Any, one: Any, other: Any, *lanes: int) -> Any:
    return builder.shuffle_vector(one, other, ir.Constant(_FOUR, [ir.IntType(32)(lane) for lane in lanes]))
