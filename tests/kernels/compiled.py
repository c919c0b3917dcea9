"""Kernels compiled once for all tests of a session: what is lowered, once a kernel; machine code, once an architecture.

Nearly all the time goes into Python: types are inferred and the code of NVVM is written. That asks of the architecture no more
than how it adds doubles (6.0 and later) and whether it has an approximate ``tanh`` (7.5 and later), so all from 8.0 on share it
(numba-cuda 0.30; test_build.py has one kernel compiled both ways). NVVM and nvJitLink run for each.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from kvortex.kernels import build

ARCHITECTURES = [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)]


def nowhere(name: str, capability: tuple[int, int]) -> build.Cubin | None:
    """Nobody compiles beside the tests."""
    return None


elsewhere: Callable[[str, tuple[int, int]], build.Cubin | None] = nowhere  # or who does: see conftest.py
_lowered: dict[tuple[Any, ...], Any] = {}


@functools.cache
def compiled(name: str, capability: tuple[int, int]) -> build.Cubin:
    """What ``build.compile_kernel`` makes."""
    found = elsewhere(name, capability)
    return _compiled(name, capability) if found is None else found


def _compiled(name: str, capability: tuple[int, int]) -> build.Cubin:
    with build._row_stack():
        from numba.cuda import compiler

    lower = compiler._compile_pyfunc_with_fixup

    def shared(pyfunc: Any, signature: Any, *, cc: tuple[int, int], **options: Any) -> Any:
        assert cc >= (8, 0)
        key = pyfunc, signature, *sorted(options.items())
        if key not in _lowered:
            _lowered[key] = lower(pyfunc, signature, cc=cc, **options)
        return _lowered[key]

    with mock.patch.object(compiler, "_compile_pyfunc_with_fixup", shared):
        return build.compile_kernel(name, capability)


def sass(code: bytes, folder: Path) -> str:
    """What nvdisasm prints of machine code; the file is left in the folder."""
    path = folder / "kernel.cubin"
    path.write_bytes(code)
    return subprocess.run([_nvdisasm(), "-c", str(path)], capture_output=True, text=True, check=True).stdout


def _nvdisasm() -> str:
    site = Path(sysconfig.get_paths()["purelib"])
    found = [*site.glob("nvidia/*/bin/nvdisasm"), *filter(None, [shutil.which("nvdisasm")])]
    assert found, "nvdisasm is part of the test extra"
    return str(found[0])
