"""Recorded traces: what engines are asked for, in whole lines, whatever happens meanwhile."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvortex.devices import Device, HostDevice
from kvortex.errors import ArgumentError, ConfigError, EngineClosedError, PoolFullError, TraceError
from kvortex.traces import _ring
from kvortex.traces import recording as module
from kvortex.traces.format import read_trace
from kvortex.traces.recording import CHECK, LOAD, SAVE, Recording
from kvortex.traces.recordings import VARIABLE
from tests.conversations import conversations
from tests.pages import PagedCache, keys_of

ROOT = Path(__file__).resolve().parents[2]


def ids_of(path: Any) -> list[list[int]]:
    """Of each line, which must be whole."""
    text = Path(path).read_text()
    assert not text or text.endswith("\n")
    return [line["hash_ids"] for line in map(json.loads, text.splitlines()) if "hash_ids" in line]


def pending(recording: Recording) -> int:
    """Rows of its ring that are in use."""
    marks = recording._writer.ring.marks
    return int(marks[_ring.HEAD] - marks[_ring.TAIL])


class NaiveNames:
    """Numbers of keys in a dictionary that forgets by CLOCK, and which keys belong into a line."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.next, self.hand = capacity, 0, 0
        self.entries: list[dict[str, Any]] = []

    def line(self, kind: int, keys: Sequence[int]) -> list[int]:
        ids, named = [], []
        for key in keys:
            entry = next((one for one in self.entries if one["key"] == key), None)
            if entry is None:
                entry = {"key": key, "id": self.next, "again": False, "checked": 0, "wanted": False}
                self.next += 1
                self.put(entry, named)
            else:
                entry["again"] = True
            if entry in named:
                continue
            named.append(entry)
            known = kind != CHECK and (entry["checked"] > 0 or (kind == SAVE and entry["wanted"]))
            if not known:
                ids.append(entry["id"])
            if kind == CHECK:
                entry["checked"] += 1
            elif entry["checked"] and not (kind == SAVE and entry["wanted"]):
                entry["checked"] -= 1
            entry["wanted"] = kind == LOAD or (kind == CHECK and entry["wanted"])
        return ids

    def put(self, entry: dict[str, Any], named: list[dict[str, Any]]) -> None:
        if len(self.entries) < self.capacity:
            self.entries.append(entry)
            return
        while self.entries[self.hand]["again"] or self.entries[self.hand] in named:
            self.entries[self.hand]["again"] = False
            self.hand = (self.hand + 1) % self.capacity
        self.entries[self.hand] = entry
        self.hand = (self.hand + 1) % self.capacity


def test_what_an_engine_is_asked_for(device: Device, tmp_path: Path) -> None:
    cache = PagedCache.plain(device)
    with cache.engine(slots=8) as engine, engine.record(tmp_path / "t") as recording:
        engine.check_blocks(keys_of(1, 2, 3))
        engine.save_blocks(keys_of(1, 2, 3), [1, 2, 3]).wait()
        engine.check_blocks(keys_of(1, 2, 4, 5))
        engine.load_blocks(keys_of(1, 2), [4, 5]).wait()
        engine.save_blocks(keys_of(4, 5), [6, 7]).wait()
        engine.check_blocks(keys_of())  # a prompt without a full block
        engine.load_blocks(keys_of(7, 8, 1), [1, 2, 3]).wait()  # not checked since the last load ...
        engine.save_blocks(keys_of(7, 8), [1, 2]).wait()  # ... two missed, and are computed
        engine.save_blocks(keys_of(9), [9], layerwise=True).abort()
        engine.check_blocks([bytes(keys_of(2)[0])] * 2)
        for refused in (lambda: engine.save_blocks(keys_of(20, 20), [1, 2]), lambda: engine.load_blocks(keys_of(21), [99])):
            with pytest.raises(ArgumentError):
                refused()
        with pytest.raises(PoolFullError):
            engine.save_blocks(keys_of(*range(30, 39)), range(9))
    assert ids_of(tmp_path / "t") == [[0, 1, 2], [0, 1, 3, 4], [], [5, 6, 0], [7], [1]]
    assert (recording.lines, recording.dropped, recording.forgotten, recording.closed) == (6, 0, 0, True)
    lines = [json.loads(line) for line in (tmp_path / "t").read_text().splitlines()]
    assert [line["input_length"] for line in lines] == [48, 64, 0, 48, 16, 16] and lines[0]["block_size"] == 16
    assert [line["timestamp"] for line in lines] == sorted(line["timestamp"] for line in lines)
    assert list(lines[0]) == ["timestamp", "input_length", "output_length", "block_size", "hash_ids"]
    assert read_trace(tmp_path / "t").requests() == ids_of(tmp_path / "t")


