"""``kvortex demo``: that the chat is what it is said to be, that it evicts and hits, and that faults are found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvortex.cli import demo, main
from kvortex.devices import Device
from tests.cli import plant
from tests.cli.screen import FarDevice, rows
from tests.naive import replay_lru

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["demo", "--turns", "4", "--conversations", "3", "--system-tokens", "160"]
HOST = [*SMALL, "--device", "host"]


def test_conversations_take_turns_and_grow() -> None:
    prompts = demo.chat(conversations=3, turns=4, system_tokens=160, seed=0)
    assert len(prompts) == 12
    for at, prompt in enumerate(prompts):
        np.testing.assert_array_equal(prompt[:160], prompts[0][:160])
        if at >= 3:
            before = prompts[at - 3]
            assert 200 <= len(prompt) - len(before) < 600
            np.testing.assert_array_equal(prompt[: len(before)], before)
    assert not np.array_equal(prompts[0][160:240], prompts[1][160:240])
    again, other = (demo.chat(3, 4, 160, seed) for seed in (0, 1))
    assert all(map(np.array_equal, prompts, again)) and not np.array_equal(prompts[0], other[0])


def test_pages_of_a_turn_are_different_and_used_again() -> None:
    rng, seen = np.random.default_rng(0), []
    for first in range(0, 400, 40):
        ids = demo._take_pages(rng, first, 40, 50)
        assert len(set(ids.tolist())) == 40 and ids.min() >= 0 and ids.max() < 50
        seen += ids.tolist()
    assert set(seen) == set(range(50)) and seen != sorted(seen)


def test_it_saves_evicts_hits_and_verifies(device: Device, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--device", device.name, "--pool-blocks", "160"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"kvortex demo on {device.name}\n")
    table = rows(out)
    blocks = [[tuple(p[: (i + 1) * 16].tolist()) for i in range(len(p) // 16)] for p in demo.chat(3, 4, 160, 0)]
    hits = sum(replay_lru(blocks, 160))
    assert table["turns"].startswith("12 of 12 in ")
    assert table["blocks checked"] == str(sum(min(len(b), 160) for b in blocks))
    assert table["blocks hit"] == str(hits) and hits > 0
    assert table["hit rate"] == f"{hits / int(table['blocks checked']):.1%}"
    assert table["blocks loaded"].startswith(f"{hits} (")
    assert int(table["blocks evicted"]) > 0
    assert int(table["bytes verified"]) == hits * 8 * 2 * 8192
    assert (table["wrong bytes"], table["failed blocks"]) == ("0", "0")
    assert float(table["load, device-timed"].split()[0]) > 0 and float(table["save, device-timed"].split()[0]) > 0


def test_the_default_pool_is_too_small_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(HOST) == 0
    table = rows(capsys.readouterr().out)
    assert int(table["blocks evicted"]) > 0 and int(table["blocks hit"]) > 0


def test_a_chat_that_fits_hits_all_that_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*HOST, "--pool-blocks", "2000"]) == 0
    table = rows(capsys.readouterr().out)
    lengths = [len(prompt) // 16 for prompt in demo.chat(3, 4, 160, 0)]
    assert int(table["blocks hit"]) == 2 * 10 + sum(lengths[:-3])
    assert table["blocks evicted"] == "0"


def test_memory_that_is_far(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    far = FarDevice()
    monkeypatch.setattr(demo, "open_device", lambda name: far)
    assert main([*HOST, "--pool-blocks", "160"]) == 0
    assert int(rows(capsys.readouterr().out)["bytes verified"]) > 0
    assert len(far.buffers) == 8 and all(buffer.copies for buffer in far.buffers)


def test_a_flipped_bit_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    planted = plant.flip_a_byte(monkeypatch)
    assert main(HOST) == 1
    assert int(rows(capsys.readouterr().out)["wrong bytes"]) == len(planted) > 0


def test_a_load_that_brings_nothing_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plant.loads_do_nothing(monkeypatch)
    assert main(HOST) == 1
    table = rows(capsys.readouterr().out)
    assert table["wrong bytes"] == "0" and int(table["corrupt blocks"]) == int(table["blocks hit"]) > 0


def test_a_load_that_fails_is_told_and_computed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plant.loads_fail(monkeypatch)
    assert main(HOST) == 1
    table = rows(capsys.readouterr().out)
    assert (table["bytes verified"], table["wrong bytes"]) == ("0", "0")
    assert int(table["failed blocks"]) == int(table["blocks hit"]) > 0
    assert table["turns"].startswith("12 of 12")


def test_it_ends_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*HOST, "--seconds", "1e-9"]) == 0
    out, err = capsys.readouterr()
    assert rows(out)["turns"].startswith("0 of 12") and rows(out)["hit rate"] == "0.0%"
    assert "stopped after 1e-09 s" in err


def test_from_a_shell() -> None:
    command = [sys.executable, "-m", "kvortex", *HOST]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert rows(done.stdout)["wrong bytes"] == "0" and int(rows(done.stdout)["bytes verified"]) > 0
    assert done.stderr.count("\n") <= 3
