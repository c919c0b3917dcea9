"""Every measurement runs small on the host device, writes what it promises, and sees a wrong byte."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import kvortex
from kvortex.codecs import CODECS
from kvortex.devices import HostDevice
from kvortex.memory.arena import PinnedArena
from kvortex.transfer import host
from kvortex.transfer.executor import Direction
from perf import __main__ as program
from perf import beside, codecs, coded, compute, duplex, faults, fragments, gil, keys, link, pinned, report, share, submit
from perf.baselines import fragmentwise
from perf.methods import Kvortex, Raw
from perf.pages import Pages
from perf.raw import RawCopy
from perf.report import Report

NEED_A_GPU = {"beside", "compute", "share"}
NEED_JAX = {"ttft"}  # which has threads, and tests fork: test_ttft.py runs it in another process
NEED_WEIGHTS = {"prefix"}  # of a model, and minutes
FACTS = ("date", "device", "python", "kvortex", "packages")


@pytest.fixture(scope="module", params=sorted(set(program.QUESTIONS) - NEED_A_GPU - NEED_JAX - NEED_WEIGHTS))
def answer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A question, and the folder with what it wrote; run once for all tests."""
    if request.param == "codecs" and not codecs.SAMPLE.exists():
        pytest.skip(f"the sample of real KV is not at {codecs.SAMPLE.name} beside the checkout")
    folder = tmp_path_factory.mktemp(request.param) / "deep" / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "QUICK_FAULTS", 60)  # each campaign has a test of its own, with more
        assert program.main([request.param, "--quick", "--device", "host", "--out", str(folder)]) == 0
    return request.param, folder


def result_of(answer: tuple[str, Path]) -> dict[str, Any]:
    name, folder = answer
    return json.loads((folder / f"{name}-host.json").read_text())


def test_the_result_says_where_and_how_it_was_measured(answer: tuple[str, Path]) -> None:
    name, folder = answer
    result = result_of(answer)
    assert result["name"] == name
    assert result["command"] == f"python -m perf {name} --device host --quick"
    assert str(folder) not in json.dumps(result)
    assert result["environment"]["commit"] == report.commit(report.ROOT)
    assert all(result["environment"][fact] for fact in FACTS)
    assert result["environment"]["device"]["device"] == "host" and result["environment"]["kvortex"] == kvortex.__version__
    assert result["environment"]["packages"]["numpy"] == np.__version__ and result["environment"]["date"].endswith("+00:00")


def test_rows_are_whole_and_no_byte_is_wrong(answer: tuple[str, Path]) -> None:
    name, _ = answer
    result, question = result_of(answer), program.QUESTIONS[name]
    rows = result["rows"]
    assert rows and all(set(question.COLUMNS) <= set(row) for row in rows)
    assert result["keys"] == list(question.KEYS) and result["better"] == question.BETTER
    assert set(question.KEYS) | set(question.BETTER) | {"wrong_bytes"} <= set(question.COLUMNS)
    assert len({tuple(row[key] for key in question.KEYS) for row in rows}) == len(rows), "keys tell rows apart"
    for row in rows:
        assert row["wrong_bytes"] == 0
        assert all(np.isfinite(value) and value >= 0 for value in row.values() if isinstance(value, (int, float)))


def test_the_other_methods_are_there_or_said_to_be_missing(answer: tuple[str, Path]) -> None:
    result = result_of(answer)
    if "methods" not in result["notes"]:
        return
    seen = {row.get("method", row.get("route")) for row in result["rows"]}
    for name, how in result["notes"]["methods"].items():
        assert how.startswith("not compared: ") == (name in ("one batch", "cupy", "torch"))
        assert how.startswith("not compared: ") or name in seen | {"raw", "kvortex"}
    assert "per fragment" in seen


def test_the_picture_is_written(answer: tuple[str, Path]) -> None:
    pytest.importorskip("matplotlib")
    name, folder = answer
    assert (folder / f"{name}-host.png").read_bytes().startswith(b"\x89PNG")


def test_committed_results_name_no_place_of_a_machine() -> None:
    found = sorted((report.ROOT / "perf" / "results").glob("*.json"))
    assert found
    for path in found:
        command = json.loads(path.read_text(encoding="utf-8"))["command"]
        assert command.startswith("python -m perf ") and "/" not in command and "--out" not in command, path


