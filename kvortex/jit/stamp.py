"""What a compiled function is made of, in one digest: its bytecode, and all that this refers to, and that in turn refers to.

A reference is a name in a function's bytecode, or in that of a function in it: a global, a variable of a function around it,
or, of whatever modules these are, what has such a name there. That may be more than what is referred to. Functions and
intrinsics are followed by their own bytecode, constants count by their values, classes by their fields and their functions.
Nothing is read from files: they may have changed since they were imported. For a value of a kind that is not known here there
is no stamp. What ``numba.extending.overload`` puts behind a name is not seen.
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core.dispatcher import Dispatcher
from numba.core.extending import _Intrinsic

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), np.dtype)
# Types of arguments that have no others in them.
_LEAVES = (numba.types.Number, numba.types.Boolean, numba.types.NoneType, numba.types.UnicodeType, numba.types.RawPointer)
_IMPORT = dis.opmap["IMPORT_NAME"]
_MADE_FOR_CLASSES = ("__module__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__firstlineno__",
                     "__static_attributes__", "__slots__", "__match_args__", "__orig_bases__", "__parameters__")  # fmt: skip


class UnknownError(TypeError):
    """Something that is not known here is referred to."""


def stamp(function: Any) -> str:
    """Digest of all that a compiled function is made of, as hexadecimal digits; the same in every process.

    Raises
    ------
    UnknownError
        Of something that it refers to nobody knows here what it is made of.
    """
    return _Digests().of_function(function)


def reached(function: Any) -> list[Any]:
    """A compiled function, and all others that :func:`stamp` comes to."""
    digests = _Digests()
    digests.of_function(function)
    return [each for each, _ in digests.known.values() if isinstance(each, Dispatcher)]


def layouts(kinds: Iterable[Any]) -> tuple[Any, ...]:
    """Names and fields of the named tuples among types of Numba's, and within these: types themselves have the names alone.

    Raises
    ------
    UnknownError
        There may be named tuples in one that nobody knows of here.
    """
    found: list[Any] = []
    for kind in kinds:
        if isinstance(kind, numba.types.BaseNamedTuple):
            named = kind.instance_class
            found.append((named.__module__, named.__qualname__, named._fields))
        if isinstance(kind, numba.types.BaseTuple):
            found += layouts(kind.types)
        elif isinstance(kind, (numba.types.Array, numba.types.CPointer)):
            found += layouts([kind.dtype])
        elif isinstance(kind, numba.types.Omitted):
            found += layouts([numba.typeof(kind.value)])
        elif not isinstance(kind, _LEAVES):
            raise UnknownError(f"an argument of type {kind}")
    return tuple(found)


class _Digests:
    """Of the functions and values of one stamp; who is come to again, while it is looked at, stands for itself by its name."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Any, str]] = {}  # with what it is of, lest something else gets its number

    def of_function(self, function: Any) -> str:
        found = self.known.get(id(function))
        if found is not None:
            return found[1]
        python = _python(function)
        home = f"{python.__module__}.{python.__qualname__}"
        self.known[id(function)] = function, home
        options = [getattr(function, name, None) for name in ("targetoptions", "locals")]
        lines = [home, self.told(options), _code(python.__code__)]
        lines += [self.told(python.__defaults__), self.told(python.__kwdefaults__)]
        lines += [f"{name} = {self.told(value)}" for name, value in _named(python)]
        self.known[id(function)] = function, _digest(lines)
        return self.known[id(function)][1]

    def told(self, value: Any) -> str:
        """A value in words that are the same in every process; UnknownError where there are none."""
        if type(value) in _PLAIN or isinstance(value, np.dtype):
            return f"{type(value).__name__} {value!r}"
        if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
            content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
            return f"{type(value).__name__} {value.dtype!r} {value.shape} {content}"
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return f"{self.told(type(value))} {self.told(list(value))}"
        if type(value) in (tuple, list):
            return f"{type(value).__name__} [{', '.join(map(self.told, value))}]"
        if type(value) is dict:
            return f"dict {[(self.told(key), self.told(each)) for key, each in value.items()]}"
        if type(value) in (set, frozenset):
            return f"set {sorted(map(self.told, value))}"
        if isinstance(value, enum.Enum):
            return f"{type(value).__module__}.{type(value).__qualname__}.{value.name} {self.told(value.value)}"
        if isinstance(value, (numba.types.Type, ir.Type)):
            return f"type {value}"
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}"
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, (Dispatcher, _Intrinsic, types.FunctionType)):
            return f"function {self._function(value)}"
        if isinstance(value, (types.BuiltinFunctionType, np.ufunc)):
            return f"builtin {getattr(value, '__module__', '')}.{value.__name__}"
        wrapped = vars(value).get("__wrapped__") if hasattr(value, "__dict__") else None
        if isinstance(wrapped, types.FunctionType):  # of functools.cache
            return f"wrapped {type(value).__qualname__} {self._function(wrapped)}"
        raise UnknownError(f"{type(value).__module__}.{type(value).__qualname__}")

    def _function(self, value: Any) -> str:
        python = _python(value)
        return self.of_function(value) if _is_ours(python.__module__) else f"{python.__module__}.{python.__qualname__}"

    def _class(self, kind: type) -> str:
        home = f"class {kind.__module__}.{kind.__qualname__}"
        if id(kind) in self.known or not _is_ours(kind.__module__):
            return self.known.get(id(kind), (kind, home))[1]
        self.known[id(kind)] = kind, home
        lines = [self.told(list(kind.__bases__))]
        if issubclass(kind, enum.Enum):
            lines += map(self.told, kind)
        elif hasattr(kind, "_fields"):
            lines.append(self.told(kind._fields))
        else:
            lines += [f"{name} = {self.told(value)}" for name, value in vars(kind).items() if name not in _MADE_FOR_CLASSES]
        self.known[id(kind)] = kind, f"{home} {_digest(lines)}"
        return self.known[id(kind)][1]


