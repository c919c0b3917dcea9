"""``njit`` whose machine code is kept on disk for as long as all that it was made of stays the same.

Numba's own cache asks for the time and the length of the file that a function is in. But what a function calls, and every
constant that it names, is compiled into it, from whichever file: after an update of a checkout, which writes anew only the
files that differ, callers went on with the old machine code of what they call. Here a function's stamp is a digest of its
bytecode, and of that of all compiled functions and the values of all constants that it refers to, of theirs in turn, and so
on. What is neither, as the intrinsics that emit machine code themselves, stands for the source of its module.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba.core.caching import IndexDataCacheFile

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), np.generic, np.dtype)


def njit(*, cache: bool = True, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """As ``numba.njit``.

    Parameters
    ----------
    cache
        Whether machine code is kept on disk, where Numba keeps its own.
    **options
        Of ``numba.njit``.
    """

    def compile_later(function: Callable[..., Any]) -> Any:
        made: Any = numba.njit(**options)(function)
        if cache and hasattr(made, "py_func"):  # with NUMBA_DISABLE_JIT it is the function itself
            made.enable_caching()
            made._cache._cache_file = _Files(made)
        return made

    return compile_later


class _Files(IndexDataCacheFile):  # type: ignore[misc]
    """Files of a function's machine code, with a stamp that Numba does not make. Its names there are no part of its manual."""

    def __init__(self, made: Any) -> None:
        super().__init__(made._cache.cache_path, made._cache._impl.filename_base, None)
        self._made = made

    @property
    def _source_stamp(self) -> str:  # asked for once a signature is known: by then all modules are there whole
        return stamp(self._made)

    @_source_stamp.setter
    def _source_stamp(self, nothing: None) -> None: ...


def stamp(function: Any) -> str:
    """Digest of all that a compiled function is made of, as hexadecimal digits."""
    digest = hashlib.sha256()
    for line in sorted(_parts(function)):
        digest.update(line.encode("utf-8", "backslashreplace") + b"\n")
    return digest.hexdigest()


def _parts(function: Any) -> set[str]:
    """One line for each function and value that is reached, with the name that it is reached by."""
    seen: dict[int, Any] = {}
    lines: set[str] = set()
    left = [function]
    while left:
        compiled = left.pop()
        if id(compiled) in seen:
            continue
        seen[id(compiled)] = compiled  # which keeps it, so that nothing else gets its number
        python = getattr(compiled, "py_func", compiled)
        options = sorted((name, str(value)) for name, value in getattr(compiled, "targetoptions", {}).items())
        home = f"{python.__module__}.{python.__qualname__}"
        lines.add(f"{home}: {_code(python.__code__)} {options} {_told(python.__defaults__)}")
        for name, value in _named(python):
            lines.add(f"{home}.{name} = {_told(value)}")
            left += [each for each in _flat(value) if _is_function(each)]
    return lines


def _named(function: Any) -> Iterator[tuple[str, Any]]:
    """What a function refers to outside itself: globals, variables of functions around it, and what it takes out of modules."""
    found = inspect.getclosurevars(function)
    yield from {**found.globals, **found.nonlocals}.items()
    for code in _codes(function.__code__):  # of generators and comprehensions, of which that tells nothing
        yield from ((name, function.__globals__[name]) for name in code.co_names if name in function.__globals__)
    for module in [value for value in found.globals.values() if isinstance(value, types.ModuleType)]:
        if _is_ours(module.__name__):  # names behind a dot are among the unbound
            taken = [name for name in found.unbound if hasattr(module, name)]
            yield from ((f"{module.__name__}.{name}", getattr(module, name)) for name in taken)


def _flat(value: Any) -> Iterator[Any]:
    """What is in tuples, or a value by itself."""
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from _flat(each)
    else:
        yield value


def _is_function(value: Any) -> bool:
    return hasattr(value, "py_func") or (isinstance(value, types.FunctionType) and _is_ours(value.__module__))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _codes(constant)


def _code(code: types.CodeType) -> str:
    constants = [_code(each) if isinstance(each, types.CodeType) else _told(each) for each in code.co_consts]
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_argcount, code.co_flags
    return f"{hashlib.sha256(code.co_code).hexdigest()} {constants} {names}"


def _told(value: Any) -> str:
    """A value in words that are the same in every process."""
    if isinstance(value, _PLAIN):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} [{', '.join(map(_told, value))}]"
    if isinstance(value, frozenset):
        return f"frozenset {sorted(map(_told, value))}"
    if isinstance(value, np.ndarray):
        return f"array {value.dtype!r} {value.shape} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"
    if isinstance(value, numba.types.Type):
        return f"type {value}"
    if isinstance(value, types.ModuleType):
        return f"module {value.__name__}"
    if hasattr(value, "py_func"):
        return f"compiled {value.py_func.__module__}.{value.py_func.__qualname__}"
    defined = getattr(value, "_defn", value)  # of an intrinsic
    home = getattr(defined, "__module__", None) or type(value).__module__
    name = getattr(defined, "__qualname__", type(value).__qualname__)
    return f"{home}.{name} {_source(home) if _is_ours(home) else ''}"


def _is_ours(module: str) -> bool:
    """Whether a module may change while Numba, whose version its own files tell, stays the same."""
    top = module.partition(".")[0]
    return top not in sys.stdlib_module_names and top not in ("numba", "numpy", "llvmlite")


@functools.cache
def _source(module: str) -> str:
    path = getattr(sys.modules.get(module), "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""
