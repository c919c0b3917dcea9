"""``kvortex replay``: hits as the reference counts them, every byte verified, and faults found."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from kvortex.cli import main, plot, replay_data
from kvortex.devices import Device
from kvortex.index import POLICIES
from kvortex.traces.belady import bound
from kvortex.traces.format import read_trace
from tests.cli import plant
from tests.cli.screen import FarDevice, rows
from tests.conversations import MOONCAKE, conversations, write
from tests.naive import replay as naive_replay
from tests.naive import replay_lru

SMALL = ["--record-bytes", "1KiB", "--device", "host"]


@pytest.mark.parametrize("blocks", [1, 7, 30, 1000])
def test_hits_are_the_references(device: Device, tmp_path: Path, blocks: int, capsys: pytest.CaptureFixture[str]) -> None:
    requests = conversations(120)
    trace, out = write(tmp_path / "trace.jsonl", requests), tmp_path / "out.json"
    command = ["replay", trace, "--blocks", str(blocks), "--json", str(out), "--record-bytes", "2KiB", "--device", device.name]
    assert main(command) == 0
    report = json.loads(out.read_text())
    expected = replay_lru(requests, blocks)
    assert report["hits"] == expected
    assert report["prefix_hits"] == sum(expected) == report["loaded_blocks"]
    assert report["verified_bytes"] == report["loaded_bytes"] == sum(expected) * 2048
    assert (report["wrong_bytes"], report["failed_blocks"]) == (0, 0)
    assert report["requests"] == 120 and report["pool_blocks"] == blocks
    assert report["block_references"] == sum(map(len, requests))
    assert report["blocks_beyond_pool"] == sum(max(0, len(ids) - blocks) for ids in requests)
    assert report["evictions"] == max(0, report["saved_blocks"] - blocks)
    assert report["command"] == ["kvortex", *command]
    assert report["device"]["device"] == device.name
    assert {"python", "kvortex", "numpy", "numba"} <= set(report["versions"])
    table = rows(capsys.readouterr().out)
    assert table["prefix hits"].startswith(f"{sum(expected)} (") and table["wrong bytes"] == "0"
    assert ("left out" in table) == (blocks < max(map(len, requests)))


@pytest.mark.skipif(not MOONCAKE.exists(), reason="the Mooncake conversation trace is not beside the checkout")
@pytest.mark.parametrize("blocks", [300, 3000])
def test_a_recorded_trace_hits_as_the_reference_does(blocks: int, capsys: pytest.CaptureFixture[str]) -> None:
    with MOONCAKE.open() as lines:
        records = [json.loads(line) for line, _ in zip(lines, range(1000), strict=False)]
    expected = replay_lru([record["hash_ids"][: record["input_length"] // 512] for record in records], blocks)
    assert main(["replay", str(MOONCAKE), "--limit", "1000", "--blocks", str(blocks), "--json", "-", "--device", "host"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["hits"] == expected and sum(expected) > 0
    assert report["wrong_bytes"] == report["failed_blocks"] == 0
    assert report["verified_bytes"] == sum(expected) * 16384
    assert report["evictions"] > 0


def test_a_trace_that_ends_within_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = conversations(20)
    trace = write(tmp_path / "t", requests)
    whole = Path(trace).read_bytes()
    for cut in (-1, -2, -30, -len(whole.splitlines()[-1])):  # without the line's end, it is whole still
        Path(trace).write_bytes(whole[:cut])
        assert main(["replay", trace, "--no-data", "--json", "-"]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["hits"] == replay_lru(requests[: 20 if cut == -1 else 19], 3000)
        assert ("ends within a line" in err) == (cut != -1)


def test_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = conversations(20)
    trace = write(tmp_path / "trace.jsonl", requests)
    with open(trace, "a") as file:
        file.write("what is behind the limit is not looked at\n")
    assert main(["replay", trace, "--limit", "20", "--json", "-", *SMALL]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["hits"] == replay_lru(requests, 3000)  # nothing but JSON is on stdout
    assert err.count("\n") <= 2


def test_requests_without_a_full_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = write(tmp_path / "trace.jsonl", [[], [], []])
    assert main(["replay", trace, "--json", "-", *SMALL]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["hits"] == [0, 0, 0] and report["block_references"] == 0 and report["prefix_hit_rate"] == 0


def test_memory_that_is_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    requests = conversations(40)
    monkeypatch.setattr(replay_data, "open_device", lambda name: FarDevice())
    assert main(["replay", write(tmp_path / "t", requests), "--blocks", "40", "--json", "-", *SMALL]) == 0
    assert json.loads(capsys.readouterr().out)["hits"] == replay_lru(requests, 40)


@pytest.mark.parametrize("fault", [plant.flip_a_byte, plant.loads_do_nothing, plant.loads_fail])
def test_faults_are_found(
    fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = conversations(40)
    planted = fault(monkeypatch)
    assert main(["replay", write(tmp_path / "t", requests), "--json", "-", *SMALL]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["hits"] == replay_lru(requests, 3000), "what is damaged is dropped, and saved anew"
    if planted is not None:
        assert report["wrong_bytes"] == len(planted) > 0
    elif fault is plant.loads_do_nothing:
        assert report["corrupt_blocks"] == report["prefix_hits"] > 0 == report["wrong_bytes"] == report["verified_bytes"]
    else:
        assert report["failed_blocks"] == report["prefix_hits"] > 0 == report["wrong_bytes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--record-bytes", "1000"], "must be a multiple of 1024"),
        (["--record-bytes", "0"], "must be a multiple of 1024"),
        (["--json", "/no/such/folder/x.json"], "--json /no/such/folder/x.json: no file can be written there"),
        (["--device", "tpu"], "'tpu' is no device"),
        (["--record-bytes", "1KiB", "--blocks", "100000000000"], "bytes of host memory"),
        (["--record-bytes", "1KiB", "--blocks", "100000000000"], "lower --pool-blocks"),
        (["--blocks", str(2**63 - 1)], "--pool-blocks: 9223372036854775807 blocks of 16384 bytes are more"),
        (["--record-bytes", "2TiB"], "must be a multiple of 1024, 1099511627776 at most"),
        (["--record-bytes", "9" * 90 + "TiB"], "must be a multiple of 1024"),
        (["--json", ""], "--json '': names no file"),
        (["--plot", ""], "--plot '': names no file"),
        (["--plot", "-"], "--plot -: a picture goes to a file"),
        (["--plot", "/no/such/folder/x.png"], "--plot /no/such/folder/x.png: no file can be written there"),
        (["--policy", "fifo"], "--policy fifo: 'fifo' is no policy; known are lru, "),
        (["--policy", ""], "--policy : '' is no policy; known are lru"),
        (["--policy", "lru,lru"], "--policy lru,lru: names a policy twice"),
        (["--policy", "lru,all"], "--policy lru,all: 'all' stands alone"),
        (["--policy", "x" * 500], " is no policy; known are lru"),
        (["--no-data"], "--device with --no-data: nothing is moved then; leave one of them out"),
    ],
)
def test_what_cannot_be_done_is_said(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", write(tmp_path / "t", conversations(5)), "--device", "host", *options]) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert not out and last.startswith("kvortex: ") and message in last and "Traceback" not in err and len(last) < 300


NO_DATA = [
    (["--record-bytes", "1KiB"], "--record-bytes with --no-data: nothing is moved then; leave one of them out"),
    (["--admit-after", "1,256"], "admit_after = 256: must be an integer from 1 to 255"),
    (["--json", "x.out", "--plot", "x.out"], "--plot x.out: is the file of --json, which would be lost"),
]


@pytest.mark.parametrize(("options", "message"), NO_DATA, ids=[message[:20] for _, message in NO_DATA])
def test_what_cannot_be_done_without_data(
    tmp_path: Path, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["replay", write(tmp_path / "t", conversations(5)), "--no-data", *options]) == 2
    out, err = capsys.readouterr()
    assert not out and message in err.splitlines()[-1] and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("blocks", "admit_after"), [(1, 1), (7, 2), (30, 1), (30, 2), (1000, 3)])
def test_without_data_the_hits_are_the_same(
    tmp_path: Path, policy: str, blocks: int, admit_after: int, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = conversations(120)
    command = ["replay", write(tmp_path / "trace.jsonl", requests), "--pool-blocks", str(blocks), "--policy", policy]
    command += ["--admit-after", str(admit_after)]
    reports = []
    for options in (["--no-data"], SMALL):
        assert main([*command, *options, "--json", "-"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    index, data = reports
    assert index["hits"] == data["hits"] == naive_replay(requests, blocks, policy, admit_after)
    alike = set(index) - {"command", "device", "seconds"}
    assert {name: index[name] for name in alike} == {name: data[name] for name in alike}
    assert index["device"] is None and index["policy"] == policy and index["distinct_blocks"] == len({*sum(requests, [])})
    (bounds,) = index["bound"]
    assert bounds["hits"] == bound(read_trace(tmp_path / "trace.jsonl"), blocks) >= index["prefix_hits"]


@pytest.mark.parametrize("options", [["--no-data"], SMALL], ids=["index", "data"])
def test_a_sweep(tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    requests, out, picture = conversations(60), tmp_path / "out.json", tmp_path / "out.png"
    command = ["replay", write(tmp_path / "t", requests), "--policy", "all", "--pool-blocks", "30,9"]
    assert main([*command, *options, "--json", str(out), "--plot", str(picture)]) == 0
    report = json.loads(out.read_text())
    assert [(run["policy"], run["pool_blocks"]) for run in report["runs"]] == [(name, n) for name in POLICIES for n in (30, 9)]
    assert report["requests"] == 60 and "hits" not in report["runs"][0] and ("record_bytes" in report) == (options == SMALL)
    hits = {(run["policy"], run["pool_blocks"]): run["prefix_hits"] for run in report["runs"]}
    assert hits["lru", 30] == sum(replay_lru(requests, 30)) > hits["lru", 9] == sum(replay_lru(requests, 9)) > 0
    rates = [f"{run['prefix_hit_rate']:.2%}" for run in report["runs"][:2]]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["policy", "30", "9"] in lines and ["lru", *rates] in lines
    assert ["at", "most", "(Belady)", *(f"{row['hit_rate']:.2%}" for row in report["bound"])] in lines
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


def test_a_plot_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trace = write(tmp_path / "t", conversations(5))
    assert main(["replay", trace, "--no-data", "--plot", str(tmp_path / "p.png")]) == 2
    assert "--plot needs matplotlib: pip install" in capsys.readouterr().err and not (tmp_path / "p.png").exists()
    assert main(["replay", trace, "--no-data"]) == 0


def test_a_name_with_dollars_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, out, picture = write(tmp_path / "a$b_{$.jsonl", conversations(5)), tmp_path / "out", tmp_path / "p.png"
    command = ["replay", trace, "--no-data", "--json", str(out), "--plot", str(picture)]
    assert main(command) == 0 and picture.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(plot, "draw", lambda *_: (_ for _ in ()).throw(ValueError("of the picture")))
    out.unlink()
    capsys.readouterr()
    assert main(command) == 2
    assert json.loads(out.read_text())["requests"] == 5 and "prefix hits" in capsys.readouterr().out


def test_the_plot_shows_every_policy_and_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    shown: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: shown.append(self.axes[0]))
    points = [(30, 0.3), (10, 0.1)]
    runs = [
        {"policy": name, "admit_after": offers, "pool_blocks": n, "prefix_hit_rate": rate}
        for name, offers in (("a", 1), ("a", 2), ("b", 1))
        for n, rate in points
    ]
    plot.draw("title", runs, [{"pool_blocks": 30, "hit_rate": 0.9}, {"pool_blocks": 10, "hit_rate": 0.2}])
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in shown[0].get_lines()}
    assert lines["a"] == lines["a, offer 2"] == lines["b"] == ([10, 30], [10.0, 30.0])
    looks = {line.get_label(): (line.get_color(), line.get_linestyle(), line.get_marker()) for line in shown[0].get_lines()}
    assert len(set(looks.values())) == 4 and looks["a"][0] == looks["a, offer 2"][0] != looks["b"][0]
    assert [points for label, points in lines.items() if "Belady" in label] == [([10, 30], [20.0, 90.0])]


def test_a_trace_that_lacks_calls_is_played_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = {"timestamp": 0, "input_length": 16, "output_length": 0, "block_size": 16, "hash_ids": [1], "dropped": 7}
    (tmp_path / "t").write_text(json.dumps(line))
    assert main(["replay", str(tmp_path / "t"), "--no-data"]) == 0
    assert "kvortex: 7 calls are missing in this trace" in capsys.readouterr().err


def test_a_report_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", write(tmp_path / "t", conversations(5)), "--json", str(tmp_path), *SMALL]) == 2
    assert "no file can be written there" in capsys.readouterr().err


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_the_trace_is_not_overwritten(tmp_path: Path, link: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trace = target = write(tmp_path / "t", conversations(5))
    before = Path(trace).read_bytes()
    if link is not None:
        link(trace, target := str(tmp_path / "link"))
    assert main(["replay", trace, "--json", target, *SMALL]) == 2
    assert f"--json {target}: is the trace itself" in capsys.readouterr().err
    assert Path(trace).read_bytes() == before


def test_a_report_replaces_the_one_before_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, out = write(tmp_path / "t", conversations(5)), tmp_path / "out.json"
    out.write_text("the one before")
    link = tmp_path / "link"
    link.symlink_to(out)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert main(["replay", trace, "--json", str(link), *SMALL]) == 2
        assert out.read_text() == "the one before"
    assert main(["replay", trace, "--json", str(link), *SMALL]) == 0
    assert json.loads(out.read_text())["requests"] == 5 and link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out.json", "t"]


def test_a_report_whose_name_is_as_long_as_can_be(tmp_path: Path) -> None:
    out = tmp_path / ("\u8a9e" * 85)  # 255 bytes
    assert main(["replay", write(tmp_path / "t", conversations(5)), "--no-data", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["requests"] == 5


def test_a_device_is_written_into_and_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = write(tmp_path / "t", conversations(5))
    assert main(["replay", trace, "--json", "/dev/full", *SMALL]) == 2
    assert "--json /dev/full: No space left on device" in capsys.readouterr().err
    assert Path("/dev/full").is_char_device()
