"""The measuring itself: on a GPU made of RAM that moves bytes at once, and on a real one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvortex.devices import driver as cu
from kvortex.devices import open_device
from kvortex.devices.cuda import CudaDevice
from kvortex.errors import DeviceError, KVortexError, TransferError, TransferTimeoutError
from kvortex.kernels import build
from kvortex.transfer.executor import Direction
from kvortex.transfer.issue.cells import PACED
from kvortex.transfer.profiles import bench as module
from kvortex.transfer.profiles import calibrate as calibration
from kvortex.transfer.profiles import load as loads
from kvortex.transfer.profiles import store
from kvortex.transfer.profiles.bench import Bench
from kvortex.transfer.profiles.calibrate import calibrate
from kvortex.transfer.profiles.load import Load
from kvortex.transfer.profiles.profile import Profile, guess
from kvortex.transfer.routes import Route
from tests.fake_driver import Result
from tests.fake_gpu import FakeGpu, fake_gpu

FRAGMENT = 256
UNIT = 4 * 1024  # of records of four fragments
EVERY = [Route.STAGED, Route.RESIDENT, Route.STRIDED, Route.BATCHED, Route.MAPPED]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """Small transfers, which take half a millisecond each by its clock."""
    for name, value in (("FRAGMENTS", 4), ("LEAST_BYTES", 64 << 10), ("MOST_BYTES", 64 << 10), ("CHECKED_BYTES", 16 << 10)):
        monkeypatch.setattr(module, name, value)
    with fake_gpu(monkeypatch) as made:
        yield made


def profile_of(device: CudaDevice) -> Profile:
    return guess(1e6, device.multiprocessors)


@pytest.fixture
def bench(gpu: FakeGpu) -> Iterator[Bench]:
    device = CudaDevice()
    with Bench(device, profile_of(device), UNIT) as made:
        yield made


@pytest.mark.parametrize("route", EVERY)
@pytest.mark.parametrize("direction", Direction)
def test_a_transfer_is_timed_by_the_device(bench: Bench, gpu: FakeGpu, direction: Direction, route: Route) -> None:
    profile = profile_of(CudaDevice())
    assert bench.idle(profile, direction, FRAGMENT, 8192, route) == pytest.approx(8192 / 0.5e-3)
    gpu.issued.calls.clear()
    assert bench.idle(profile, direction, FRAGMENT, bench.nbytes, route) == pytest.approx(bench.nbytes / 0.5e-3)
    names = set(gpu.issued.names)
    kinds = {Route.STRIDED: "lines", Route.BATCHED: "batch", Route.RESIDENT: "wait_value"}
    assert kinds.get(route, "launch") in names and "launch" in names, "blocks are digested, as engines do"
    gpu.issued.calls.clear()
    bench.link(profile, direction)
    assert "launch" not in gpu.issued.names, "and the link alone is not"


@pytest.mark.parametrize("route", EVERY)
def test_all_bytes_come_back(bench: Bench, route: Route) -> None:
    bench.check(profile_of(CudaDevice()), FRAGMENT, route)
    bench.check(profile_of(CudaDevice()), 4 * FRAGMENT, route)


@pytest.mark.parametrize("fault", ["a byte", "no save", "no load"])
@pytest.mark.parametrize("route", EVERY)
def test_bytes_that_do_not_come_back_are_seen(bench: Bench, gpu: FakeGpu, route: Route, fault: str) -> None:
    execute = gpu.issued._also
    assert execute is not None
    saved: list[int] = []

    def spoil(call: object) -> None:
        saving = not saved
        if fault == "a byte" or (fault == "no save") is not saving:
            execute(call)  # type: ignore[arg-type]

    memset = gpu.answers["cuMemsetD8"]
    gpu.answers["cuMemsetD8"] = lambda *arguments: (saved.append(1), memset(*arguments))[1]
    read = type(bench._pages).read
    if fault == "a byte":
        gpu.issued._also = execute
        flipped: list[int] = []

        def wrong(self: object, offset: int = 0, nbytes: int | None = None) -> np.ndarray:
            data = read(self, offset, nbytes)  # type: ignore[arg-type]
            if not flipped:
                data[-1] ^= 1
                flipped.append(offset)
            return data

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(bench._pages), "read", wrong)
            with pytest.raises(TransferError, match=f"do not come back from the {route.value} route"):
                bench.check(profile_of(CudaDevice()), FRAGMENT, route)
        return
    if route is Route.RESIDENT:
        pytest.skip("its kernel would wait for ever for a copy that was left out")
    gpu.issued._also = spoil
    with pytest.raises(TransferError, match=f"do not come back from the {route.value} route"):
        bench.check(profile_of(CudaDevice()), FRAGMENT, route)


def test_contiguous_copies(bench: Bench, gpu: FakeGpu) -> None:
    profile = profile_of(CudaDevice())
    assert bench.link(profile, Direction.SAVE) == pytest.approx(bench.nbytes / 0.5e-3)
    gpu.issued.calls.clear()
    assert bench.copies(profile, Direction.LOAD, 4096) == pytest.approx(bench.nbytes / 0.5e-3)
    copies = [call for call in gpu.issued.calls if call.name == "to_device"]
    assert len(copies) == bench.nbytes // 4096 and {call.arguments[2] for call in copies} == {4096}


def test_an_executor_serves_as_long_as_its_shape_does(bench: Bench, gpu: FakeGpu) -> None:
    profile = profile_of(CudaDevice())
    bench.idle(profile, Direction.SAVE, FRAGMENT, 8192, Route.RESIDENT)
    first = bench._executor
    gpu.issued.calls.clear()
    bench.idle(replace(profile, resident_ctas=3), Direction.LOAD, FRAGMENT, 8192, Route.RESIDENT)
    assert bench._executor is first
    assert [call.arguments[1] for call in gpu.issued.calls if call.name == "launch"] == [3]
    for other in ({"staged_ctas": 1}, {"streams": 3}, {"buffers": 2}, {"buffer_bytes": 8192}):
        before = bench._executor
        bench.idle(replace(profile, **other), Direction.LOAD, FRAGMENT, 8192, Route.STAGED)
        assert bench._executor is not before


def test_beside_a_computation(bench: Bench, gpu: FakeGpu) -> None:
    """The fake's clock says half a millisecond of every span, three of which stand for one here."""
    running = itertools.chain([600] * 400, itertools.repeat(0))
    gpu.answers["cuEventQuery"] = lambda _: (Result(next(running)),)
    rate, slowdown = bench.beside(profile_of(CudaDevice()), Direction.SAVE, FRAGMENT, Route.STAGED)
    assert rate > 0 and slowdown == pytest.approx(1 / 3)
    launched = [arguments for arguments in gpu.named("cuLaunchKernel") if arguments[0] == 0xC0]
    assert len(launched) == 3 + 2 + 7 * module.SPAN + module.SPAN // 2 + 2
    assert {arguments[1:7] for arguments in launched} == {(8, 1, 1, loads.THREADS, 1, 1)}


