"""Calibration: measures a GPU and its link once, in seconds, and says what transfers are to be shaped like."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

from kvortex.devices.cuda import CudaDevice
from kvortex.errors import DeviceError, KVortexError
from kvortex.transfer.cuda import launches_block
from kvortex.transfer.executor import Direction
from kvortex.transfer.profiles import store
from kvortex.transfer.profiles.bench import FRAGMENTS, Bench
from kvortex.transfer.profiles.measurements import Measurement, first_of_the_best, least_short, long_enough, rank
from kvortex.transfer.profiles.profile import KERNEL_S, STAGED_CTAS_EACH, Profile, guess, most_resident_ctas
from kvortex.transfer.routes import Route

FRAGMENT_BYTES = (4 << 10, 16 << 10, 32 << 10, 128 << 10)
MIDDLE_BYTES = 16 << 10  # for what hardly depends on it
PAYLOADS = (1 << 20, 4 << 20, 16 << 20)  # or one record, if that is more; and the largest, which the bench knows
COPY_BYTES = (64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20)
STREAMS, RESIDENT_CTAS, BESIDE_CTAS = (1, 2, 3), (1, 2, 3, 4, 6, 8), (1, 2, 4)
CHUNK_PARTS = (1, 2, 4)  # of the staging buffer that is guessed; of equals the longest, which both ways at once need
# Of as many CTAs as there may be, for a launch; of equals the most, which are soon over: who comes late has nothing to do.
STAGED_PARTS = (1, 2, 4, 8)
ROUNDS = 5
STEPS = 3 + 2 * len(FRAGMENT_BYTES)  # that ``tell`` hears of
_EQUAL, _HOPELESS = 0.002, 0.5  # of the best rate: as good, and not worth another round
_WORTH_BESIDE = 0.4  # of the link's rate, with the GPU idle
_DEEP = 2  # times what the link carries while a kernel of a model runs: one half on the link, one that is filled at its end
_T = TypeVar("_T")


class Machine(Protocol):
    """What is measured with; see :class:`kvortex.transfer.profiles.bench.Bench`."""

    nbytes: int
    multiprocessors: int

    def routes(self) -> tuple[Route, ...]: ...
    def link(self, profile: Profile, direction: Direction) -> float: ...
    def copies(self, profile: Profile, direction: Direction, nbytes: int) -> float: ...
    def idle(self, profile: Profile, direction: Direction, fragment_bytes: int, nbytes: int, route: Route) -> float: ...
    def beside(self, profile: Profile, direction: Direction, fragment_bytes: int, route: Route) -> tuple[float, float]: ...
    def check(self, profile: Profile, fragment_bytes: int, route: Route) -> None: ...


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes
    ----------
    profile
    link
        Bytes per second of one long DMA each way.
    table
        All measurements of routes.
    seconds
        That it took.
    """

    profile: Profile
    link: dict[Direction, float]
    table: tuple[Measurement, ...]
    seconds: float


def calibrate(device: CudaDevice, tell: Callable[[str], None] = lambda _: None) -> Calibration:
    """Measures a GPU by transfers between memory of its own: up to 256 MiB of VRAM and pinned RAM, and staging buffers.

    Parameters
    ----------
    device
        Best with nothing else to do; what runs beside is measured with it.
    tell
        Called with what is about to be measured.

    Raises
    ------
    TransferError
        A route moved wrong bytes, or the GPU failed.
    DeviceError, PinnedMemoryError, BuildError
        Memory or kernels cannot be had, or launches wait for the end of their kernels.
    """
    if launches_block():
        raise DeviceError("CUDA_LAUNCH_BLOCKING is set: launches then wait for their kernels, and figures mean nothing")
    start = guess(device.link_rate, device.multiprocessors)
    with Bench(device, start, FRAGMENTS * max(FRAGMENT_BYTES)) as bench:
        return measure(bench, start, tell)