@functools.cache
def _code(code: types.CodeType) -> str:
    """Bytecode, which never changes, in words."""
    told = _Digests().told
    constants = [_code(each) if isinstance(each, types.CodeType) else told(each) for each in code.co_consts]
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_flags
    counts = code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount
    jumps = getattr(code, "co_exceptiontable", b"")
    return f"{hashlib.sha256(code.co_code).hexdigest()} {jumps!r} {constants} {names} {counts}"


@functools.cache
def _names(code: types.CodeType) -> tuple[list[str], list[str]]:
    """Names in bytecode, in order, and of them those that it imports by itself."""
    codes = list(_codes(code))
    texts = {each for part in codes for each in part.co_consts if isinstance(each, str) and each.isidentifier()}  # for getattr
    importing = [part for part in codes if _IMPORT in part.co_code[::2]]
    imports = {each.argval for part in importing for each in dis.get_instructions(part) if each.opname == "IMPORT_NAME"}
    return sorted({name for part in codes for name in part.co_names} | texts), sorted(imports)


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode("utf-8", "backslashreplace")).hexdigest()


def _python(function: Any) -> Any:
    """The Python function of a compiled one, or of an intrinsic; else the function itself."""
    if isinstance(function, Dispatcher):
        return function.py_func
    return function._defn if isinstance(function, _Intrinsic) else function


def _named(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function refers to outside itself, and the name of it."""
    names, imports = _names(function.__code__)
    found = [(name, function.__globals__[name]) for name in names if name in function.__globals__]
    found += [(name, sys.modules.get(name)) for name in imports]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found.append((name, cell.cell_contents))
        except ValueError:  # not there yet
            continue
    modules: list[types.ModuleType] = []
    while found:
        name, value = found.pop()
        yield name, value
        if isinstance(value, types.ModuleType) and _is_ours(value.__name__) and not any(value is each for each in modules):
            modules.append(value)
            here = vars(value)
            if "__getattr__" in here:
                raise UnknownError(f"names of {value.__name__}, which makes them up")
            found += [(f"{value.__name__}.{each}", here[each]) for each in names if each in here]


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
