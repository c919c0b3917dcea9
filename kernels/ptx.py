"""A PTX statement as a function that is its own reference: the Python body runs in the simulator, the PTX in a kernel.

Every line of Numba's CUDA extension API is in this file.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar

from llvmlite import ir
from numba.cuda import types
from numba.cuda.core import config
from numba.cuda.extending import lower_builtin, type_callable

from kvortex.errors import BuildError

F = TypeVar("F", bound=Callable[..., Any])
WORDS = types.UniTuple(types.uint32, 4)
PAIR, TWO_WORDS = types.UniTuple(types.uint64, 2), types.UniTuple(types.uint32, 2)
EIGHT_WORDS, EIGHT = types.UniTuple(types.uint32, 8), types.UniTuple(types.float32, 8)
_TUPLES: dict[str, tuple[Any, str, int]] = {
    "v": (WORDS, "r", 4),
    "d": (PAIR, "l", 2),
    "p": (TWO_WORDS, "r", 2),
    "w": (EIGHT_WORDS, "r", 8),
    "e": (EIGHT, "f", 8),
}
_KINDS: dict[str, tuple[Any, Any]] = {
    "l": (types.uint64, ir.IntType(64)),
    "r": (types.uint32, ir.IntType(32)),
    "h": (types.uint16, ir.IntType(16)),
    "f": (types.float32, ir.FloatType()),
}


# Around both texts of a statement, until it is known for which GPU they are.
_NEW, _OLD, _END = "/*9.0*/", "/*before*/", "/*end*/"
_EITHER = re.compile("|".join(re.escape(each) for each in (_NEW, _OLD, _END)))


def text_for(ptx: str, compute_capability: tuple[int, int]) -> str:
    """PTX with those texts alone that are for such a GPU. BuildError where they cannot be told apart."""
    if _EITHER.findall(ptx) != [_NEW, _OLD, _END] * ptx.count(_NEW):
        raise BuildError("texts of statements for several GPUs are not whole in the compiler's PTX")
    parts = _EITHER.split(ptx)  # what is for all, new, old, and so on
    return "".join(parts[at] for at in range(len(parts)) if at % 3 != (2 if compute_capability >= (9, 0) else 1))


def _fits(kind: Any, letter: str) -> bool:
    if letter in _TUPLES:
        return bool(kind == _TUPLES[letter][0])
    return isinstance(kind, types.Float if letter == "f" else types.Integer)


def statement(
    text: str, arguments: str, result: str = "", *, pure: bool = False, together: bool = False, before: str | None = None
) -> Callable[[F], F]:
    """Gives a function a PTX statement for kernels.

    Parameters
    ----------
    text
        With ``$0``, ``$1``, ... for the result and then the arguments.
    arguments
        A letter for each: ``l``, ``r``, ``h`` for an integer in a register of 64, 32, 16 bits; ``f`` for a float32; ``v`` for
        a tuple of four 32-bit words, ``w`` for one of eight, ``e`` for one of eight float32, which take as many places.
    result
        A letter, or empty. ``h`` also receives bytes, for which PTX has no register; ``d`` is a tuple of two 64-bit numbers,
        ``p`` of two 32-bit words.
        A text of several statements writes results when it has read all arguments, since they may share registers.
    pure
        Whether it is arithmetic. Else it counts as one that touches memory and has effects, so its order among others is kept.
    together
        Whether all lanes of a warp must come to it at once.
    before
        Another text for what comes before compute capability 9.0, if that cannot do as ``text`` says: see :func:`text_for`.
    """
    both = text if before is None else f"{_NEW}{text}{_OLD}{before}{_END}"
    returned = _TUPLES[result][0] if result in _TUPLES else _KINDS[result][0] if result else types.void

    def decorate(function: F) -> F:
        function.ptx = text, arguments, result  # type: ignore[attr-defined]
        function.ptx_before = text if before is None else before  # type: ignore[attr-defined]
        if config.ENABLE_CUDASIM:
            return function

        @type_callable(function)
        def typing(context: Any) -> Callable[..., Any]:
            def typer(*given: Any) -> Any:
                fits = all(_fits(kind, letter) for kind, letter in zip(given, arguments, strict=True))
                return returned if fits else None

            typer.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
            return typer

        @lower_builtin(function, *[types.Any] * len(arguments))
        def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            operands, letters = [], []
            for value, kind, letter in zip(values, signature.args, arguments, strict=True):
                if letter in _TUPLES:
                    _, part, count = _TUPLES[letter]
                    operands += [builder.extract_value(value, at) for at in range(count)]
                    letters += [part] * count
                else:
                    operands.append(context.cast(builder, value, kind, _KINDS[letter][0]))
                    letters.append(letter)
            _, part, count = _TUPLES.get(result, (None, result, len(result)))
            outputs = [part] * count
            form = ir.VoidType()
            if outputs:
                one = _KINDS[part][1]
                form = ir.LiteralStructType([one] * count) if result in _TUPLES else one
            constraints = ",".join([*("=" + o for o in outputs), *letters, *([] if pure else ["~{memory}"])])
            types_of = ir.FunctionType(form, [_KINDS[letter][1] for letter in letters])
            asm = ir.InlineAsm(types_of, both, constraints, side_effect=not pure)
            made = builder.call(asm, operands, attrs=("convergent",) if together else ())
            if result in _TUPLES:
                parts = [builder.extract_value(made, at) for at in range(count)]
                return context.make_tuple(builder, signature.return_type, parts)
            return made if outputs else context.get_dummy_value()

        return function

    return decorate
