"""Calibration: on machines that were invented, and what is done with what they say."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from kvortex.devices.cuda import CudaDevice
from kvortex.errors import DeviceError, TransferError
from kvortex.transfer.executor import Direction
from kvortex.transfer.profiles import calibrate as module
from kvortex.transfer.profiles import store
from kvortex.transfer.profiles.bench import FRAGMENTS
from kvortex.transfer.profiles.calibrate import Calibration, Machine, measure, profile_for
from kvortex.transfer.profiles.profile import Profile
from kvortex.transfer.routes import Ability, Route, choose, tabulate
from tests.transfer.profiles import H100
from tests.transfer.test_profile import gpu

__all__ = ["gpu"]
MIB = 1 << 20


@dataclass
class Invented(Machine):
    """A GPU whose transfers take a time for their bytes, and what this says beside it.

    ``streams`` and ``ctas`` of a resident kernel are those from which on staging does not hold the link up, ``most_chunk``
    that up to which it does not.
    """

    nbytes: int = 256 * MIB
    multiprocessors: int = 64
    rate: float = 20e9
    line_s: float = 40e-9
    batched_s: float = 1e-6
    start_s: float = 80e-6
    copy_s: float = 1e-6
    most_chunk: int = 1 << 40
    streams: int = 1
    ctas: int = 1
    ctas_beside: int = 1
    staged_ctas: int = 1
    staged_beside: float = 0.95
    broken: Route | None = None
    without: tuple[Route, ...] = ()
    checked: list[tuple[int, Route]] = field(default_factory=list)
    runs: list[tuple[Any, ...]] = field(default_factory=list)

    def routes(self) -> tuple[Route, ...]:
        every = Route.STAGED, Route.RESIDENT, Route.STRIDED, Route.BATCHED, Route.MAPPED
        return tuple(route for route in every if route not in self.without)

    def link(self, profile: Profile, direction: Direction) -> float:
        return self.rate if direction is Direction.LOAD else 1.1 * self.rate

    def copies(self, profile: Profile, direction: Direction, nbytes: int) -> float:
        return nbytes / (nbytes / self.rate + self.copy_s)

    def idle(self, profile: Profile, direction: Direction, fragment_bytes: int, nbytes: int, route: Route) -> float:
        self.runs.append((direction, fragment_bytes, nbytes, route))
        seconds, lines = nbytes / self.link(profile, direction), nbytes / fragment_bytes
        held_up = 0.1 * (profile.buffer_bytes > self.most_chunk) + 0.1 * (profile.streams < self.streams)
        held_up += 0.1 * (profile.resident_ctas < self.ctas)
        extra = {
            Route.STAGED: self.start_s + 0.03 * seconds,
            Route.RESIDENT: self.start_s + held_up * seconds,
            Route.STRIDED: lines * self.line_s,
            Route.BATCHED: lines * self.batched_s,
            Route.MAPPED: 0.08 * seconds,
        }
        return nbytes / (seconds + extra[route])

    def beside(self, profile: Profile, direction: Direction, fragment_bytes: int, route: Route) -> tuple[float, float]:
        rate = self.idle(profile, direction, fragment_bytes, self.nbytes, route)
        self.runs.append(("beside", direction, fragment_bytes, route))
        if route is Route.RESIDENT:
            return (rate if profile.resident_ctas_beside >= self.ctas_beside else 0.3 * rate), 1.2
        if route is Route.STAGED:
            return self.staged_beside * rate, 1.0 if profile.staged_ctas <= self.staged_ctas else 1.1
        return rate, 1.0

    def check(self, profile: Profile, fragment_bytes: int, route: Route) -> None:
        self.checked.append((fragment_bytes, route))
        if route is self.broken:
            raise TransferError("planted")


def found_on(**what: Any) -> Profile:
    return measure(Invented(**what), H100).profile


def route(profile: Profile, fragment: int, nbytes: int, busy: bool, direction: Direction = Direction.SAVE) -> Route:
    able = Ability(fragment, strided=True, batched=True, resident=True, deep=True)
    return choose(tabulate(profile.rankings, able), direction, nbytes, beside_compute=busy)


def test_numbers_follow_what_was_measured() -> None:
    profile = found_on(rate=20e9, copy_s=1e-6, most_chunk=16 * MIB, streams=3, ctas=4)
    assert profile.measured and profile.link_rate == 20e9
    assert profile.copy_bytes == 256 << 10 and profile.group_bytes == 8 * profile.copy_bytes, "0.9 of 20 GB/s from 180 KB on"
    assert (profile.buffer_bytes, profile.streams, profile.resident_ctas) == (16 * MIB, 3, 4)
    assert found_on(copy_s=1e-7).copy_bytes == 64 << 10 and found_on(copy_s=1e-3).copy_bytes == MIB
    few = found_on()
    assert (few.buffer_bytes, few.streams, few.resident_ctas) == (32 * MIB, 1, 1), "long buffers, else no more than is of use"


def test_numbers_of_launches_beside_a_computation() -> None:
    assert found_on(ctas_beside=2, staged_ctas=16).resident_ctas_beside == 2
    assert found_on(staged_ctas=128).staged_ctas == 128, "of those that are as good the most, which are soon over"
    assert found_on(staged_ctas=64).staged_ctas == 64 and found_on(staged_ctas=16).staged_ctas == 16


class Shallow(Invented):
    """Beside whose computation staging is fast with deep buffers only, for which there may be no memory."""

    room: int = 1 << 40

    def beside(self, profile: Profile, direction: Direction, fragment_bytes: int, route: Route) -> tuple[float, float]:
        if profile.staging_bytes > self.room:
            raise DeviceError("out of memory")
        rate, slowdown = super().beside(profile, direction, fragment_bytes, route)
        deep = profile.is_deep(profile.staging_bytes // 2)
        return (rate if deep or route is not Route.STAGED else 0.3 * rate), slowdown


def test_staging_is_measured_beside_a_computation_with_buffers_as_deep_as_where_it_is_chosen() -> None:
    machine = Shallow(nbytes=256 * MIB, rate=50e9)
    assert route(measure(machine, H100).profile, 4096, 256 * MIB, True) is Route.STAGED
    machine.room = H100.staging_bytes
    assert route(measure(machine, H100).profile, 4096, 256 * MIB, True) is not Route.STAGED


def test_routes_of_an_idle_gpu() -> None:
    profile = found_on(line_s=1e-6, batched_s=2e-6)
    assert route(profile, 4096, 256 * MIB, False) is Route.RESIDENT
    assert route(profile, 4096, MIB, False) is Route.MAPPED and route(profile, 4096, 64 * MIB, False) is Route.RESIDENT
    costless = found_on(line_s=0.0)
    assert route(costless, 4096, 256 * MIB, False) is Route.STRIDED, "needs no multiprocessor, and is as fast"


def test_routes_beside_a_computation() -> None:
    profile = found_on(line_s=100e-9, batched_s=300e-9)
    assert route(profile, 4096, 256 * MIB, True) is Route.STAGED, "lines of 4 KiB take a third of the time for nothing"
    assert route(profile, 32 << 10, 256 * MIB, True) is Route.STAGED
    profile = found_on(line_s=100e-9, batched_s=300e-9, staged_beside=0.5)
    assert route(profile, 32 << 10, 256 * MIB, True) is Route.STRIDED
    short = found_on(line_s=1e-6, batched_s=300e-9, staged_beside=0.5)
    assert route(short, 128 << 10, 256 * MIB, True) is Route.BATCHED


def test_every_route_is_checked_before_it_is_ranked() -> None:
    machine = Invented()
    measure(machine, H100)
    assert machine.checked == list(itertools.product(module.FRAGMENT_BYTES, machine.routes()))
    with pytest.raises(TransferError, match="planted"):
        measure(Invented(broken=Route.BATCHED), H100)


def test_a_driver_without_batches() -> None:
    found = measure(Invented(without=(Route.BATCHED,)), H100)
    assert not any(row.route is Route.BATCHED for row in found.table)
    assert not any(Route.BATCHED in row.routes for row in found.profile.rankings)


@pytest.mark.parametrize("nbytes", [16 * MIB, 256 * MIB])
def test_transfers_are_of_whole_records_and_fit_in_memory(nbytes: int) -> None:
    machine = Invented(nbytes=nbytes)
    found = measure(machine, H100)
    sizes = {run[1:3] for run in machine.runs if run[0] != "beside"}
    assert all(size <= nbytes and size % (FRAGMENTS * fragment) == 0 for fragment, size in sizes)
    assert {(fragment, nbytes) for fragment in module.FRAGMENT_BYTES} <= sizes
    assert found.profile == replace(found.profile), "which checks that every transfer has a ranking"


def test_what_is_hopeless_is_measured_once_and_never_beside_a_computation() -> None:
    machine = Invented(batched_s=50e-6)
    measure(machine, H100)
    much = [run for run in machine.runs if run == (Direction.SAVE, 4096, 256 * MIB, Route.BATCHED)]
    assert len(much) == 1 and ("beside", Direction.SAVE, 4096, Route.BATCHED) not in machine.runs
    assert not any(run[0] == "beside" and run[3] is Route.MAPPED for run in machine.runs)


def test_a_gpu_without_resident_kernels() -> None:
    machine = Invented(without=(Route.RESIDENT,), staged_ctas=16)
    found = measure(machine, H100)
    assert not any(Route.RESIDENT in run for run in machine.runs) and found.profile.staged_ctas == 16
    assert not any(Route.RESIDENT in row.routes for row in found.profile.rankings)


@pytest.mark.parametrize(("multiprocessors", "most"), [(1, 1), (7, 1), (8, 2), (16, 4), (64, 8)])
def test_resident_kernels_of_both_directions_and_another_engine_find_room_at_once(multiprocessors: int, most: int) -> None:
    """However much more of them would be of use."""
    profile = found_on(multiprocessors=multiprocessors, ctas=8, ctas_beside=8)
    assert profile.resident_ctas <= most and profile.resident_ctas_beside <= most
    assert max(1, multiprocessors // 4) >= most


def test_nothing_is_measured_where_launches_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of the resident route would wait for copies that nobody issues before its launch returns."""
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    with pytest.raises(DeviceError, match="CUDA_LAUNCH_BLOCKING is set"):
        module.calibrate(None)  # type: ignore[arg-type]