def test_transfers_beside_a_computation_are_paced_and_not_hurried(
    bench: Bench, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of engines are, whose streams nobody makes wait."""
    monkeypatch.setattr("kvortex.transfer.lane.PACED_S", 0)
    seen: list[bool] = []
    behind = Load.behind

    def watched(load: Load, transfer: Any) -> int:
        seen.append(bool(transfer.outcome[PACED]) and transfer.issued)
        return behind(load, transfer)

    monkeypatch.setattr(Load, "behind", watched)
    marks = bench._busy()._events

    def answer(event: Any) -> tuple[Result]:
        return (Result(600 if marks[4:5] == [int(event)] and len(seen) < 5 else 0),)  # the end of the computation

    gpu.answers["cuEventQuery"] = answer
    rate, _ = bench.beside(profile_of(CudaDevice()), Direction.SAVE, FRAGMENT, Route.STAGED)
    assert rate > 0 and len(seen) == 5 and all(seen)


def test_a_computation_that_never_ends(bench: Bench, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONGEST_WAIT_S", 0.01)
    waits = Load.wait

    def stops(load: Load, event: int) -> None:
        waits(load, event)
        if len(load._events) > 5:  # everything is queued
            gpu.event_code = 600

    monkeypatch.setattr(Load, "wait", stops)
    with pytest.raises(TransferTimeoutError, match=r"did not end in 0.01 s"):
        bench.beside(profile_of(CudaDevice()), Direction.SAVE, FRAGMENT, Route.STAGED)
    gpu.event_code = 0


def test_routes_that_are_there(bench: Bench, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(bench.routes()) == set(EVERY)
    with monkeypatch.context() as patch:
        patch.setattr(bench._device, "has_stream_flags", False)
        assert set(bench.routes()) == set(EVERY) - {Route.RESIDENT}
    gpu.answers["cuDriverGetVersion"] = 12060
    cu.functions.cache_clear()
    assert set(bench.routes()) == set(EVERY) - {Route.BATCHED}


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("FRAGMENT_BYTES", (256, 1024)), ("MIDDLE_BYTES", 256), ("PAYLOADS", (1024, 8192)),
                        ("COPY_BYTES", (4096, 8192)), ("FRAGMENTS", 4), ("ROUNDS", 2)):  # fmt: skip
        monkeypatch.setattr(calibration, name, value)


def left_of(gpu: FakeGpu) -> tuple[int, ...]:
    return (
        len(gpu.memory) + len(gpu.registered),
        len(gpu.named("cuEventCreate")) - len(gpu.named("cuEventDestroy")),
        len(gpu.named("cuStreamCreate", "cuStreamCreateWithPriority")) - len(gpu.named("cuStreamDestroy")),
        len(gpu.named("cuModuleLoadData")) - len(gpu.named("cuModuleUnload")),
        len(gpu.named("cuMemPoolCreate")) - len(gpu.named("cuMemPoolDestroy")),
    )


def test_a_whole_calibration_gives_everything_back(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    found = calibrate(CudaDevice())
    assert found.profile.measured and {row.route for row in found.table} == set(EVERY) and found.seconds > 0
    assert left_of(gpu) == (0, 0, 0, 0, 0)


REFUSED = ["cuMemAlloc", "cuMemAllocFromPoolAsync", "cuModuleLoadData", "cuModuleGetFunction", "cuStreamCreate",
           "cuEventCreate", "cuStreamCreateWithPriority", "cuMemsetD8Async", "cuLaunchKernel", "cuEventRecord",
           "cuMemcpyHtoD"]  # fmt: skip


@pytest.mark.parametrize("function", REFUSED)
@pytest.mark.parametrize("spare", [0, 1, 5, 20])
def test_a_calibration_that_fails_leaves_nothing(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, function: str, spare: int
) -> None:
    small(monkeypatch)
    device = CudaDevice()
    gpu.fails[function] = (2, spare)
    failures = 0
    try:
        calibrate(device)
    except KVortexError as error:
        assert "OUT_OF_MEMORY" in str(error)
        failures = len(gpu.named(function)) - spare
    assert failures or len(gpu.named(function)) <= spare
    kept = dict(zip(("memory", "cuEventCreate", "cuStreamCreate", "cuModuleLoadData", "pools"), left_of(gpu), strict=True))
    if function.startswith(("cuEventCreate", "cuStreamCreate", "cuModuleLoad")):
        kept[function.replace("WithPriority", "")] -= failures
    assert not any(kept.values()), kept


def test_transfers_that_fail_end_the_measurement(bench: Bench, gpu: FakeGpu) -> None:
    gpu.event_code = 700
    with pytest.raises(TransferError, match="ILLEGAL_ADDRESS"):
        bench.idle(profile_of(CudaDevice()), Direction.SAVE, FRAGMENT, 8192, Route.STAGED)
    with pytest.raises(DeviceError, match="ILLEGAL_ADDRESS"):
        bench.beside(profile_of(CudaDevice()), Direction.SAVE, FRAGMENT, Route.STAGED)
    gpu.event_code = 0


@pytest.mark.gpu
def test_the_load_has_the_gpu_for_as_long_as_it_is_told() -> None:
    load = Load(open_device("cuda"))  # type: ignore[arg-type]
    try:
        load.reset()
        load.queue(4)
        began = load.queue(0)
        assert 0.6 < load.seconds(began, load.queue(40)) / (40 * loads.KERNEL_S) < 1.6
        counters = load._counters.read().view(np.uint32)
        tiles = loads.TILES_A_CTA * load._ctas
        assert (counters[:44] == tiles + load._ctas).all() and not counters[44:].any(), "each CTA asks once in vain"
    finally:
        load.close()


@pytest.mark.gpu
def test_a_real_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what compiling takes, which on one core is more than a minute."""
    monkeypatch.setattr(store, "path_of", lambda _: tmp_path / "profile")
    device = open_device("cuda")
    assert isinstance(device, CudaDevice)
    for name, home in build.KERNELS.items():
        if home.rpartition(".")[-1] in ("paged", "resident", "reading", "compute"):
            build.load(name, device.compute_capability)
    found = calibrate(device)
    assert found.seconds < 30 and 0.2 * found.profile.link_rate < min(found.link.values()) and found.profile.measured
    faster = [row for row in found.table if not 0 < row.rate < 1.1 * found.link[row.direction]]
    assert not faster, (found.link, faster)
    assert not [row for row in found.table if row.slowdown is not None and not 0.5 < row.slowdown < 10]
    assert store.save(device, found.profile) and store.load(device) == found.profile
