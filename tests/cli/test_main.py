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


@pytest.mark.parametrize("argv", [["-h"], ["demo", "-h"], ["replay", "--help"], ["record", "-h"], ["doctor", "-h"]])
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
        (["replay", "t", "--blocks", "0"], "argument --pool-blocks/--blocks: '0' is no integer of at least 1"),
        (["replay", "t", "--pool-blocks", ""], "argument --pool-blocks/--blocks: '' is no integer of at least 1"),
        (["replay", "t", "--pool-blocks", "9,0"], "argument --pool-blocks/--blocks: '0' is no integer of at least 1"),
        (["replay", "t", "--pool-blocks", "9,,8"], "argument --pool-blocks/--blocks: '' is no integer of at least 1"),
        (["replay", "t", "--pool-blocks", "9,8,9"], "argument --pool-blocks/--blocks: '9,8,9' names a number twice"),
        (["record"], "TRACE.jsonl"),
        (["replay", "t", "--limit", "x"], "argument --limit: 'x' is no integer of at least 1"),
        (["replay", "t", "--record-bytes", "4 parsecs"], "argument --record-bytes: '4 parsecs' is no size"),
        (["demo", "--turns", "-1"], "argument --turns: '-1' is no integer"),
        (["demo", "--seconds", "nan"], "argument --seconds: 'nan' is no number of seconds above 0"),
        (["demo", "--seconds", "soon"], "argument --seconds: 'soon' is no number of seconds above 0"),
        (["demo", "--seed", "x"], "argument --seed"),
        (["demo", "--turns", "9" * 30], "argument --turns: '999999999999999999999999999999' is too large"),
        (["demo", "--turns", "9" * 5000], "argument --turns: '99999999"),
        (["demo", "--seconds", "9" * 5000], "argument --seconds: '99999999"),
        (["demo", "--system-tokens", str(2**63)], "argument --system-tokens: '9223372036854775808' is too large"),
        (["replay", "t", "--record-bytes", "9" * 5000], "argument --record-bytes: '99999999"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert message in err and not out and "Traceback" not in err and len(err) < 1200


TOO_LARGE = [
    ["--system-tokens", str(2**63 - 1)],
    ["--system-tokens", "9999999999999"],
    ["--conversations", str(2**63 - 1)],
    ["--conversations", "999999999999"],
    ["--turns", str(2**63 - 1)],
    ["--turns", "99999999999"],
    ["--pool-blocks", str(2**63 - 1)],
    ["--pool-blocks", "99999999999"],
]


@pytest.mark.parametrize("options", TOO_LARGE, ids=" ".join)
def test_sizes_beyond_the_machine_name_their_option(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--device", "host", *options]) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert not out and last.startswith("kvortex: ") and options[0] in last and len(last) < 300
    assert "cpu_pool_size_bytes" not in err and "Traceback" not in err


WRITERS = [["demo", "--device", "host", "--turns", "1", "--conversations", "1"], ["doctor"], ["doctor", "--json"]]


def run_in_bash(argv: list[str], redirection: str) -> subprocess.CompletedProcess[str]:
    command = f'unset PYTHONUNBUFFERED; "$@" {redirection}'  # what a stream did not take stays in its buffer until the exit
    argv = ["bash", "-c", command, "bash", sys.executable, "-m", "kvortex", *argv]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, cwd=ROOT)


@pytest.mark.parametrize("argv", WRITERS, ids=" ".join)
@pytest.mark.parametrize(("redirection", "message"), [("> /dev/full", "output: No space left"), (">&-", "stdout is closed")])
def test_output_that_cannot_be_written(argv: list[str], redirection: str, message: str) -> None:
    done = run_in_bash(argv, redirection)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith(f"kvortex: {message}")
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_progress_that_cannot_be_written_stops_nothing(redirection: str) -> None:
    done = run_in_bash(WRITERS[0], redirection)
    assert done.returncode == 0 and done.stdout.startswith("kvortex demo on host\n")
    assert run_in_bash(["demo", "--device", "none"], redirection).returncode == 2


def test_a_mistake_of_ours_is_no_wrong_byte(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "_play", lambda *_: 1 // 0)
    assert main(["demo", "--device", "host", "--turns", "1", "--pool-blocks", "9"]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


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