def test_it_tells_how_far_it_is() -> None:
    told: list[str] = []
    measure(Invented(), H100, told.append)
    assert len(told) == module.STEPS and told[0] == "the link"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[CudaDevice]:
    """Calibrations give the guess for an H100 with five streams; the list grows by one each time."""
    made: list[CudaDevice] = []

    def calibrate(device: CudaDevice) -> Calibration:
        made.append(device)
        return Calibration(replace(H100, measured=True, streams=5), {}, (), 0.1)

    monkeypatch.setattr(module, "calibrate", calibrate)
    return made


@pytest.mark.usefixtures("gpu")
def test_when_an_engine_measures(measured: list[CudaDevice]) -> None:
    device, notes = CudaDevice(), []
    assert profile_for(device, "never", notes).streams == profile_for(device, "stored", notes).streams == 2
    assert not measured and not store.path_of(device).exists()
    assert profile_for(device, "once", notes).streams == 5 and len(measured) == 1
    assert profile_for(device, "once", notes).streams == profile_for(device, "stored", notes).streams == 5
    assert profile_for(device, "never", notes).streams == 2 and len(measured) == 1 and not notes


@pytest.mark.usefixtures("gpu")
def test_what_another_process_has_measured_meanwhile_is_not_measured_again(
    measured: list[CudaDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = CudaDevice()
    answers: Iterator[Profile | None] = iter([None, replace(H100, streams=7)])
    monkeypatch.setattr(store, "load", lambda _: next(answers))
    assert profile_for(device, "once", []).streams == 7 and not measured


@pytest.mark.usefixtures("gpu")
def test_what_is_measured_and_cannot_be_kept_is_told(
    measured: list[CudaDevice], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else each engine would take seconds to start, and nobody would know why."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KVORTEX_CACHE_DIR", str(tmp_path / "file"))
    notes: list[str] = []
    for times in (1, 2):
        assert profile_for(CudaDevice(), "once", notes).streams == 5 and len(measured) == times == len(notes)
    assert notes[0].startswith("calibrated, and ") and notes[0].endswith("cannot be written: each engine will measure anew")


@pytest.mark.usefixtures("gpu")
def test_an_engine_works_without_what_could_not_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: CudaDevice) -> Calibration:
        raise DeviceError("planted")

    monkeypatch.setattr(module, "calibrate", refuse)
    notes: list[str] = []
    assert not profile_for(CudaDevice(), "once", notes).measured and notes == ["not calibrated: planted"]
    assert not store.path_of(CudaDevice()).exists()