def measure(machine: Machine, start: Profile, tell: Callable[[str], None] = lambda _: None) -> Calibration:
    """See :func:`calibrate`; ``start`` is a guess that is replaced piece by piece."""
    began = time.monotonic()
    tell("the link")
    link = _medians(Direction, partial(machine.link, start))
    profile = replace(start, measured=True, link_rate=min(link.values()))
    slower = {nbytes: min(_medians(Direction, partial(_copies, machine, profile, nbytes)).values()) for nbytes in COPY_BYTES}
    copy_bytes = long_enough(slower, profile.link_rate)
    profile = replace(profile, copy_bytes=copy_bytes, group_bytes=copy_bytes * start.group_bytes // start.copy_bytes)
    tell("staging buffers")
    profile = _best_buffers(machine, profile)
    profile = _best_ctas(machine, profile)
    table: list[Measurement] = []
    for fragment_bytes in FRAGMENT_BYTES:
        tell(f"fragments of {fragment_bytes >> 10} KiB")
        for route in machine.routes():
            machine.check(profile, fragment_bytes, route)
        table += _idle(machine, profile, fragment_bytes)
    tell("launches beside a computation")
    profile = _best_launches_beside(machine, profile, link)
    for fragment_bytes in FRAGMENT_BYTES:
        tell(f"fragments of {fragment_bytes >> 10} KiB beside a computation")
        table += _beside(machine, profile, fragment_bytes, link, table)
    profile = replace(profile, rankings=rank(table, link))
    return Calibration(profile, link, tuple(table), time.monotonic() - began)


def _medians(keys: Iterable[_T], run: Callable[[_T], float]) -> dict[_T, float]:
    """Median rates of what ``run`` measures for each of the keys, by turns. The hopeless are measured once."""
    rates: dict[_T, list[float]] = {key: [] for key in keys}
    for _ in range(ROUNDS):
        best = max((statistics.median(found) for found in rates.values() if found), default=0.0)
        for key in rates:
            if not rates[key] or statistics.median(rates[key]) >= _HOPELESS * best:
                rates[key].append(run(key))
    return {key: statistics.median(found) for key, found in rates.items()}


def _idle_rate(machine: Machine, profile: Profile) -> float:
    """Of the largest transfer by resident kernel, or by staging where that cannot run, in the slower direction."""
    return min(_medians(Direction, partial(_one_way, machine, profile)).values())


def _one_way(machine: Machine, profile: Profile, direction: Direction) -> float:
    route = Route.RESIDENT if Route.RESIDENT in machine.routes() else Route.STAGED
    return machine.idle(profile, direction, MIDDLE_BYTES, machine.nbytes, route)


def _copies(machine: Machine, profile: Profile, nbytes: int, direction: Direction) -> float:
    return machine.copies(profile, direction, nbytes)


def _best_buffers(machine: Machine, profile: Profile) -> Profile:
    """Streams and length of staging buffers; of those that are as good the longest, then the fewest."""
    shapes = [
        replace(profile, buffer_bytes=max(4096, profile.buffer_bytes // part), streams=streams)
        for part in CHUNK_PARTS
        for streams in STREAMS
    ]
    return first_of_the_best({shape: _idle_rate(machine, shape) for shape in shapes}, _EQUAL)


def _best_ctas(machine: Machine, profile: Profile) -> Profile:
    if Route.RESIDENT not in machine.routes():
        return profile
    most = most_resident_ctas(machine.multiprocessors)
    shapes = [replace(profile, resident_ctas=ctas) for ctas in RESIDENT_CTAS if ctas <= most]
    return first_of_the_best({shape: _idle_rate(machine, shape) for shape in shapes}, _EQUAL)


def _best_launches_beside(machine: Machine, profile: Profile, link: dict[Direction, float]) -> Profile:
    def cost(shape: Profile, route: Route) -> list[tuple[float, float]]:
        found = {d: _one_beside(machine, shape, d, MIDDLE_BYTES, route) for d in Direction}
        return [(rate / link[d], slowdown) for d, (rate, slowdown) in found.items()]

    if Route.RESIDENT in machine.routes():
        most = most_resident_ctas(machine.multiprocessors)
        few = [replace(profile, resident_ctas_beside=ctas) for ctas in BESIDE_CTAS if ctas <= most]
        profile = least_short({shape: cost(shape, Route.RESIDENT) for shape in few})
    most_staged = STAGED_CTAS_EACH * machine.multiprocessors
    parts = [replace(profile, staged_ctas=max(1, most_staged // part)) for part in STAGED_PARTS]
    return least_short({shape: cost(shape, Route.STAGED) for shape in parts})


def _idle(machine: Machine, profile: Profile, fragment_bytes: int) -> list[Measurement]:
    record = FRAGMENTS * fragment_bytes
    sizes = sorted({max(record, min(nbytes, machine.nbytes)) for nbytes in (*PAYLOADS, machine.nbytes)})
    table = []
    for direction in Direction:
        for nbytes in sizes:
            rates = _medians(machine.routes(), partial(machine.idle, profile, direction, fragment_bytes, nbytes))
            table += [Measurement(direction, fragment_bytes, nbytes, route, rate) for route, rate in rates.items()]
    return table


def _beside(
    machine: Machine, profile: Profile, fragment_bytes: int, link: dict[Direction, float], idle: Sequence[Measurement]
) -> list[Measurement]:
    """Of routes that are fast enough with the GPU idle, but for kernels that keep multiprocessors for each byte on the link."""
    table = []
    for row in idle:
        worth = row.rate >= _WORTH_BESIDE * link[row.direction] and row.route is not Route.MAPPED
        if worth and (row.fragment_bytes, row.nbytes, row.slowdown) == (fragment_bytes, machine.nbytes, None):
            rate, slowdown = _one_beside(machine, profile, row.direction, fragment_bytes, row.route)
            table.append(replace(row, rate=rate, slowdown=slowdown))
    return table


def _one_beside(
    machine: Machine, profile: Profile, direction: Direction, fragment_bytes: int, route: Route
) -> tuple[float, float]:
    """As ``Machine.beside``. Staging is chosen beside a computation only where its buffers are deep, so it is measured with
    such as are; where the GPU has no memory for them, with what there is."""
    if route is Route.STAGED:
        deep = math.ceil(_DEEP * KERNEL_S * profile.link_rate / max(profile.buffers, profile.streams))
        with contextlib.suppress(DeviceError):
            shape = replace(profile, buffer_bytes=max(profile.buffer_bytes, deep))
            return machine.beside(shape, direction, fragment_bytes, route)
    return machine.beside(profile, direction, fragment_bytes, route)


def profile_for(device: CudaDevice, when: str, notes: list[str]) -> Profile:
    """The profile that an engine works with.

    Parameters
    ----------
    device
    when
        ``calibrate`` of :class:`kvortex.KVortexConfig`.
    notes
        Gets why nothing was measured, or kept, where that was asked for.
    """
    found = store.load(device) if when != "never" else None
    if found is None and when == "once":
        try:
            found = once(device, notes)
        except KVortexError as error:  # an engine works without
            notes.append(f"not calibrated: {error}")
    return found if found is not None else guess(device.link_rate, device.multiprocessors)


def once(device: CudaDevice, notes: list[str]) -> Profile:
    """The profile that is stored, by another process meanwhile perhaps; else it is measured, and stored if it can be."""
    with store.alone(device):
        found = store.load(device)
        if found is None:
            found = calibrate(device).profile
            if store.save(device, found) is None:
                notes.append(f"calibrated, and {store.path_of(device)} cannot be written: each engine will measure anew")
        return found
