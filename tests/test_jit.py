"""Machine code on disk is of what is compiled now, however files came to differ."""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

import kvortex
from kvortex import jit
from kvortex.index import lru, policies
from kvortex.jit import kept, stamp

LOWEST = """
CONSTANT = 7

def number():
    return CONSTANT
"""
LOW = """
import enum
import functools
from typing import NamedTuple

import lowest
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from made_with import njit

LIMIT, PAIR = 1000, (1, 2)
TABLE = np.array([1, 2, 3])
FURTHER = 4
KIND = types.uint16

@njit()
def inner(x):
    return x + 1

@njit(inline="always")
def inlined(x):
    return x + 11

@njit()
def middle(x):
    return inner(x)

@njit()
def shadowed(x):
    return x + 21

BOTH = (middle, middle)

def around(count):
    @njit()
    def function(x):
        return x + count

    return function

FIRST, OTHER = around(5), around(8)

@intrinsic
def emitted(context):
    def emit(context, builder, signature, values):
        return ir.Constant(ir.IntType(64), lowest.number() + 30)
    return types.int64(), emit

class Fields(NamedTuple):
    one: int
    two: int

class Base:
    VALUE = 50

class Derived(Base):
    pass

@functools.cache
def cached_number():
    import lowest
    return lowest.CONSTANT + Derived.VALUE

@intrinsic
def emitted_too(context):
    def emit(context, builder, signature, values):
        return ir.Constant(ir.IntType(64), cached_number())
    return types.int64(), emit

FIELDS = Fields(3, 4)

class Colour(enum.IntEnum):
    RED = 3
"""
DEEP = "import low\n"
HIGH = """
import os

import deep
import low
from low import (BOTH, FIELDS, FIRST, KIND, LIMIT, OTHER, PAIR, TABLE, Colour, Fields, emitted, emitted_too, inlined, inner,
                 middle)
from made_with import njit

@njit()
def calls(x):
    return inner(x)

@njit()
def calls_further(x):
    return middle(x)

@njit()
def takes_in(x):
    return inlined(x)

@njit()
def names(x):
    return x + LIMIT

@njit()
def names_a_tuple(x):
    return x + PAIR[1]

@njit()
def names_behind_a_dot(x):
    return x + low.FURTHER

@njit()
def names_behind_two_dots(x):
    return x + deep.low.FURTHER

@njit()
def shadowed(x):
    return low.shadowed(x)

@njit()
def names_in_a_list(x):
    return sum([x + LIMIT for _ in range(2)])

@njit()
def reads(x):
    return x + TABLE[2]

@njit()
def emits(x):
    return x + emitted()

@njit()
def calls_one_of_two(x):
    return BOTH[1](x)

@njit()
def names_a_type(x):
    return KIND(x + 65535)

@njit()
def calls_both(x):
    return 100 * FIRST(x) + OTHER(x)

@njit()
def has_a_default(x, more=(LIMIT, 0)):
    return x + more[0]

@njit()
def of_fields(fields):
    return fields.one

@njit()
def names_fields(x):
    return x + FIELDS.one

@njit()
def names_a_colour(x):
    return x + Colour.RED

@njit()
def gets_an_attribute(x):
    return x + getattr(low, "FURTHER")

@njit()
def emits_too(x):
    return x + emitted_too()

MINE = [calls, calls_further, takes_in, names, names_a_tuple, names_behind_a_dot, names_behind_two_dots, shadowed,
        names_in_a_list, reads, emits, calls_one_of_two, names_a_type, calls_both, has_a_default, names_fields, names_a_colour,
        gets_an_attribute, emits_too]

if __name__ == "__main__":
    if "LATE" in os.environ:  # the files are updated when all is imported, and nothing compiled yet
        for name in ("low", "lowest"):
            os.replace(name + ".new", name + ".py")
    told = {each.__name__: (each, each(1)) for each in MINE}
    told["of_fields"] = of_fields, of_fields(Fields(one=1, two=2))
    told |= {"first": (FIRST, FIRST(1)), "other": (OTHER, OTHER(1))}
    for name, (each, result) in told.items():
        print(name, result, sum(each.stats.cache_hits.values()))
"""
# What changes, and what each function gives for 1 then.
CHANGES = {
    ("1000, (1, 2)", "2000, (1, 2)"): {"names": 2001, "names_in_a_list": 4002, "has_a_default": 2001},
    ("(1, 2)", "(1, 9)"): {"names_a_tuple": 10},
    ("[1, 2, 3]", "[1, 2, 4]"): {"reads": 5},
    ("x + 1\n", "x + 2\n"): {"calls": 3, "calls_further": 3, "calls_one_of_two": 3},
    ("x + 11", "x + 12"): {"takes_in": 13},
    ("x + 21", "x + 22"): {"shadowed": 23},
    ("FURTHER = 4", "FURTHER = 6"): {"names_behind_a_dot": 7, "names_behind_two_dots": 7, "gets_an_attribute": 7},
    ("RED = 3", "RED = 5"): {"names_a_colour": 6},
    ("VALUE = 50", "VALUE = 60"): {"emits_too": 68},
    ("types.uint16", "types.uint32"): {"names_a_type": 65536},
    ("around(5), around(8)", "around(8), around(5)"): {"calls_both": 906, "first": 9, "other": 6},
    (") + 30", ") + 40"): {"emits": 48},
    ("CONSTANT = 7", "CONSTANT = 8"): {"emits": 39, "emits_too": 59},
    ("one: int\n    two", "two: int\n    one"): {"of_fields": 1, "names_fields": 5},
}
OLD = {"calls": 2, "calls_further": 2, "takes_in": 12, "names": 1001, "names_a_tuple": 3, "names_behind_a_dot": 5,
       "names_behind_two_dots": 5, "shadowed": 22, "names_in_a_list": 2002, "reads": 4, "emits": 38, "calls_one_of_two": 2,
       "names_a_type": 0, "calls_both": 609, "has_a_default": 1001, "names_fields": 4,
       "names_a_colour": 4, "gets_an_attribute": 5, "emits_too": 58, "of_fields": 1, "first": 6, "other": 9}  # fmt: skip
