"""``kvortex calibrate``, and what ``doctor`` says of it, on a GPU made of RAM."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvortex.cli import doctor, main
from kvortex.cli.profiles import facts, size
from kvortex.devices.cuda import CudaDevice
from kvortex.errors import DeviceError
from kvortex.transfer.executor import Direction
from kvortex.transfer.profiles import calibrate as module
from kvortex.transfer.profiles import store
from kvortex.transfer.profiles.calibrate import Calibration
from kvortex.transfer.profiles.measurements import Measurement
from kvortex.transfer.routes import Ranking, Route
from tests.cli.screen import rows
from tests.fake_gpu import FakeGpu, fake_gpu
from tests.transfer.profiles import H100

MEASURED = replace(H100, measured=True, link_rate=51e9, streams=3)
TABLE = (
    Measurement(Direction.SAVE, 4096, 1 << 20, Route.MAPPED, 30e9),
    Measurement(Direction.SAVE, 4096, 256 << 20, Route.STAGED, 44e9, 1.014),
    Measurement(Direction.LOAD, 32768, 256 << 20, Route.BATCHED, 20e9),
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeGpu]:
    monkeypatch.setenv("KVORTEX_CACHE_DIR", str(tmp_path))

    def calibrate(device: CudaDevice, tell: Callable[[str], None]) -> Calibration:
        for step in range(module.STEPS):
            tell(str(step))
        return Calibration(MEASURED, {Direction.SAVE: 51e9, Direction.LOAD: 53e9}, TABLE, 4.25)

    monkeypatch.setattr(module, "calibrate", calibrate)
    with fake_gpu(monkeypatch) as made:
        yield made


@pytest.mark.usefixtures("gpu")
def test_what_it_measures_is_kept_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--device", "cuda:0"]) == 0
    shown = rows(capsys.readouterr().out)
    assert store.load(CudaDevice()) == MEASURED and shown["kept in"] == str(store.path_of(CudaDevice()))
    assert shown["4 KiB, 1 MiB, mapped"] == "30.0" and shown["32 KiB, 256 MiB, batched"] == "20.0"
    assert shown["4 KiB, 256 MiB, staged"] == "44.0 beside a computation, which takes 1.01 of its time"
    assert shown["link"] == "51.0 GB/s" and shown["streams"] == "3" and shown["measured in"] == "4.2 s"


@pytest.mark.usefixtures("gpu")
def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["file"] == str(store.path_of(CudaDevice())) and report["link"] == {"save": 51e9, "load": 53e9}
    assert len(report["measurements"]) == 3 and report["measurements"][1]["slowdown"] == 1.014
    assert report["profile"]["measured"] and report["device"]["gpu"] == "A GPU made of RAM"


@pytest.mark.usefixtures("gpu")
def test_a_folder_that_cannot_be_written_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KVORTEX_CACHE_DIR", str(tmp_path / "file" / "folder"))
    assert main(["calibrate"]) == 0
    out, err = capsys.readouterr()
    assert "cannot be written; set KVORTEX_CACHE_DIR" in err and rows(out)["kept in"] == "nowhere"


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_cannot_be_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: object) -> None:
        raise DeviceError("planted")

    monkeypatch.setattr(module, "calibrate", refuse)
    assert main(["calibrate"]) == 2
    assert capsys.readouterr().err == "kvortex: planted\n" and store.load(CudaDevice()) is None


def test_the_host_device_has_nothing_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--device", "host"]) == 2
    assert capsys.readouterr().err.startswith("kvortex: calibrate needs a GPU")


@pytest.mark.usefixtures("gpu")
def test_doctor_says_whether_a_gpu_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    def cures() -> dict[str, str]:
        return {item["what"]: item["cure"] for item in doctor.examine()["missing"]}

    report = doctor.examine()["transfers_cuda:0"]
    assert report["calibrated"].startswith("no: guessed") and report["file"] is None and report["streams"] == "2"
    assert cures()["a calibration of cuda:0: how to transfer is guessed"] == "kvortex calibrate --device cuda:0"
    store.save(CudaDevice(), MEASURED)
    report = doctor.examine()["transfers_cuda:0"]
    assert report["calibrated"] == "yes" and report["streams"] == "3"
    assert report["file"] == str(store.path_of(CudaDevice())) and not any("calibration" in what for what in cures())
    assert main(["doctor"]) == 0
    assert "transfers cuda:0" in capsys.readouterr().out


def test_a_profile_in_words() -> None:
    words = facts(H100)
    idle = "mapped, resident from 4 MiB; fragments from 16 KiB on: strided, resident from 4 MiB"
    assert words["save"] == words["load"] == idle
    assert words["staging buffers"] == "4 of 32 MiB each way" and words["copy that is worth a call"] == "256 KiB"
    beside = "mapped, staged from 4 MiB; fragments from 16 KiB on: strided, staged from 4 MiB"
    assert words["save beside compute"] == words["load beside compute"] == beside
    one = [Ranking(d, busy, 0, 0, (Route.STAGED,)) for d in Direction for busy in (False, True)]
    more = [
        Ranking(Direction.SAVE, False, 512, 0, (Route.STAGED,)),
        Ranking(Direction.SAVE, False, 1024, 0, (Route.MAPPED, Route.STAGED)),
    ]
    words = facts(replace(H100, rankings=(*one, *more)))
    assert words["load"] == "staged" and words["save"] == "staged; fragments from 1 KiB on: mapped", "what stays is told once"


@pytest.mark.parametrize(("nbytes", "words"), [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (3 << 20, "3 MiB")])
def test_sizes(nbytes: int, words: str) -> None:
    assert size(nbytes) == words
