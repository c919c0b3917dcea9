"""Machine code on disk is of what is compiled now, however files came to differ."""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kvortex
from kvortex import jit

LOW = """
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
    return x + 1

@njit()
def middle(x):
    return inner(x)

BOTH = (middle, middle)

def around():
    count = 5

    @njit()
    def function(x):
        return x + count

    return function

@intrinsic
def emitted(context):
    def emit(context, builder, signature, values):
        return ir.Constant(ir.IntType(64), 7)
    return types.int64(), emit
"""
CHANGES = {"1000, (1, 2)": "2000, (1, 9)", "[1, 2, 3]": "[1, 2, 4]", "x + 1": "x + 2", "FURTHER = 4": "FURTHER = 6"}
CHANGES |= {"types.uint16": "types.uint32", "count = 5": "count = 8", "IntType(64), 7": "IntType(64), 9"}
NEW = functools.reduce(lambda text, change: text.replace(*change), CHANGES.items(), LOW)
HIGH = """
import low
from low import BOTH, KIND, LIMIT, PAIR, TABLE, around, emitted, inlined, inner, middle
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
    return x + LIMIT + PAIR[1]

@njit()
def names_behind_a_dot(x):
    return x + low.FURTHER

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

goes_around = around()

@njit()
def calls_around(x):
    return goes_around(x)

if __name__ == "__main__":
    mine = [each for name, each in list(globals().items()) if getattr(each, "py_func", None) and each.__module__ == "__main__"]
    for each in mine:
        print(each.__name__, each(1), sum(each.stats.cache_hits.values()))
"""
OLD_RESULTS = {"calls": 2, "calls_further": 2, "takes_in": 2, "names": 1003, "names_behind_a_dot": 5, "names_in_a_list": 2002}
OLD_RESULTS |= {"reads": 4, "emits": 8, "calls_around": 6, "calls_one_of_two": 2, "names_a_type": 0}
NEW_RESULTS = {"calls": 3, "calls_further": 3, "takes_in": 3, "names": 2010, "names_behind_a_dot": 7, "names_in_a_list": 4002}
NEW_RESULTS |= {"reads": 5, "emits": 10, "calls_around": 9, "calls_one_of_two": 3, "names_a_type": 65536}


class Checkout:
    """A folder with a module whose functions call another's, which is changed as an update does it."""

    def __init__(self, folder: Path, made_with: str) -> None:
        self._folder = folder
        (folder / "made_with.py").write_text(made_with)
        (folder / "high.py").write_text(HIGH)
        self.write(LOW)

    def write(self, low: str) -> None:
        """Neither the length nor the time of a file changes."""
        path = self._folder / "low.py"
        path.write_text(low)
        os.utime(path, (1_700_000_000, 1_700_000_000))

    def run(self) -> tuple[dict[str, int], set[str]]:
        """What each function gives for 1, and those whose machine code was there."""
        root = Path(kvortex.__file__).parents[1]
        ours = {"NUMBA_CACHE_DIR": str(self._folder / "cache"), "PYTHONPATH": f"{self._folder}{os.pathsep}{root}"}
        command = [sys.executable, "-B", "high.py"]
        done = subprocess.run(command, cwd=self._folder, env=os.environ | ours, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        return {name: int(result) for name, result, _ in lines}, {name for name, _, hits in lines if hits != "0"}


def test_a_change_of_whatever_is_compiled_in_is_seen(tmp_path: Path) -> None:
    assert len(LOW) == len(NEW)
    checkout = Checkout(tmp_path, "from kvortex.jit import njit")
    assert checkout.run() == (OLD_RESULTS, set())
    assert checkout.run() == (OLD_RESULTS, set(OLD_RESULTS)), "what stays the same is not compiled again"
    checkout.write(NEW)
    assert checkout.run() == (NEW_RESULTS, set())
    checkout.write(NEW.replace("import numpy as np", "import numpy as np  # a comment"))
    results, kept = checkout.run()
    assert results == NEW_RESULTS and kept == set(NEW_RESULTS) - {"emits"}, "of intrinsics the whole source counts"


def test_numba_alone_goes_on_with_what_it_has(tmp_path: Path) -> None:
    """Where this fails, kvortex.jit has nothing left to do."""
    checkout = Checkout(tmp_path, "import numba\ndef njit(**options): return numba.njit(cache=True, **options)")
    checkout.run()
    checkout.write(NEW)
    assert checkout.run() == (OLD_RESULTS, set(OLD_RESULTS))


def _compiled() -> list[object]:
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
        assert isinstance(each._cache._cache_file, jit._Files), each  # type: ignore[attr-defined]


def test_a_stamp_is_the_same_in_every_process() -> None:
    """Also where strings and sets have another order."""
    program = "from kvortex import jit; from kvortex.transfer import submitting as s; from kvortex.index import core as c\n"
    program += "print(*[jit.stamp(f) for m in (s, c) for f in vars(m).values() if hasattr(f, 'py_func')])"
    told = set()
    for seed in ("1", "2"):
        environment, command = os.environ | {"PYTHONHASHSEED": seed}, [sys.executable, "-c", program]
        told.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    (stamps,) = told
    assert len(set(stamps.split())) > 3


def test_values_in_words() -> None:
    assert jit._told(1) != jit._told(True) != jit._told(1.0) and jit._told((1, 2)) != jit._told((2, 1))
    one, other = np.arange(4), np.arange(4)
    assert jit._told(one) == jit._told(other) != jit._told(one.astype(np.int32)) != jit._told(one.reshape(2, 2))
    other[1] = 7
    assert jit._told(one) != jit._told(other) and jit._told(frozenset("abc")) == jit._told(frozenset("cab"))


@pytest.mark.parametrize("options", [{}, {"cache": False}])
def test_options_are_those_of_numba(options: dict[str, bool]) -> None:
    @jit.njit(nogil=True, **options)
    def twice(x: int) -> int:
        return 2 * x

    assert twice(4) == 8 and twice.targetoptions["nogil"]
    assert isinstance(getattr(twice._cache, "_cache_file", None), jit._Files) == (not options)