def test_the_commit_that_was_measured(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    assert report.commit(tmp_path) is None
    git("init", "--quiet")
    assert report.commit(tmp_path) is None, "nothing was committed yet"
    for name in ("code.py", "perf/results/x.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    git("add", "-A")
    git("commit", "--quiet", "-m", "first")
    head = git("rev-parse", "--short", "HEAD")
    assert report.commit(tmp_path) == head
    (tmp_path / "perf/results/x.json").write_text("two")
    assert report.commit(tmp_path) == head
    (tmp_path / "code.py").write_text("two")
    assert report.commit(tmp_path) == f"{head}+dirty"
    (tmp_path / "copy").mkdir()
    assert report.commit(tmp_path / "copy") is None


def test_no_commit_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", "")
    assert report.commit(tmp_path) is None


@pytest.mark.parametrize("out", ["file", "file/deep", "/dev/full", "/proc/no"])
def test_a_folder_that_cannot_be_written_is_told_before_measuring(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(fragments, "measure", lambda *_, **__: pytest.fail("measured"))
    assert program.main(["fragments", "--quick", "--device", "host", "--out", str(tmp_path / out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"perf: --out {tmp_path / out}: no file can be written there") and error.count("\n") == 1


@pytest.mark.usefixtures("small")
def test_a_disk_that_fills_up_ends_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert program.main(["fragments", "--quick", "--device", "host", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith(f"perf: --out {tmp_path}: No space left on device\n")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One size of fragments."""
    monkeypatch.setattr(fragments, "FRAGMENT_BYTES", (16 << 10,))


@pytest.mark.usefixtures("small")
def test_no_picture_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert program.main(["fragments", "--quick", "--device", "host", "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["fragments-host.json"]
    out = capsys.readouterr().out
    assert "wrong_bytes" in out and out.count("wrote ") == 1 and out.rstrip().endswith("fragments-host.json")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("to_host", [True, False])
def test_a_wrong_byte_is_counted(monkeypatch: pytest.MonkeyPatch, to_host: bool) -> None:
    """One byte of one block, spoiled on its way back; one on its way out the engine sees, and it is no measurement."""
    copy, spoiled = host.copy_paged, []

    def spoil(memcpy: int, rows: Any, blocks: Any, records: Any, sums: Any, out: bool, fixed: Any) -> None:
        copy(memcpy, rows, blocks, records, sums, out, fixed)
        if out == to_host and len(spoiled) < 1:
            address = int(records[0]) + 5 if out else int(rows[3, 0] + blocks[0] * rows[3, 1]) + 5
            spoiled.append(address)
            cell = np.ctypeslib.as_array((ctypes.c_uint8 * 1).from_address(address))
            cell[0] ^= 1

    monkeypatch.setattr(host, "copy_paged", spoil)
    if to_host:  # the engine sees it by itself
        with pytest.raises(kvortex.TransferError, match="not what was saved"):
            fragments.measure("host", quick=True)
        return
    _, rows, _ = fragments.measure("host", quick=True)
    assert len(spoiled) == 1 and {row["method"]: row["wrong_bytes"] for row in rows} == {
        "raw": 0,
        "kvortex": 1,
        "per fragment": 0,
    }


@pytest.mark.usefixtures("small")
def test_a_write_to_another_page_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte of a page that is neither loaded nor saved into."""
    submit, spoiled = host.HostExecutor.prepare_blocks, []

    def spoil(self: host.HostExecutor, direction: Direction, blocks: np.ndarray, *others: Any) -> object:
        if direction is Direction.LOAD and not spoiled:
            base, stride, _, _ = self._fragments[7].tolist()
            spoiled.append(base + int(np.setdiff1d(np.arange(2 * len(blocks)), blocks)[0]) * stride)
            ctypes.memmove(spoiled[0], bytes([ctypes.string_at(spoiled[0], 1)[0] ^ 1]), 1)
        return submit(self, direction, blocks, *others)

    monkeypatch.setattr(host.HostExecutor, "prepare_blocks", spoil)
    _, rows, _ = fragments.measure("host", quick=True)
    assert len(spoiled) == 1 and {row["method"]: row["wrong_bytes"] for row in rows} == {
        "raw": 0,
        "kvortex": 1,
        "per fragment": 0,
    }


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("method", ["save", "load"])
def test_a_wrong_byte_of_another_method_is_counted(
    monkeypatch: pytest.MonkeyPatch, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, to_host = fragmentwise.copy_paged, method == "save"

    def spoil(memcpy: int, rows: Any, blocks: Any, records: Any, sums: Any, out: bool, fixed: Any) -> None:
        copy(memcpy, rows, blocks, records, sums, out, fixed)
        if out == to_host:
            flip(int(records[0]) + 5 if out else int(rows[3, 0] + blocks[0] * rows[3, 1]) + 5)

    monkeypatch.setattr(fragmentwise, "copy_paged", spoil)
    assert program.main(["fragments", "--quick", "--device", "host", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith("perf: 1 bytes were wrong; see the column wrong_bytes\n")
    rows = json.loads((tmp_path / "fragments-host.json").read_text())["rows"]
    assert [row["wrong_bytes"] for row in rows] == [0, 0, 1]


def flip(address: int) -> None:
    """One bit of a byte."""
    ctypes.memmove(address, bytes([ctypes.string_at(address, 1)[0] ^ 1]), 1)


@pytest.mark.parametrize("to_host", [True, False])
def test_a_wrong_byte_of_a_raw_copy_is_counted(monkeypatch: pytest.MonkeyPatch, to_host: bool) -> None:
    timed = RawCopy.seconds

    def spoil(raw: RawCopy, *, to_host: bool, nbytes: int | None = None) -> float:
        seconds = timed(raw, to_host=to_host, nbytes=nbytes)
        if to_host == spoiled:
            flip(raw._pair(to_host)[0])
        return seconds

    spoiled = to_host
    monkeypatch.setattr(RawCopy, "seconds", spoil)
    monkeypatch.setattr(link, "SIZES", (1 << 16,))
    _, rows, _ = link.measure("host", quick=True)
    assert [row["wrong_bytes"] for row in rows] == [1, 1]


@pytest.mark.parametrize("which", ["save", "load"])
def test_a_wrong_byte_of_both_ways_at_once_is_counted(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    """Spoiled in what is loaded while both directions run: not in the first transfers, one at a time. In what is saved the
    engine sees it."""
    monkeypatch.setattr(duplex, "FRAGMENT_BYTES", (16 << 10,))
    copy, to_host, calls = host.copy_paged, which == "save", [0]

    def spoil(memcpy: int, rows: Any, blocks: Any, records: Any, sums: Any, out: bool, fixed: Any) -> None:
        copy(memcpy, rows, blocks, records, sums, out, fixed)
        calls[0] += 1
        if out == to_host and calls[0] > 10:
            flip(int(records[0]) + 5 if out else int(rows[3, 0] + blocks[0] * rows[3, 1]) + 5)

    monkeypatch.setattr(host, "copy_paged", spoil)
    if to_host:
        with pytest.raises(kvortex.TransferError, match="not what was saved"):
            duplex.measure("host", quick=True)
        return
    _, rows, _ = duplex.measure("host", quick=True)
    assert all((row["wrong_bytes"] > 0) == (row["method"] == "kvortex") for row in rows)


@pytest.mark.parametrize("which", ["save", "load"])
def test_a_wrong_byte_of_another_method_both_ways_at_once_is_counted(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    monkeypatch.setattr(duplex, "FRAGMENT_BYTES", (32 << 10,))
    copy, to_host = fragmentwise.copy_paged, which == "save"

    def spoil(memcpy: int, rows: Any, blocks: Any, records: Any, sums: Any, out: bool, fixed: Any) -> None:
        copy(memcpy, rows, blocks, records, sums, out, fixed)
        if out == to_host:
            flip(int(records[0]) + 5 if out else int(rows[3, 0] + blocks[0] * rows[3, 1]) + 5)

    monkeypatch.setattr(fragmentwise, "copy_paged", spoil)
    _, rows, _ = duplex.measure("host", quick=True)
    assert {row["wrong_bytes"] for row in rows if row["method"] == "per fragment"} == {1}
    assert {row["wrong_bytes"] for row in rows if row["method"] != "per fragment"} == {0}


def spinning() -> int:
    return sum(thread.name.startswith("spin-") for thread in threading.enumerate())


def test_spinning_threads_count_and_end() -> None:
    with gil.Spinners(3) as spinners:
        assert spinning() == 3
        assert gil._counted(spinners, lambda: time.sleep(0.05)) > 1000
    assert spinning() == 0 and all(spinners._counts)


def test_threads_spin_beside_every_other_transfer() -> None:
    seen: list[int] = []

    def move(_: np.ndarray) -> float:
        seen.append(spinning())
        return 0.5 if seen[-1] else 0.25

    figures = gil._beside(move, np.arange(1), 10**9, rounds=2)
    assert seen == [0, 0, 8, 8] * 2
    assert figures["rate_idle"] == pytest.approx(4) and figures["rate_busy"] == pytest.approx(2) and figures["ratio"] == 0.5


def test_a_thread_that_is_kept_from_counting_is_seen() -> None:
    def move(_: np.ndarray) -> float:
        ends = time.perf_counter() + 0.02
        while time.perf_counter() < ends:  # holds the GIL as much as it can
            pass
        return 0.02

    def idle(_: np.ndarray) -> float:
        time.sleep(0.02)
        return 0.02

    found = []
    for _ in range(20):  # whoever else computes on this machine may begin or end while one thread counts alone
        found.append([[gil._spin_ratio(each, np.arange(1), 0.1) for each in (move, idle)] for _ in range(3)])
        kept, free = np.array(found[-1]).T
        if (kept < 0.75 * free).all() and 0.8 < np.median(free) < 1.3:
            return
    pytest.fail(f"{found}")


def test_only_the_call_counts_as_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ticket:
        def __init__(self) -> None:
            time.sleep(0.02)

    monkeypatch.setattr(submit, "moved", lambda ticket: time.sleep(0.2))
    wall, cpu = submit._timed(Ticket)  # type: ignore[arg-type]
    assert 0.02 <= wall < 0.2 and cpu < 0.02


def test_keys_of_a_method_are_never_used_twice() -> None:
    pages = Pages(HostDevice(), 4 << 10, 1 << 20)
    try:
        method, (source, target) = Kvortex(pages), pages.halves()
        for _ in range(3):
            assert method.save(source) > 0 and method.load(target) > 0  # a save that moves nothing raises
    finally:
        pages.close()


def test_the_slower_methods_run_every_other_time() -> None:
    class Counted(Raw):
        def __init__(self, name: str) -> None:
            self.name, self.calls = name, 0  # type: ignore[misc]

        def save(self, blocks: np.ndarray) -> float:
            self.calls += 1
            return 100.0 if self.calls == 1 else 1.0

        load = save

    class Halves:
        def halves(self) -> tuple[int, int]:
            return 0, 0

    methods = [Counted(name) for name in "abc"]
    found = fragments._times(methods, 2, Halves(), 4)  # type: ignore[arg-type]
    assert [method.calls for method in methods] == [10, 6, 6]
    assert found == {name: {"save": 1.0, "load": 1.0} for name in "abc"}, "without the first round"


@pytest.mark.usefixtures("small")
def test_a_miss_is_no_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(host, "copy_paged", broken)
    assert program.main(["fragments", "--quick", "--device", "host", "--out", str(tmp_path)]) == 2
    assert "failed" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_bad_device_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("abacus", "cuda:999"):
        assert program.main(["fragments", "--quick", "--device", device, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("perf: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["weather"], ["fragments", "--fast"]])
def test_bad_arguments_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        program.main(arguments)
    assert caught.value.code == 2 and "usage: python -m perf" in capsys.readouterr().err


def test_a_raw_copy_copies() -> None:
    device = HostDevice()
    raw = RawCopy(device, 100_000)
    try:
        data = np.random.default_rng(0).integers(0, 256, raw.nbytes, np.uint8)
        raw._buffer.write(data)
        assert raw.seconds(to_host=True) > 0
        assert (raw._arena.view(0, raw.nbytes) == data).all()
        raw._buffer.write(np.zeros(raw.nbytes, np.uint8))
        assert raw.seconds(to_host=False) > 0
        assert (raw._buffer.read() == data).all()
    finally:
        raw.close()


@pytest.mark.usefixtures("small")
def test_everything_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    arenas: list[PinnedArena] = []
    opened = PinnedArena.__init__

    def remember(arena: PinnedArena, *arguments: Any, **options: Any) -> None:
        arenas.append(arena)
        opened(arena, *arguments, **options)

    monkeypatch.setattr(PinnedArena, "__init__", remember)
    fragments.measure("host", quick=True)
    assert len(arenas) == 3 and all(arena._mapping is None for arena in arenas), "of a raw copy, an engine, a baseline"


def test_all_goes_on_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise kvortex.DeviceError("refused")

    def breaks(*_: object, **__: object) -> None:
        raise RuntimeError("broken\nto pieces")

    def answers(*_: object, **__: object) -> Any:
        asked.append(1)
        return "host", [{"size_kib": 1, "direction": "save", "wrong_bytes": 0} | dict.fromkeys(link.BETTER, 1.0)], {}

    asked: list[int] = []
    monkeypatch.setattr(compute, "measure", refuses)
    monkeypatch.setattr(duplex, "measure", breaks)
    monkeypatch.setattr(link, "measure", answers)
    monkeypatch.setattr(link, "draw", lambda *_: None)
    monkeypatch.setattr(program, "QUESTIONS", {"compute": compute, "duplex": duplex, "link": link})
    assert program.main(["all", "--quick", "--device", "host", "--out", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    for line in ("[1/3] compute …", "perf: refused", "[2/3] duplex …", "perf: duplex: RuntimeError: broken", "[3/3] link …"):
        assert line in errors
    assert errors.endswith("perf: 2 of 3 questions failed: compute, duplex\n") and asked == [1]
    command = json.loads((tmp_path / "link-host.json").read_text())["command"]
    assert command == "python -m perf link --device host --quick"
    monkeypatch.setattr(program, "QUESTIONS", {"link": link})
    assert program.main(["all", "--quick", "--device", "host", "--out", str(tmp_path)]) == 0


def test_versions_of_libraries_that_were_used_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__="1.2.3"))
    monkeypatch.setitem(sys.modules, "cupy", None)
    packages = report.environment("host")["packages"]
    assert packages["torch"] == "1.2.3" and "cupy" not in packages


def test_tables_are_aligned() -> None:
    result = Report("x", "", {}, {}, [{"a": 1.23456, "long": 7}, {"a": 123456.0, "long": "text"}])
    lines = result.table(["a", "long"]).splitlines()
    assert [line.split() for line in lines] == [["a", "long"], ["1.23", "7"], ["1.23e+05", "text"]]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("name", sorted(NEED_A_GPU))
def test_what_needs_a_gpu_says_so(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([name, "--quick", "--device", "host", "--out", str(tmp_path)]) == 2
    assert "needs a GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_moving_beside_computation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(compute, "LOADS", ("sdpa",))
    monkeypatch.setattr(compute, "FRAGMENT_BYTES", (32 << 10,))
    _, rows, _ = compute.measure("cuda", quick=True)
    assert len(rows) == 2 * len(compute.ROUTES) and all(row["wrong_bytes"] == 0 and row["raw_rate"] > 0 for row in rows)


@pytest.mark.gpu
def test_coded_blocks_beside_computation() -> None:
    pytest.importorskip("torch")
    _, rows, notes = beside.measure("cuda", quick=True)
    seen = {(row["codec"], row["direction"]) for row in rows}
    assert seen == {(codec, way) for codec in ("raw", *coded.BARS) for way in ("save", "load")}
    assert set(notes["left_out"]) == {"cachegen"}
    assert all(row["wrong_bytes"] == 0 and row["alone"] > 0 and set(beside.COLUMNS) <= set(row) for row in rows)


def test_every_codec_has_a_share_of_the_link() -> None:
    """Also those that no engine of a GPU takes, which are asked for before that is known."""
    for name in CODECS:
        ((save, load),) = beside.own_share(name, 0.5, 0.4).values()
        assert 0 < load < save <= 1 or load == save == 1, name


@pytest.mark.gpu
def test_shares_of_the_link_beside_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(share, "SHARES", (0.25, 1.0))
    _, rows, notes = share.measure("cuda", quick=True)
    assert "failed" not in notes and all(row["wrong_bytes"] == 0 and set(share.COLUMNS) <= set(row) for row in rows)
    rates = {(row["share"], row["direction"]): row["rate"] for row in rows}
    assert all(rates[0.25, way] < 0.6 * rates[1.0, way] for way in ("save", "load"))


def test_shares_of_the_link_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    one = dict.fromkeys(share.COLUMNS, 1.01)
    rows = [{**one, "share": part, "rate": 50 * part, "direction": way} for part in (0.25, 1.0) for way in ("save", "load")]
    environment: dict[str, Any] = {"device": {"gpu": "a GPU"}}
    written = Report("share", "", environment, {}, rows).write(tmp_path, share.draw)
    assert [path.suffix for path in written] == [".json", ".png"] and all(path.stat().st_size for path in written)


def test_pinned_memory_that_changes_bytes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    device, read = HostDevice(), type(HostDevice().allocate(1)).read

    def wrong(buffer: Any, *arguments: Any) -> Any:
        found = read(buffer, *arguments).copy()
        found[7] ^= 1
        return found

    arena = PinnedArena(device, 3 * pinned.SLOT_BYTES, pinned.SLOT_BYTES)
    assert pinned._wrong_bytes(device, arena) == 0
    arena.view(0)[:] = 0
    arena.view(2)[:] = 0
    monkeypatch.setattr(type(device.allocate(1)), "read", wrong)
    assert pinned._wrong_bytes(device, arena) == 2
    arena.close()


def test_a_pool_that_stays_small_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvortex.memory.arena.SEGMENT_BYTES", pinned.SLOT_BYTES)
    device, pin = HostDevice(), HostDevice.pin
    calls: list[int] = []

    def once(self: HostDevice, address: int, nbytes: int) -> None:
        calls.append(address)
        if len(calls) > 1:
            raise kvortex.DeviceError("no more")
        pin(self, address, nbytes)

    monkeypatch.setattr(HostDevice, "pin", once)
    with pytest.raises(kvortex.PinnedMemoryError, match="1 of 3 slots became ready: .*no more"):
        pinned._arena(device, 3 * pinned.SLOT_BYTES)


def test_a_wrong_key_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of one key, spoiled on the way out; and a key too few."""
    block_keys = keys.VllmKeys.block_keys

    def spoiled(*arguments: Any, **about: Any) -> Any:
        found = block_keys(*arguments, **about)
        found[-1, 5] ^= 1
        return found

    right = keys._questions(64)["vllm", "array"]
    assert keys._wrong_bytes(right[0](), right[1]()) == 0
    monkeypatch.setattr(keys.VllmKeys, "block_keys", spoiled)
    assert keys._wrong_bytes(right[0](), right[1]()) == 1
    assert keys._wrong_bytes(right[0]()[:-1], right[1]()) == 4 * 32


def test_keys_without_cbor2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "tests.naive_keys", raising=False)
    monkeypatch.setitem(sys.modules, "cbor2", None)
    assert program.main(["keys", "--quick", "--out", str(tmp_path)]) == 2
    assert "keys needs cbor2" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_counting_thread_that_waits_for_the_gil_is_seen() -> None:
    """Hashing leaves the GIL alone, a loop in Python does not; by counts that other processes do not change."""

    def hog() -> None:
        ends = time.perf_counter() + 0.02
        while time.perf_counter() < ends:
            sum(range(100))

    found = []
    for _ in range(10):
        found.append(keys._spins(keys._questions(16384)["kvortex", "array"][0], hog, 3))
        if found[-1]["spin_ratio"] > 0.85 and found[-1]["other_spin_ratio"] < 0.8:
            return
    pytest.fail(f"{found}")


def test_tiers_in_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["tiers", "--parts", "disk,nothing", "--out", str(tmp_path)]) == 2
    assert "--parts nothing: there are disk, engines, remote, replay" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert program.main(["tiers", "--quick", "--parts", "engines", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "tiers-host.json").read_text())
    assert written["command"].endswith("tiers --device auto --quick --parts engines")
    assert list(written["notes"]["parts"]) == ["engines"]
