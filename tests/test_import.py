"""What ``import kvortex`` costs, and what it leaves alone. Each test asks a fresh interpreter."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import kvortex
from kvortex import errors

ROOT = Path(__file__).resolve().parents[1]
FOREIGN = {"torch", "cupy", "jax"}
# NumPy's own submodules, which come into its namespace when somebody first imports them.
LAZY_NUMPY = {"char", "core", "ctypeslib", "dtypes", "emath", "exceptions", "f2py", "fft", "lib", "linalg", "ma", "matlib"}
LAZY_NUMPY |= {"matrixlib", "polynomial", "random", "rec", "strings", "test", "testing", "typing"}

# Prints what a statement loads, less what an installed package loads at every start of Python (cuda-bindings 12.9 does).
LOADED = """
import json
def packages(): return {{name.partition('.')[0] for name in sys.modules}}
before = packages()
{}
print(json.dumps(sorted(packages() - before)))
"""


def ask(code: str) -> Any:
    """What ``code`` prints as JSON in a fresh interpreter that sees this checkout first."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_loads_no_heavy_package() -> None:
    loaded = ask(LOADED.format("import kvortex"))
    assert "kvortex" in loaded
    assert not {*FOREIGN, "numba", "numba_cuda", "llvmlite", "cuda", "numpy"} & set(loaded)


def test_every_public_name_loads_no_foreign_package() -> None:
    loaded = ask(LOADED.format("import kvortex; [getattr(kvortex, name) for name in kvortex.__all__]"))
    assert not FOREIGN & set(loaded)


def test_import_is_quick() -> None:
    code = "import json, time; t = time.perf_counter(); import kvortex; print(json.dumps(time.perf_counter() - t))"
    assert min(ask(code) for _ in range(5)) <= 0.25


def test_numpy_keeps_its_namespace() -> None:
    """numba-cuda 0.30 asks for a name that NumPy 2.5 dropped; whatever helps it is gone again after a compilation."""
    before, after = ask(
        "import json, numpy; before = sorted(vars(numpy)); import kvortex\n"
        "for name in kvortex.__all__: getattr(kvortex, name)\n"
        "import conftest  # maps kernels/ where kvortex is not installed\n"
        "from kvortex.kernels.build import KERNELS, compile_kernel\n"
        "for name in list(KERNELS)[:2]: compile_kernel(name, (9, 0))\n"
        "print(json.dumps([before, sorted(vars(numpy))]))"
    )
    assert set(after) - LAZY_NUMPY == set(before) - LAZY_NUMPY


def test_public_names_are_there_and_listed() -> None:
    public = {*kvortex.__all__, "__version__"}
    assert public <= set(dir(kvortex))
    for name in kvortex.__all__:
        assert getattr(kvortex, name).__name__ == name
    assert kvortex.__all__ == sorted(kvortex.__all__)


def test_every_error_is_public() -> None:
    raised = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, errors.KVortexError)}
    assert raised <= set(kvortex.__all__)
    assert all(getattr(kvortex, name) is getattr(errors, name) for name in raised)


def test_unknown_name_is_an_attribute_error() -> None:
    try:
        kvortex.KVortexEngin  # type: ignore[attr-defined]  # noqa: B018
    except AttributeError as error:
        assert "'KVortexEngin'" in str(error)
    else:
        raise AssertionError("a name that is not there was found")
