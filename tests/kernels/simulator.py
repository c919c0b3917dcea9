"""Programs of this folder in Numba's simulator: in a process each, since it is chosen when ``numba.cuda`` is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

Simulated: TypeAlias = Callable[[str], str]


def programs(sources: Iterable[Path]) -> list[str]:
    """Those that files of tests ask for by name."""
    return sorted({name for path in sources for name in re.findall(r'simulated\("(\w+)"\)', path.read_text())})


class Simulator:
    """Runs programs one after another, beside whoever asks for what they print: who compiles meanwhile keeps one CPU busy."""

    def __init__(self, names: Iterable[str]) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._begun: dict[str, Future[subprocess.CompletedProcess[str]]] = {
            name: self._thread.submit(_run, name) for name in names
        }

    def __call__(self, name: str) -> str:
        """What ``tests.kernels.NAME`` prints; AssertionError with all of it if it fails."""
        done = self._begun[name].result()
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def close(self) -> None:
        """Begins nothing more, and waits for the program that runs."""
        self._thread.shutdown(cancel_futures=True)


def _run(name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"tests.kernels.{name}"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=900,  # the longest takes two to three minutes of a CPU, which others may use too
    )
