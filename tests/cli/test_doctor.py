"""``kvortex doctor``: it answers on every machine, and names what is missing with its cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvortex.cli import doctor, main, probes
from kvortex.devices import Device, cuda_available
from kvortex.errors import DeviceError
from tests.cli.screen import rows

H100 = {"name": "NVIDIA H100", "compute_capability": "9.0", "memory_bytes": 80 << 30, "numa_node": None}


def cures(report: dict[str, Any]) -> dict[str, str]:
    return {item["what"]: item["cure"] for item in report["missing"]}


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "cuda_available", lambda: (False, "no CUDA driver on this machine"))


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with an H100 and a driver of CUDA 12.8."""
    monkeypatch.setattr(probes, "driver", lambda: {"usable": True, "version": "570.1", "cuda": "12.8"})
    monkeypatch.setattr(probes, "gpu_count", lambda: 1)
    monkeypatch.setattr(probes, "gpu", lambda ordinal: H100)


def test_json_says_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"python", "kvortex", "numpy", "numba"} <= set(report["versions"])
    assert report["driver"]["usable"] == cuda_available()[0]
    assert report["memory"]["available_bytes"] > 0 and report["memory"]["numa_nodes"] >= 1
    assert report["would_run"]["host"].startswith("yes")
    assert set(report) >= {"compiler", "kernel_cache", "missing"} and "kernels" not in report


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    table = rows(capsys.readouterr().out)
    assert table["usable"] == "no" and table["reason"] == "no CUDA driver on this machine"
    assert table["cuda"] == "no: no CUDA driver on this machine" and table["device auto means"] == "host"


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_gpus_on_the_bus", lambda: 1)
    assert "nvidia-driver" in cures(doctor.examine())["a working NVIDIA driver"]


@pytest.mark.usefixtures("one_gpu")
def test_with_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(probes, "compiler", lambda: dict.fromkeys(probes.COMPILER_LIBRARIES, "there"))
    monkeypatch.setattr(probes, "nvjitlink_version", lambda: (12, 9))
    memory = {**probes.memory(), "memlock_soft": None}
    monkeypatch.setattr(probes, "memory", lambda: memory)
    report = doctor.examine()
    assert report["cuda:0"] == H100
    assert report["would_run"]["cuda:0"].startswith("yes: kernels and DMA")
    assert report["would_run"]["device auto means"] == "cuda:0"
    assert not any("compiler" in what or "locked" in what for what in cures(report))
    assert main(["doctor"]) == 0
    table = rows(capsys.readouterr().out)
    assert table["memory bytes"] == "80.0 GiB" and table["memlock soft"] == "unlimited" and table["numa node"] == "none"


@pytest.mark.usefixtures("one_gpu")
def test_a_compiler_newer_than_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "compiler", lambda: dict.fromkeys(probes.COMPILER_LIBRARIES, "there"))
    monkeypatch.setattr(probes, "nvjitlink_version", lambda: (13, 0))
    (cure,) = (cure for what, cure in cures(doctor.examine()).items() if "suits the driver" in what)
    assert cure.endswith('; pip install -e ".[cu12]" (in the kvortex checkout)')


@pytest.mark.usefixtures("one_gpu")
def test_a_gpu_without_compiler_runs_what_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "compiler", lambda: {"nvvm": "there", "nvrtc": None, "nvJitLink": None})
    for cubins, answer in ((["gather-sm_90.cubin"], "yes"), ([], "no: the kernels cannot be compiled here")):
        monkeypatch.setattr(probes, "cache", lambda cubins=cubins: {"folder": "f", "writable": True, "cubins": cubins})
        report = doctor.examine()
        assert report["would_run"]["cuda:0"].startswith(answer)
        (cure,) = (cure for what, cure in cures(report).items() if what.startswith("the compiler"))
        assert cure == 'pip install -e ".[cu12]" (in the kvortex checkout)'


@pytest.mark.parametrize("probe", ["driver", "gpu_count", "compiler", "memory", "cache", "cores", "nvjitlink_version"])
def test_a_probe_that_fails_says_so(probe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise DeviceError("planted [and told]")

    monkeypatch.setattr(probes, probe, fail)
    assert main(["doctor"]) == 0
    assert main(["doctor", "--json"]) == 0
    out = capsys.readouterr().out
    if probe in ("driver", "compiler", "memory", "cache", "cores"):
        assert out.count("unknown: DeviceError: planted [and told]") >= 2


@pytest.mark.usefixtures("one_gpu")
def test_a_gpu_that_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(probes, "gpu", lambda ordinal: {}["off the bus"])
    assert main(["doctor"]) == 0
    assert "unknown: KeyError: 'off the bus'" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("KVORTEX_CACHE_DIR", str(blocked / "folder"))
    report = doctor.examine()
    assert report["kernel_cache"]["writable"] is False
    assert "KVORTEX_CACHE_DIR" in cures(report)["a cache folder that can be written"]
    monkeypatch.setenv("KVORTEX_CACHE_DIR", str(tmp_path / "new" / "folder"))
    (tmp_path / "x.cubin").write_text("")
    assert doctor.examine()["kernel_cache"] == {"folder": str(tmp_path / "new/folder"), "writable": True, "cubins": []}
    assert not (tmp_path / "new").exists()
    monkeypatch.setenv("KVORTEX_CACHE_DIR", str(tmp_path))
    assert doctor.examine()["kernel_cache"]["cubins"] == ["x.cubin"]


def test_what_is_missing_has_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "versions", lambda: {"python": "3.11"})
    monkeypatch.setattr(probes, "_chosen", lambda path: "never")
    found = cures(doctor.examine())
    needed = "numpy numba numba-cuda cuda-bindings cuda-core"
    assert found[f"packages that kvortex needs: {needed.replace(' ', ', ')}"] == f"pip install {needed}"
    assert "transparent_hugepage" in found["huge pages, for pinning large pools quickly"]
    assert found["rich, for nicer tables"] == 'pip install -e ".[cli]" (in the kvortex checkout)'


def test_build_says_what_compiles(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from kvortex.kernels import build

    def compile_kernel(name: str, capability: tuple[int, int]) -> build.Cubin:
        if name == "scatter":
            raise RuntimeError("planted,\nin two lines")
        return build.Cubin(b"code", f"{name} for {capability}")

    monkeypatch.setattr(build, "compile_kernel", compile_kernel)
    assert main(["doctor", "--build"]) == 0
    table = rows(capsys.readouterr().out)
    assert table["gather"].startswith("4 bytes in ") and table["scatter"] == "failed: planted, in two lines"


def test_links_and_choices_are_read(tmp_path: Path) -> None:
    for name, text in (("speed", "32.0 GT/s PCIe\n"), ("width", "16\n")):
        (tmp_path / f"current_link_{name}").write_text(text)
    assert probes._link(tmp_path, "current") == "generation 5 x16"
    assert probes._link(tmp_path, "max").startswith("unknown: ")
    (tmp_path / "current_link_speed").write_text("Unknown\n")
    assert probes._link(tmp_path, "current") == "Unknown x16"
    (tmp_path / "choice").write_text("always [madvise] never\n")
    assert probes._chosen(tmp_path / "choice") == "madvise"


@pytest.mark.gpu
def test_a_real_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--build"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["driver"]["usable"] and report["cuda:0"]["memory_bytes"] > 1 << 30
    assert report["would_run"]["cuda:0"].startswith("yes") and "bytes in" in report["kernels"]["gather"]


def test_probes_see_the_device(device: Device) -> None:
    assert probes.gpu_count() >= (device.name != "host")
