"""The command line itself: help, versions, exit codes, and how errors look."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kvortex
from kvortex.cli import demo, main
from kvortex.errors import BuildError, PoolFullError

ROOT = Path(__file__).resolve().parents[2]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"kvortex {kvortex.__version__}\n"


@pytest.mark.parametrize("argv", [["-h"], ["demo", "-h"], ["replay", "--help"], ["doctor", "-h"]])
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: kvortex") and not err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["dance"], "dance"),
        (["replay"], "TRACE.jsonl"),
        (["replay", "t", "--blocks", "0"], "argument --blocks: '0' is no integer of at least 1"),
        (["replay", "t", "--limit", "x"], "argument --limit: 'x' is no integer of at least 1"),
        (["replay", "t", "--record-bytes", "4 parsecs"], "argument --record-bytes: '4 parsecs' is no size"),
        (["demo", "--turns", "-1"], "argument --turns: '-1' is no integer"),
        (["demo", "--seconds", "nan"], "argument --seconds: 'nan' is no number of seconds above 0"),
        (["demo", "--seconds", "soon"], "argument --seconds: 'soon' is no number of seconds above 0"),
        (["demo", "--seed", "x"], "argument --seed"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert message in err and not out and "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "kvortex: interrupted\n"),
        (PoolFullError("no room"), 2, "kvortex: no room\n"),
        (BuildError("no compiler:\nnone"), 2, "kvortex: no compiler: none\n"),
        (MemoryError("Unable to allocate"), 2, "kvortex: not enough memory: Unable to allocate\n"),
    ],
)
def test_errors_are_one_line(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(demo, "_play", fail)
    assert main(["demo", "--device", "host", "--turns", "1", "--pool-blocks", "9"]) == code
    out, err = capsys.readouterr()
    assert err.endswith(message) and "Traceback" not in err and not out


def test_a_negative_seed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--seed", "-1"]) == 2
    assert "argument --seed: '-1' is no integer of at least 0" in capsys.readouterr().err


def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--device", "cuda:99"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("kvortex: ") and err.count("\n") == 1 and not out


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from kvortex.cli import main; main(['--help'])\n"
        "print(*{'numpy', 'numba', 'cuda', 'rich', 'llvmlite'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0 and done.stderr.strip() == ""


def test_a_reader_that_has_seen_enough() -> None:
    command = f"{sys.executable} -m kvortex doctor | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr and "Exception" not in done.stderr