NEW: dict[str, int] = functools.reduce(lambda all_of_them, one: all_of_them | one, CHANGES.values(), OLD)
NEW |= {"emits": 49, "emits_too": 69}


def changed(text: str, *changes: tuple[str, str]) -> str:
    for change in changes:
        assert len(change[0]) == len(change[1])
        text = text.replace(*change)
    return text


class Checkout:
    """A folder with a module whose functions call another's, which is changed as an update does it."""

    def __init__(self, folder: Path, made_with: str) -> None:
        self.folder = folder
        (folder / "made_with.py").write_text(made_with)
        (folder / "deep.py").write_text(DEEP)
        (folder / "high.py").write_text(HIGH)
        self.write()

    def write(self, *changes: tuple[str, str], suffix: str = ".py") -> None:
        """Neither the length nor the time of a file changes."""
        for name, text in (("low", LOW), ("lowest", LOWEST)):
            path = self.folder / (name + suffix)
            path.write_text(changed(text, *changes))
            os.utime(path, (1_700_000_000, 1_700_000_000))

    def run(self, **variables: str) -> tuple[dict[str, int], set[str]]:
        """What each function gives for 1, and those whose machine code was there."""
        root = Path(kvortex.__file__).parents[1]
        ours = {"NUMBA_CACHE_DIR": str(self.folder / "cache"), "PYTHONPATH": f"{self.folder}{os.pathsep}{root}"} | variables
        command = [sys.executable, "-B", "high.py"]
        done = subprocess.run(command, cwd=self.folder, env=os.environ | ours, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        return {name: int(result) for name, result, _ in lines}, {name for name, _, hits in lines if hits != "0"}


def test_a_change_of_whatever_is_compiled_in_is_seen(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path, "from kvortex.jit import njit")
    assert checkout.run()[0] == OLD
    assert checkout.run() == (OLD, set(OLD)), "what stays the same is not compiled again"
    checkout.write(*CHANGES)
    results, were_there = checkout.run()
    assert results == NEW and not were_there & set(OLD) - {"first", "other"}, "which are the same two, by other names"
    assert checkout.run() == (NEW, set(NEW))


def test_what_changes_between_import_and_compilation(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path, "from kvortex.jit import njit")
    checkout.write(*CHANGES, suffix=".new")
    assert checkout.run(LATE="1") == (OLD, set()), "what was imported is what is compiled"
    results, were_there = checkout.run()
    assert results == NEW and not were_there - {"first", "other"}


def test_numba_alone_goes_on_with_what_it_has(tmp_path: Path) -> None:
    """Where this fails, kvortex.jit has nothing left to do."""
    checkout = Checkout(tmp_path, "import numba\ndef njit(**options): return numba.njit(cache=True, **options)")
    checkout.run()
    checkout.write(*CHANGES)
    results, were_there = checkout.run()
    stale = {name for name in NEW if results[name] != NEW[name]}
    assert stale >= set(NEW) - {"has_a_default", "first", "other"} and stale <= were_there


def _modules(*changes: tuple[str, str]) -> dict[str, types.ModuleType]:
    """All four, made anew."""
    made_with = types.ModuleType("made_with")
    made_with.njit = functools.partial(jit.njit, cache=False)  # type: ignore[attr-defined]
    before, made = dict(sys.modules), {"made_with": made_with}
    sys.modules["made_with"] = made_with
    try:
        for name, text in (("lowest", LOWEST), ("low", LOW), ("deep", DEEP), ("high", HIGH)):
            sys.modules[name] = made[name] = types.ModuleType(name)
            exec(compile(changed(text, *changes), name, "exec"), made[name].__dict__)
    finally:
        for name in made:
            del sys.modules[name]
            if name in before:
                sys.modules[name] = before[name]
    return made


def _stamps(*changes: tuple[str, str]) -> dict[str, str]:
    made = _modules(*changes)
    found = {each.__name__: stamp.stamp(each) for each in made["high"].MINE}
    return found | {name: stamp.stamp(made["low"].__dict__[name.upper()]) for name in ("first", "other")}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change[1])
