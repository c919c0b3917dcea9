"""``kvortex record``: a program runs as it would, and replays of what was recorded have its hits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvortex.cli import main
from kvortex.devices import HostDevice
from kvortex.traces.format import read_trace
from tests.cli.screen import rows
from tests.conversations import conversations, write
from tests.naive import replay as naive_replay
from tests.naive import replay_lru
from tests.pages import PagedCache

ROOT = Path(__file__).resolve().parents[2]
KVORTEX = [sys.executable, "-m", "kvortex"]


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_a_demo_that_was_recorded_is_replayed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trace = str(tmp_path / "demo.jsonl")
    demo = ["demo", "--device", "host", "--turns", "5", "--conversations", "4", "--pool-blocks", "200"]
    assert main(["record", trace, "--", *KVORTEX, *demo]) == 0
    out, err = capfd.readouterr()
    played, recorded = rows(out), rows(err.split(f"recorded in {os.path.relpath(trace)}\n")[1])
    assert "recorded" not in out  # which is the program's
    assert recorded["requests"] == "20" and played["turns"].startswith("20 of 20")
    assert recorded["block references"] == f"{played['blocks checked']} to blocks of 16 tokens"
    assert int(played["blocks evicted"]) > 0 < int(played["blocks hit"])
    hits = replay_lru(read_trace(trace).requests(), 200)
    for options in (["--no-data"], ["--device", "host", "--record-bytes", "1KiB"]):
        assert main(["replay", trace, "--pool-blocks", "200", "--json", "-", *options]) == 0
        report = json.loads(capfd.readouterr().out)
        assert report["hits"] == hits and report["prefix_hits"] == int(played["blocks hit"])
        assert report["block_references"] == int(played["blocks checked"])
        assert report["evictions"] == int(played["blocks evicted"])
    assert [path.name for path in tmp_path.iterdir()] == ["demo.jsonl"]  # the engine that warms up is in no trace


def test_a_replay_that_is_recorded_is_the_same_trace(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    requests = conversations(50)
    trace, copy = write(tmp_path / "t", requests), str(tmp_path / "copy.jsonl")
    replay = ["replay", trace, "--pool-blocks", "20,30", "--device", "host", "--record-bytes", "1KiB"]
    assert main(["record", copy, *KVORTEX, *replay]) == 0  # -- may be left out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy-2.jsonl", "copy.jsonl", "t"]
    numbers: dict[int, int] = {}
    for blocks, path in ((20, copy), (30, str(tmp_path / "copy-2.jsonl"))):
        numbers.clear()
        renamed = [[numbers.setdefault(one, len(numbers)) for one in ids[:blocks]] for ids in requests]
        assert read_trace(path).requests() == renamed and read_trace(path).block_tokens == 512
    assert "recorded in" in capfd.readouterr().err


@pytest.mark.parametrize("options", [["--no-data"], ["--device", "host", "--record-bytes", "1KiB"]], ids=["index", "data"])
def test_blocks_that_a_model_generates_are_no_requests(
    options: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache, tokens = PagedCache.plain(HostDevice(), blocks=64), list(range(40))
    with cache.engine(slots=64) as engine:
        with engine.record(tmp_path / "t"):
            for _ in range(6):
                keys = engine.block_keys(tokens)
                hits = int(engine.check_blocks(keys).sum())
                if hits:
                    engine.load_blocks(keys[:hits], range(hits)).wait()
                engine.save_blocks(keys[hits:], range(hits, len(keys))).wait()
                for _ in range(50):  # tokens of an answer: blocks are saved as they fill
                    tokens.append(len(tokens))
                    if len(tokens) % 16 == 0:
                        engine.save_blocks(engine.block_keys(tokens)[-1:], [0]).wait()
                tokens += range(20)  # of the next question
        stats = engine.get_stats()
    trace = read_trace(tmp_path / "t")
    assert trace.asked == 6 < len(trace) and trace.references == stats.checked_blocks
    for blocks in ("64", "20"):
        assert main(["replay", str(tmp_path / "t"), "--pool-blocks", blocks, "--json", "-", *options]) == 0
        report = json.loads(capfd.readouterr().out)
        assert report["hits"] == naive_replay(trace.requests(), int(blocks), "lru", stored=trace.stored.tolist())
        assert report["prefix_hit_rate"] <= report["bound"][0]["hit_rate"] and len(report["hits"]) == 6
        if blocks == "64":
            assert report["prefix_hit_rate"] == stats.cache_hit_rate == report["bound"][0]["hit_rate"] > 0.6
            assert (report["requests"], report["block_references"]) == (6, stats.checked_blocks)


REFUSED: list[tuple[list[str], str]] = [
    (["t.jsonl"], "record needs a program to run"),
    (["t.jsonl", "--"], "record needs a program to run"),
    (["", "--", "true"], "'': names no file"),
    (["there", "--", "true"], "'there': is there already, and no trace is written over it"),
    (["no/folder/t", "--", "true"], "no/folder/t: no file can be written there"),
    (["t.jsonl", "--", "no-such-program"], "no-such-program: No such file or directory"),
    (["t.jsonl", "--", "true"], "true: made no engine of kvortex, so there is no trace"),
    (["t.jsonl", "--", "a\0b"], "null"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message[:20] for _, message in REFUSED])
def test_what_cannot_be_recorded(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_text("x")
    assert main(["record", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("kvortex: ") and message in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(("code", "status"), [("exit 7", 7), ("kill -TERM $$", 143)])
def test_it_exits_as_the_program_does(code: str, status: int, tmp_path: Path) -> None:
    assert main(["record", str(tmp_path / "t"), "--", "sh", "-c", code]) == status


def test_an_engine_that_was_asked_for_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "from tests.pages import *; from kvortex.devices import HostDevice; PagedCache.plain(HostDevice()).engine()"
    assert main(["record", str(tmp_path / "t"), "--", sys.executable, "-c", code]) == 0
    assert "no requests" in rows(capfd.readouterr().err)


def test_a_file_that_could_not_be_written_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = """
import resource, time
from tests.pages import PagedCache, keys_of
from kvortex.devices import HostDevice
engine = PagedCache.plain(HostDevice()).engine()
resource.setrlimit(resource.RLIMIT_FSIZE, (150, 150))
for at in range(20):
    engine.check_blocks(keys_of(1, 2))
    time.sleep(0.02)
"""
    assert main(["record", str(tmp_path / "t"), "--", sys.executable, "-c", code]) == 0
    whole = (tmp_path / "t").stat().st_size  # depends on the digits of a time
    told = f"kvortex: recording: {tmp_path / 't'}: File too large; the trace ends after {whole} bytes\n"
    assert whole < 150 and capfd.readouterr().err.count(told) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_program_and_the_trace_is_whole(number: signal.Signals, tmp_path: Path) -> None:
    code = """
import signal, sys, time
from tests.pages import PagedCache, keys_of
from kvortex.devices import HostDevice
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have what they put into the background ignore it
engine = PagedCache.plain(HostDevice()).engine()
for at in range(10**6):
    engine.check_blocks(keys_of(at))
    if at == 100: print("ready", flush=True)
    time.sleep(1e-4)
"""
    command = [*KVORTEX, "record", str(tmp_path / "t"), "--", sys.executable, "-c", code]
    child: Any = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.05)
    if number == signal.SIGINT:  # as a terminal does: to all
        os.killpg(child.pid, number)
    else:
        child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == (130 if number == signal.SIGINT else 5)
    requests = read_trace(tmp_path / "t").requests()
    assert requests == [[at] for at in range(len(requests))] and len(requests) > 100
    assert rows(err)["requests"] == str(len(requests))
