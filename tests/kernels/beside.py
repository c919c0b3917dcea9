"""What takes minutes and needs nobody runs beside all other tests: programs in Numba's simulator, a process each, since that is
chosen when ``numba.cuda`` is imported; and one that compiles every kernel for every architecture."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

from kvortex.kernels.build import Cubin

Simulated: TypeAlias = Callable[[str], str]
_ROOT = Path(__file__).parents[2]
_SECONDS = 1800  # for one program: the longest takes two to three minutes of a CPU, which others may use too


def programs(sources: Iterable[Path]) -> list[str]:
    """Those that files of tests ask for by name."""
    return sorted({name for path in sources for name in re.findall(r'simulated\("(\w+)"\)', path.read_text())})


def file_of(name: str, capability: tuple[int, int]) -> str:
    """Where ``tests.kernels.compile_all`` leaves a kernel, pickled."""
    return f"{name}-{capability[0]}{capability[1]}"


class Beside:
    """Runs programs one after another, for as long as others leave a CPU idle.

    Parameters
    ----------
    names
        Programs of this folder that are run in the simulator.
    compiles
        Whether all kernels are compiled first.
    """

    def __init__(self, names: Iterable[str], *, compiles: bool) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="kvortex-kernels-"))
        self._thread = ThreadPoolExecutor(1)
        self._running: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()  # of what runs, and of whether anything else may
        self._ended = False
        self._compiling = self._thread.submit(self._run, "compile_all", str(self._folder)) if compiles else None
        self._simulated: dict[str, Future[tuple[int, str]]] = {
            name: self._thread.submit(self._run, name, simulator=True) for name in names
        }

    def simulated(self, name: str) -> str:
        """What ``tests.kernels.NAME`` prints; AssertionError with all of it if it fails."""
        code, printed = self._simulated[name].result()
        assert code == 0, printed
        return printed

    def compiled(self, name: str, capability: tuple[int, int]) -> Cubin | None:
        """A kernel, when its turn has come; None where it will not come. AssertionError if the compiling program failed."""
        path = self._folder / file_of(name, capability)
        while self._compiling is not None and not path.exists() and not self._compiling.done():
            time.sleep(0.02)
        if not path.exists():
            if self._compiling is not None:
                code, printed = self._compiling.result()
                assert code == 0, printed
            return None
        cubin: Cubin = pickle.loads(path.read_bytes())
        return cubin

    def close(self) -> None:
        """Begins nothing more, and ends the program that runs."""
        with self._lock:
            self._ended = True
            if self._running is not None:
                self._running.kill()
        self._thread.shutdown(cancel_futures=True)
        shutil.rmtree(self._folder)

    def _run(self, name: str, *arguments: str, simulator: bool = False) -> tuple[int, str]:
        nice = ["nice", "-n", "10"] if shutil.which("nice") else []
        command = [*nice, sys.executable, "-m", f"tests.kernels.{name}", *arguments]
        environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"} if simulator else None
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with self._lock:
            if self._ended:
                return 1, "the session has ended"
            self._running = running = subprocess.Popen(command, cwd=_ROOT, env=environment, **pipes)
        try:
            printed, _ = running.communicate(timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            running.kill()
            return 1, f"{running.communicate()[0]}\nnot through in {_SECONDS} seconds"
        return running.returncode, printed