def test_a_change_is_seen_where_it_matters_and_nowhere_else(change: tuple[str, str]) -> None:
    before, after = _stamps(), _stamps(change)
    assert {name for name in before if before[name] != after[name]} == set(CHANGES[change]) - {"of_fields"}
    assert _stamps() == before


def test_fields_of_named_tuples_among_arguments() -> None:
    fields = [_modules(*changes)["low"].Fields for changes in ((), [*CHANGES][-1:])]
    kinds = [numba.typeof(each(1, 2)) for each in fields]
    nested = [numba.types.Tuple((numba.types.int64, numba.types.UniTuple(kind, 2))) for kind in kinds]
    for first, second in (kinds, nested):
        assert str(first) == str(second) or first == first
        assert stamp.layouts([first]) != stamp.layouts([second]) == stamp.layouts([second]) != ()
    assert stamp.layouts([numba.types.int64, numba.types.Array(numba.types.int8, 1, "C")]) == ()


def test_functions_that_call_each_other_have_an_end() -> None:
    def first(x: int) -> int:
        return other(x - 1) if x else 0

    def other(x: int) -> int:
        return first(x - 1) if x else 1

    assert stamp.stamp(first) != stamp.stamp(other) and stamp.stamp(first) == stamp.stamp(first)


class Folder:
    """A function that is made again and again, as in processes one after another, with stamps as told."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._monkeypatch = folder, monkeypatch
        monkeypatch.setattr(numba.config, "CACHE_DIR", str(folder))

    def hits(self, stamp: Callable[[Any], str]) -> int:
        self._monkeypatch.setattr(kept, "stamp", stamp)

        @jit.njit()
        def more(x: int) -> int:
            return x + 1

        assert more(1) == 2
        return sum(more.stats.cache_hits.values())

    def files(self, suffix: str) -> list[Path]:
        return list(self._folder.rglob(f"*{suffix}"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    return Folder(tmp_path, monkeypatch)


def test_what_a_function_was_is_kept_for_a_while(folder: Folder) -> None:
    """Another branch of a checkout need not be compiled anew each time."""
    for at in range(7):
        assert not folder.hits(lambda _, at=at: str(at))  # type: ignore[misc]
    assert len(folder.files(".nbc")) == 4
    assert all(folder.hits(lambda _, at=at: str(at)) for at in (6, 4, 3))  # type: ignore[misc]
    assert not folder.hits(lambda _: "1")


def test_nothing_is_kept_of_what_changes_or_cannot_be_told(folder: Folder) -> None:
    changing = iter(map(str, range(100)))
    assert not folder.hits(lambda _: next(changing)) and not folder.files(".nbc")

    def refuse(_: Any) -> str:
        raise RuntimeError("of something foreign")

    assert not folder.hits(refuse) and not folder.files(".nbc") and not folder.files(".nbi")


def test_files_that_cannot_be_read_are_none(folder: Folder) -> None:
    folder.hits(lambda _: "1")
    (index,) = folder.files(".nbi")
    whole = index.read_bytes()
    for damaged in (b"", whole[:40], whole[:-20], whole[:30] + bytes(len(whole) - 30)):
        index.write_bytes(damaged)
        assert not folder.hits(lambda _: "1")
        assert folder.hits(lambda _: "1"), "made anew"
    for code in folder.files(".nbc"):
        code.write_bytes(b"nothing")
    assert not folder.hits(lambda _: "1")


def _compiled() -> list[Any]:
    found = {}
    for module in pkgutil.walk_packages(kvortex.__path__, "kvortex."):
        if not module.name.startswith(("kvortex.kernels", "kvortex.integrations", "kvortex.__main__")):
            here = vars(importlib.import_module(module.name)).values()
            found |= {id(each): each for each in here if hasattr(each, "py_func")}
    return list(found.values())


def test_all_compiled_functions_are_kept_so() -> None:
    all_compiled = _compiled()
    assert len(all_compiled) > 130
    for each in all_compiled:
        assert isinstance(each._cache._cache_file, kept.Kept), each


def test_an_index_is_made_of_its_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names behind a dot that are also names of the module itself."""
    before = stamp.stamp(policies.evict)
    monkeypatch.setattr(lru, "evict", jit.njit()(lambda *_: None))
    assert stamp.stamp(policies.evict) != before


