"""What a compiled function is made of, in one digest: its bytecode, and all that this refers to, and that in turn refers to.

A reference is a name in a function's bytecode, or in that of a function in it: a global, a variable of a function around it,
or, of whatever modules these are, what has such a name there. That may be more than what is referred to, and is never less.
Functions and intrinsics are followed by their own bytecode, constants count by their values, classes by their fields and their
functions. Nothing is read from files: they may have changed since they were imported.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import numba
import numpy as np

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), np.generic, np.dtype)
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]+")


def stamp(function: Any) -> str:
    """Digest of all that a compiled function is made of, as hexadecimal digits; the same in every process."""
    return _Digests().of_function(function)


def layouts(kinds: Iterable[Any]) -> tuple[Any, ...]:
    """Names and fields of the named tuples among types of Numba's, and within these. Its own key tells their names alone."""
    found: list[Any] = []
    for kind in kinds:
        named = getattr(kind, "instance_class", None)
        if named is not None:
            found.append((named.__module__, named.__qualname__, named._fields))
        inner = getattr(kind, "types", ()) or (getattr(kind, "dtype", None),)
        found += layouts(each for each in inner if isinstance(each, numba.types.Type) and each is not kind)
    return tuple(found)


class _Digests:
    """Of the functions and values of one stamp; who is come to again, while it is looked at, stands for itself by its name."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, str]] = {}  # with what it is of, lest something else gets its number

    def of_function(self, function: Any) -> str:
        python = _python(function)
        found = self._known.get(id(python))
        if found is not None:
            return found[1]
        home = f"{python.__module__}.{python.__qualname__}"
        self._known[id(python)] = python, home
        options = sorted((name, str(value)) for name, value in getattr(function, "targetoptions", {}).items())
        lines = [home, str(options), self._code(python.__code__), self.told(python.__defaults__)]
        lines += [self.told(python.__kwdefaults__)]
        lines += [f"{name} = {self.told(value)}" for name, value in _named(python)]
        digest = hashlib.sha256("\n".join(lines).encode("utf-8", "backslashreplace")).hexdigest()
        self._known[id(python)] = python, digest
        return digest

    def told(self, value: Any) -> str:
        """A value in words that are the same in every process."""
        if isinstance(value, _PLAIN):
            return f"{type(value).__name__} {value!r}"
        if isinstance(value, (tuple, list)):
            return f"{type(value).__name__} [{', '.join(map(self.told, value))}]"
        if isinstance(value, dict):
            return f"dict {[(self.told(key), self.told(each)) for key, each in value.items()]}"
        if isinstance(value, (set, frozenset)):
            return f"set {sorted(map(self.told, value))}"
        if isinstance(value, np.ndarray):
            return f"array {value.dtype!r} {value.shape} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}"
        if isinstance(_python(value), types.FunctionType) and _is_ours(_python(value).__module__):
            return f"function {self.of_function(value)}"
        if isinstance(value, functools.partial):
            return f"partial {self.told(value.func)} {self.told(value.args)} {self.told(value.keywords)}"
        if isinstance(value, type) and _is_ours(value.__module__):
            return self._class(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return f"{self.told(type(value))} {self.told([getattr(value, each.name) for each in dataclasses.fields(value)])}"
        return f"{type(value).__module__}.{type(value).__qualname__} {_ADDRESS.sub('', repr(value))}"

    def _class(self, kind: type) -> str:
        if id(kind) in self._known:
            return self._known[id(kind)][1]
        self._known[id(kind)] = kind, f"class {kind.__module__}.{kind.__qualname__}"
        mine = [(name, value) for name, value in vars(kind).items() if not name.startswith("__") or callable(value)]
        told = [f"{name} = {self.told(value)}" for name, value in mine if not isinstance(value, types.GetSetDescriptorType)]
        fields = getattr(kind, "_fields", ())
        digest = hashlib.sha256("\n".join([str(fields), *told]).encode("utf-8", "backslashreplace")).hexdigest()
        self._known[id(kind)] = kind, f"{self._known[id(kind)][1]} {digest}"
        return self._known[id(kind)][1]

    def _code(self, code: types.CodeType) -> str:
        constants = [self._code(each) if isinstance(each, types.CodeType) else self.told(each) for each in code.co_consts]
        names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_argcount, code.co_flags
        return f"{hashlib.sha256(code.co_code).hexdigest()} {constants} {names}"


def _python(value: Any) -> Any:
    """The Python function of a compiled one, or of an intrinsic; else the value itself."""
    return getattr(value, "py_func", None) or getattr(value, "_defn", value)


def _named(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function refers to outside itself, and the name of it."""
    names = sorted({name for code in _codes(function.__code__) for name in code.co_names})
    found = [(name, function.__globals__[name]) for name in names if name in function.__globals__]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found.append((name, cell.cell_contents))
        except ValueError:  # not there yet
            continue
    modules: list[types.ModuleType] = []
    while found:
        name, value = found.pop()
        yield name, value
        if isinstance(value, types.ModuleType) and _is_ours(value.__name__) and value not in modules:
            modules.append(value)
            found += [(f"{value.__name__}.{each}", getattr(value, each)) for each in names if hasattr(value, each)]


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's bytecode, and that of functions and comprehensions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _is_ours(module: str | None) -> bool:
    """Whether a module may change while Numba, whose version its files tell, stays the same."""
    top = (module or "").partition(".")[0]
    return top not in sys.stdlib_module_names and top not in ("numba", "numpy", "llvmlite")
