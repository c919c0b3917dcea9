"""Profiles: what is guessed of a GPU, and that what is kept comes back, or is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvortex.devices import cuda as devices
from kvortex.devices.cuda import CudaDevice
from kvortex.transfer.profiles import store
from kvortex.transfer.profiles.profile import KERNEL_S, Profile, from_plain, guess, to_plain
from kvortex.transfer.routes import Route
from tests.fake_gpu import FakeGpu, fake_gpu
from tests.transfer.profiles import H100


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeGpu]:
    monkeypatch.setenv("KVORTEX_CACHE_DIR", str(tmp_path / "cache"))
    with fake_gpu(monkeypatch) as made:
        yield made


MEASURED = replace(H100, measured=True, streams=3, rankings=H100.rankings[::-1])


def test_the_guess_for_an_h100_is_what_was_measured_on_one() -> None:
    assert (H100.streams, H100.buffers, H100.buffer_bytes, H100.staging_bytes) == (2, 4, 32 << 20, 256 << 20)
    assert (H100.line_bytes, H100.copy_bytes, H100.group_bytes, H100.staged_ctas) == (16 << 10, 256 << 10, 2 << 20, 264)
    assert (H100.resident_ctas, H100.resident_ctas_beside, H100.measured) == (4, 2, False)
    assert 54e9 < H100.link_rate < 56e9
    assert H100.is_deep(4 * (64 << 20)) and not H100.is_deep(4 * (32 << 20))
    assert H100.is_deep(int(H100.link_rate * KERNEL_S) + 1) and not H100.is_deep(int(H100.link_rate * KERNEL_S) - 1)


@pytest.mark.parametrize("link", [None, 1e6, 2e9, 31.5e9, 450e9])
@pytest.mark.parametrize("multiprocessors", [1, 3, 16, 148])
def test_any_gpu_can_be_guessed(link: float | None, multiprocessors: int) -> None:
    profile = guess(link, multiprocessors)
    assert 1 <= profile.staged_ctas <= 2 * multiprocessors and profile.buffer_bytes >= 4096
    for ctas in (profile.resident_ctas, profile.resident_ctas_beside):
        assert ctas == 1 or 4 * ctas <= multiprocessors, "those of four kernels, which find no room only in part"
    assert profile == from_plain(json.loads(json.dumps(to_plain(profile))))


def test_more_streams_than_buffers_have_a_buffer_each() -> None:
    assert replace(H100, streams=6).staging_bytes == 2 * 6 * (32 << 20)


@pytest.mark.parametrize("name", ["link_rate", "line_bytes", "copy_bytes", "group_bytes", "streams", "buffers",
                                  "buffer_bytes", "staged_ctas",
                                  "resident_ctas", "resident_ctas_beside"])  # fmt: skip
def test_a_number_that_cannot_be(name: str) -> None:
    for value in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"^{name} = "):
            replace(H100, **{name: value})


def test_a_profile_knows_what_to_do_with_any_transfer() -> None:
    for missing in range(len(H100.rankings)):
        rest = H100.rankings[:missing] + H100.rankings[missing + 1 :]
        if H100.rankings[missing].nbytes == 0:
            with pytest.raises(ValueError, match="rankings of (save|load)s that some transfers are not in"):
                replace(H100, rankings=rest)
    with pytest.raises(ValueError, match="rankings of saves"):
        replace(H100, rankings=())
    again = replace(H100.rankings[3], routes=(Route.STAGED,))
    with pytest.raises(ValueError, match="rankings of saves that some transfers are in twice"):
        replace(H100, rankings=(*H100.rankings, again))


def test_what_is_kept_comes_back(gpu: FakeGpu) -> None:
    device = CudaDevice()
    assert store.load(device) is None
    path = store.save(device, MEASURED)
    assert path == store.path_of(device) and path.name.startswith("profile-a-gpu-made-of-ram-")
    assert store.load(device) == MEASURED and store.save(device, H100) == path and store.load(device) == H100
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("answer", [{"cuDeviceGetName": b"Another\0"}, {"cuDeviceTotalMem": 1 << 33 | 1},
                                    {"cuDriverGetVersion": 13010}])  # fmt: skip
def test_another_gpu_or_driver_has_another_profile(gpu: FakeGpu, answer: dict[str, Any]) -> None:
    store.save(CudaDevice(), MEASURED)
    gpu.answers |= answer
    assert store.load(CudaDevice()) is None


def test_another_link_has_another_profile(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store.save(CudaDevice(), MEASURED)
    monkeypatch.setattr(devices, "_pci_folder", lambda _: tmp_path)
    assert store.load(CudaDevice()) == MEASURED
    (tmp_path / "max_link_speed").write_text("32.0 GT/s PCIe\n")
    (tmp_path / "max_link_width").write_text("16\n")
    assert store.load(CudaDevice()) is None
    assert CudaDevice().link_rate == pytest.approx(63.0e9, rel=1e-3)
    port = tmp_path / "port"
    (port / "gpu").mkdir(parents=True)
    for name in ("max_link_speed", "max_link_width"):
        (port / "gpu" / name).write_text((tmp_path / name).read_text())
    (tmp_path / "link").symlink_to(port / "gpu")
    monkeypatch.setattr(devices, "_pci_folder", lambda _: tmp_path / "link")
    assert CudaDevice().link_rate == pytest.approx(63.0e9, rel=1e-3)
    (port / "max_link_speed").write_text("32.0 GT/s PCIe\n")
    (port / "max_link_width").write_text("8\n")
    assert CudaDevice().link_rate == pytest.approx(31.5e9, rel=1e-3), "a slot of fewer lanes"
    monkeypatch.setattr(devices, "_pci_folder", lambda _: tmp_path)
    (tmp_path / "max_link_speed").write_text("5.0 GT/s PCIe\n")
    assert CudaDevice().link_rate == pytest.approx(8e9)
    for speed, width in (("Unknown", "16"), ("8.0 GT/s", "none"), ("", ""), ("8.0 GT/s", "0")):
        (tmp_path / "max_link_speed").write_text(speed)
        (tmp_path / "max_link_width").write_text(width)
        assert CudaDevice().link_rate is None


def plain(**changes: Any) -> bytes:
    return json.dumps({**to_plain(MEASURED), **changes}).encode()


BODIES = [
    *(b"", b"{", b"null", b"[]", b'"text"', b"\xff"),
    *(plain(streams=0), plain(streams="2"), plain(more=1), plain(link_rate=None)),
    *(plain(rankings=[]), plain(rankings=None), plain(rankings=[["save", False, 0]])),
    plain(rankings=[["save", False, 0, 0, ["teleport", "staged"]]]),
    *(plain(streams=2.5), plain(streams=2.0), plain(resident_ctas=float("inf")), plain(link_rate=float("inf"))),
    plain(rankings=[*to_plain(MEASURED)["rankings"], ["save", False, float("inf"), 0, ["staged"]]]),
    plain(rankings=[*to_plain(MEASURED)["rankings"], ["save", False, 0, 0, ["staged"]]]),
    b"[" * 100_000,
]


@pytest.mark.parametrize("body", BODIES)
def test_a_file_with_anything_else_is_no_profile(gpu: FakeGpu, body: bytes) -> None:
    device = CudaDevice()
    store.save(device, MEASURED)
    assert store.cache.write(store.path_of(device), store._MAGIC, store._VERSION, body)
    assert store.load(device) is None


@pytest.mark.parametrize("damage", ["empty", "truncated", "changed", "version", "foreign", "longer"])
def test_a_damaged_file_is_no_profile(gpu: FakeGpu, damage: str) -> None:
    path = store.save(CudaDevice(), MEASURED)
    assert path is not None
    data = bytearray(path.read_bytes())
    if damage in ("empty", "truncated"):
        del data[0 if damage == "empty" else len(data) // 2 :]
    elif damage == "longer":
        data += b" "
    elif damage == "changed":
        data = data.replace(b'"streams": 3', b'"streams": 2')
    else:
        data[8 if damage == "version" else 0] ^= 1
    assert bytes(data) != path.read_bytes()
    path.write_bytes(data)
    assert store.load(CudaDevice()) is None
    assert store.save(CudaDevice(), H100) == path and store.load(CudaDevice()) == H100


def test_a_folder_that_cannot_be_written(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KVORTEX_CACHE_DIR", str(tmp_path / "file" / "folder"))
    assert store.save(CudaDevice(), MEASURED) is None and store.load(CudaDevice()) is None
    with store.alone(CudaDevice()):
        pass


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "wb")
fcntl.flock(file, fcntl.LOCK_SH)  # which an exclusive lock waits for as well
print("held", flush=True)
sys.stdin.read()
"""


def test_one_process_measures_at_a_time(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    device = CudaDevice()
    path = store.path_of(device).with_suffix(".lock")
    path.parent.mkdir(parents=True)
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin is not None and other.stdout is not None
    try:
        assert other.stdout.readline() == "held\n"
        tries: list[bool] = []

        def watched(ready: Any, deadline: float) -> bool:
            tries.append(ready())
            other.communicate("")  # it ends, and lets go
            tries.append(ready())
            return tries[-1]

        monkeypatch.setattr(store, "poll", watched)
        with store.alone(device):
            assert tries == [False, True]
    finally:
        other.kill()
        other.wait()


def test_the_routes_of_a_kept_profile_are_those_that_were_ranked(gpu: FakeGpu) -> None:
    assert all(Route.STAGED in row.routes for row in from_plain(to_plain(H100)).rankings)
    assert isinstance(from_plain(to_plain(H100)), Profile)