def test_a_stamp_is_the_same_in_every_process() -> None:
    """Also where strings and sets have another order."""
    program = "import conftest; from kvortex.jit.stamp import stamp; from kvortex.transfer.issue import submitting as s\n"
    program += "from kvortex.index import core as c; from kvortex.digests import host as h\n"
    program += "print(*[stamp(f) for m in (s, c, h) for f in vars(m).values() if hasattr(f, 'py_func')])"
    told = set()
    for seed in ("1", "2"):
        environment, command = os.environ | {"PYTHONHASHSEED": seed}, [sys.executable, "-c", program]
        folder = Path(__file__).parents[1]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
        told.add(done.stdout)
    (stamps,) = told
    assert len(set(stamps.split())) > 20


def test_values_in_words() -> None:
    def told(value: Any) -> str:
        return stamp._Digests().told(value)

    different: list[Any] = [1, True, 1.0, "1", b"1", None, (1, 2), (2, 1), [1, 2], {1: 2}, {2: 1}, {1, 2}, types, np, max, min]
    one = np.arange(4)
    different += [one, one.astype(np.int32), one.reshape(2, 2), one[::-1], np.int8(1), np.dtype("i4"), np.dtype("i8")]
    words = [told(value) for value in different]
    assert len(set(words)) == len(words)
    assert told(one) == told(np.arange(8)[:4]) and told(frozenset("abc")) == told(frozenset("cab"))
    for value in (object(), functools.partial(max, 1), np.array([object()]), [object()], {1: object()}):
        with pytest.raises(stamp.UnknownError):
            told(value)


@pytest.mark.parametrize("options", [{}, {"cache": False}])
def test_options_are_those_of_numba(options: dict[str, bool]) -> None:
    @jit.njit(nogil=True, **options)
    def twice(x: int) -> int:
        return 2 * x

    assert twice(4) == 8 and twice.targetoptions["nogil"]
    assert isinstance(getattr(twice._cache, "_cache_file", None), kept.Kept) == (not options)


def test_without_numba_functions_are_pythons() -> None:
    program = "import conftest; from kvortex.jit import njit; print(njit()(lambda x: 2 * x)(4))"
    environment, command = os.environ | {"NUMBA_DISABLE_JIT": "1"}, [sys.executable, "-c", program]
    folder = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == "8\n"