def test_a_check_accounts_for_one_load_or_save(tmp_path: Path) -> None:
    with Recording(tmp_path / "t", 16) as recording:
        for kind in (CHECK, CHECK, LOAD, LOAD, LOAD, CHECK, LOAD, SAVE, SAVE, CHECK, SAVE, LOAD):
            recording.note(kind, keys_of(1))
    lines = [json.loads(line) for line in (tmp_path / "t").read_text().splitlines()]
    # Two were checked before they were loaded; the third load is one of its own, as is the last; the second save is unasked.
    assert [line.get("stored", False) for line in lines] == [False, False, False, False, True, False, False]
    with Recording(tmp_path / "u", 16) as recording:
        for kind in [CHECK] * 2**15 + [LOAD] * 2**14:
            recording.note(kind, keys_of(1))
    assert len(ids_of(tmp_path / "u")) == 2**15 + 1  # more than can be counted


@pytest.mark.parametrize("names", [32, 40, 64, 4096])
def test_numbers_are_the_naive_references(names: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EVERY_S", 1e-3)
    rng, naive, expected = np.random.default_rng(names), NaiveNames(names), []
    with Recording(tmp_path / "t", 16, ring_rows=32, names=names) as recording:
        for ids in conversations(400):
            kind, ids = int(rng.integers(3)), [*ids, *ids[: int(rng.integers(2))]][-31:]
            while pending(recording):  # the ring is small, and nothing is to be lost
                time.sleep(1e-4)
            recording.note(kind, keys_of(*ids))
            line = naive.line(kind, ids)
            expected += [line] if line or kind == CHECK else []
    assert ids_of(tmp_path / "t") == expected and recording.dropped == 0
    assert (recording.forgotten > 0) == (names < 4096) and len(set(sum(expected, []))) > 500


def test_a_key_of_the_call_itself_is_not_forgotten(tmp_path: Path) -> None:
    naive, expected = NaiveNames(4), []
    with Recording(tmp_path / "t", 16, ring_rows=4, names=4) as recording:
        for keys in ([1, 2, 3], [4], [1, 2, 3], [4], [1, 9], [1], [2]):  # when the 9 comes, all four have been named again
            recording.note(CHECK, keys_of(*keys))
            while pending(recording):
                time.sleep(0.01)
            expected.append(naive.line(CHECK, keys))
    assert ids_of(tmp_path / "t") == expected and expected[4:] == [[0, 4], [0], [5]]


def test_times_and_long_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Recording(tmp_path / "t", 1 << 40) as recording:
        for now[0] in (1000.0, 1001.5, 1001.25, 10**9 + 1000.0):  # noqa: B020
            recording.note(CHECK, keys_of(*range(12)))
        now[0] = 1000.0
    lines = [json.loads(line) for line in (tmp_path / "t").read_text().splitlines()]
    assert [line["timestamp"] for line in lines] == [0, 1500, 1500, 10**12]
    assert {line["input_length"] for line in lines} == {12 << 40} and lines[0]["hash_ids"] == list(range(12))
    with pytest.raises(ArgumentError, match="block_size"):
        Recording(tmp_path / "other", (1 << 40) + 1)
    assert not (tmp_path / "other").exists()


def test_calls_that_cannot_wait_are_left_out_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EVERY_S", 3600.0)
    recording = Recording(tmp_path / "t", 16, ring_rows=16)
    recording.note(CHECK, keys_of(1, 2, 3))
    recording.note(CHECK, keys_of(*range(12)))
    recording.note(CHECK, keys_of(*range(11)))
    assert (pending(recording), recording.dropped) == (16, 1)
    recording.note(CHECK, keys_of())
    assert recording.dropped == 2
    recording._writer._flush()
    assert (pending(recording), recording.lines) == (0, 2)
    recording.note(CHECK, keys_of(*range(40)))
    recording.note(SAVE, keys_of(1))  # in a line already: what is told waits for a line
    recording.note(CHECK, keys_of(1))
    recording.close()
    assert ids_of(tmp_path / "t") == [[0, 1, 2], [3, 0, 1, 2, *range(4, 11)], [0]] and recording.dropped == 3
    assert read_trace(tmp_path / "t").dropped == 3
    assert [json.loads(line).get("dropped") for line in (tmp_path / "t").read_text().splitlines()] == [None, 1, 2]


def test_calls_that_are_left_out_at_the_end_are_told(tmp_path: Path) -> None:
    for name, first, saved in (("t", [1, 2, 3], True), ("u", [1, 2], False), ("v", [], False)):
        recording = Recording(tmp_path / name, 16, ring_rows=16)
        for at, keys in enumerate([first, list(range(40)), list(range(17))]):
            if at or first:
                recording.note(CHECK, keys_of(*keys))
        if saved:  # it carries the number, and has no line of its own
            recording.note(SAVE, keys_of(1))
        recording.close()
        assert recording.dropped == 2 and ids_of(tmp_path / name) == ([list(range(len(first)))] if first else [])
        assert json.loads((tmp_path / name).read_text().splitlines()[-1])["dropped"] == 2
    for name in "tu":
        assert read_trace(tmp_path / name).dropped == 2 and len(read_trace(tmp_path / name)) == 1
    with pytest.raises(ArgumentError, match="no requests in it, and 2 calls are missing"):
        read_trace(tmp_path / "v")


def test_threads(tmp_path: Path) -> None:
    def work(number: int) -> None:
        for at in range(300):
            recording.note(CHECK, keys_of(*(1000 * number + one for one in range(at % 50))))

    with Recording(tmp_path / "t", 16) as recording:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = ids_of(tmp_path / "t")
    assert len(found) == 1200 == recording.lines and sorted(map(len, found)) == sorted([at % 50 for at in range(300)] * 4)
    assert len(set(sum(found, []))) == 4 * 49


def test_a_full_disk_ends_the_trace_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, room = os.write, [150]

    def full(file: int, data: Any) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        done = write(file, data[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(module.os, "write", full)
    cache = PagedCache.plain(HostDevice())
    engine = cache.engine()
    recording = engine.record(tmp_path / "t")
    for _ in range(3):
        engine.check_blocks(keys_of(1, 2))
    while not recording.closed:
        time.sleep(0.01)
    assert engine.save_blocks(keys_of(1), [1]).wait().all()
    whole = (tmp_path / "t").stat().st_size  # depends on the digits of a time
    assert whole < 150
    for _ in range(2):
        with pytest.raises(TraceError, match=f"No space left on device; the trace ends after {whole} bytes"):
            recording.close()
    assert ids_of(tmp_path / "t") == [[0, 1]]
    with pytest.raises(ZeroDivisionError), recording:
        raise ZeroDivisionError("of the body")
    with pytest.raises(TraceError), recording:
        pass
    engine.shutdown()

    room[0] = 150
    engine = cache.engine()
    recording = engine.record(tmp_path / "u")
    for _ in range(3):
        engine.check_blocks(keys_of(1, 2))
    while not recording.closed:
        time.sleep(0.01)
    for _ in range(3):
        engine.check_blocks(keys_of(1, 2))
    engine.shutdown()
    assert any("No space left on device" in note for note in engine.notes) and ids_of(tmp_path / "u") == [[0, 1]]
    assert (recording.lines, recording.dropped) == (1, 5)
    assert any(f"{tmp_path / 'u'} lacks 5 calls" in note and "slow" not in note for note in engine.notes)


def test_a_writer_that_dies_of_anything_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def die(*_: Any) -> Any:
        raise MemoryError

    engine = PagedCache.plain(HostDevice()).engine()
    recording = engine.record(tmp_path / "t")
    engine.check_blocks(keys_of(1, 2))
    while not recording._writer.whole:
        time.sleep(0.01)
    monkeypatch.setattr(module._lines, "write_lines", die)
    for _ in range(7):
        engine.check_blocks(keys_of(3))
    recording._writer._thread.join(60)
    whole = (tmp_path / "t").stat().st_size
    with pytest.raises(TraceError, match=f"t: MemoryError; the trace ends after {whole} bytes"):
        recording.close()
    engine.shutdown()
    assert any("MemoryError; the trace ends" in note for note in engine.notes) and ids_of(tmp_path / "t") == [[0, 1]]
    assert recording.dropped == 7  # which waited for it, or came later
    assert not capfd.readouterr().err


def held(path: Path) -> int:
    """Descriptors of this process for a file."""
    return sum(os.path.realpath(f"/proc/self/fd/{number}") == str(path.resolve()) for number in os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("end", ["close", "failure", "drop", "no start"])
def test_the_file_is_closed(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    if end == "no start":
        monkeypatch.setattr(module._Writer, "start", lambda *_: None)
    recording = Recording(tmp_path / "t", 16)
    assert held(tmp_path / "t") == 1
    thread = recording._writer._thread
    if end == "failure":
        monkeypatch.setattr(module.os, "write", full)
        recording.note(CHECK, keys_of(1))
    elif end == "drop":
        del recording
        gc.collect()
    else:
        recording.close()
    if end != "no start":
        thread.join(10)
    assert held(tmp_path / "t") == 0


def test_a_writer_that_hangs_does_not_hang_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, write = threading.Event(), os.write

    def slow(file: int, data: Any) -> int:
        go.wait(30)
        return write(file, data)

    monkeypatch.setattr(module.os, "write", slow)
    recording = Recording(tmp_path / "t", 16, ring_rows=64)
    for _ in range(100):
        recording.note(CHECK, keys_of(1, 2))
        time.sleep(1e-3)
    assert recording.dropped > 0
    with pytest.raises(TraceError, match="still being written after 0.05 seconds"):
        recording.close(0.05)
    go.set()
    recording.close()
    assert len(ids_of(tmp_path / "t")) == 100 - recording.dropped


def test_files_that_cannot_be_had(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("an hour of work")
    cache = PagedCache.plain(HostDevice())
    with cache.engine() as engine:
        for path, message in (
            (tmp_path / "there", "is there already"),
            (tmp_path, "is there already"),
            (tmp_path / "no" / "folder", "No such file"),
            ("x" * 10**5, "name too long"),
            ("a\0b", "no trace can be written there"),
            (3, "must be a string or a Path; seen: int"),
        ):
            with pytest.raises(ArgumentError, match=message) as caught:
                engine.record(path)  # type: ignore[arg-type]
            assert len(str(caught.value)) < 400
    assert (tmp_path / "there").read_text() == "an hour of work" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(EngineClosedError):
        engine.record(tmp_path / "late")
    assert not (tmp_path / "late").exists()


def test_as_the_config_or_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PagedCache.plain(HostDevice())

    def use(**options: Any) -> None:
        with cache.engine(**options) as engine:
            engine.check_blocks(keys_of(1))

    use()
    assert not list(tmp_path.iterdir())
    use(record_trace=str(tmp_path / "t.jsonl"))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "t.jsonl"))
    use()
    use(record_trace="")
    use(record_trace=str(tmp_path / "u"))
    assert {path.name: ids_of(path) for path in tmp_path.iterdir()} == {name: [[0]] for name in ("t.jsonl", "t-2.jsonl", "u")}
    with pytest.raises(ConfigError, match="^record_trace = '/no/such/t': /no/such/t: no trace can be written there"):
        use(record_trace="/no/such/t")
    for path in (tmp_path, "/dev/null"):
        with pytest.raises(ConfigError, match="is there, and is no regular file"):
            use(record_trace=str(path))


def test_several_recordings_of_one_engine(tmp_path: Path) -> None:
    cache = PagedCache.plain(HostDevice())
    with cache.engine() as engine:
        first = engine.record(tmp_path / "a")
        engine.check_blocks(keys_of(5))
        with engine.record(tmp_path / "b"):
            engine.check_blocks(keys_of(6))
        engine.check_blocks(keys_of(5, 6))
    assert first.closed and ids_of(tmp_path / "a") == [[0], [1], [0, 1]] and ids_of(tmp_path / "b") == [[0]]


def test_a_recording_that_is_dropped_writes_what_it_has(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "t", 16)
    recording.note(CHECK, keys_of(1, 2))
    thread = recording._writer._thread
    del recording
    gc.collect()
    thread.join(5)
    assert not thread.is_alive() and ids_of(tmp_path / "t") == [[0, 1]]


ENDINGS = {
    "the end": "",
    "an error": "raise SystemExit(3)",
    "a signal": "import os, signal; signal.raise_signal(signal.SIGINT)",
    "a child": "import os\nif not os.fork():\n    engine_check(7); sys.exit()\nos.wait()",
    "a child that shuts down": "import os\nif not os.fork():\n    engine.shutdown(); recording.close(); sys.exit()\nos.wait()",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_process_that_ends(ending: str, tmp_path: Path) -> None:
    code = f"""
import sys
from tests.pages import PagedCache, keys_of
from kvortex.devices import HostDevice
from kvortex.errors import EngineClosedError
engine = PagedCache.plain(HostDevice()).engine()
recording = engine.record({str(tmp_path / "t")!r})
def engine_check(key):
    try:
        engine.check_blocks(keys_of(key))
    except EngineClosedError:
        recording.note(0, keys_of(key))
for at in range(200):
    engine.check_blocks(keys_of(at, at + 1))
{ENDINGS[ending]}
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, timeout=120, capture_output=True)
    assert ids_of(tmp_path / "t") == [[at, at + 1] for at in range(200)]
