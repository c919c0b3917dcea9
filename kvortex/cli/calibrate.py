"""``kvortex calibrate``: measures what transfers on a GPU are to be shaped like, keeps it, and says what it is."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from kvortex.cli import console
from kvortex.cli.profiles import facts, size
from kvortex.devices import open_device
from kvortex.devices.cuda import CudaDevice
from kvortex.errors import DeviceUnavailableError
from kvortex.transfer.executor import Direction
from kvortex.transfer.profiles.measurements import Measurement
from kvortex.transfer.profiles.profile import to_plain

if TYPE_CHECKING:
    from kvortex.transfer.profiles.calibrate import Calibration


def run(arguments: argparse.Namespace) -> int:
    """The command. 0, also where the profile cannot be kept, which stderr says.

    Raises
    ------
    KVortexError
        There is no GPU, or it could not be measured.
    """
    device = open_device(arguments.device)
    if not isinstance(device, CudaDevice):
        raise DeviceUnavailableError("calibrate needs a GPU: the host device has one way to move blocks")
    from kvortex.transfer.profiles.calibrate import STEPS, calibrate  # with all that is compiled, so only where there is a GPU
    from kvortex.transfer.profiles.store import alone, path_of, save

    with alone(device), console.Progress("calibrating", STEPS) as progress:
        found = calibrate(device, progress.advance)
        path = save(device, found.profile)
    if path is None:
        console.note(f"kvortex: {path_of(device)} cannot be written; set KVORTEX_CACHE_DIR to a folder of yours")
    if arguments.json:
        print(json.dumps(_as_json(device, found, None if path is None else str(path)), indent=2))
        return 0
    for direction in Direction:
        console.table(f"{direction.value}, GB/s", _rows(found, direction))
    ending = ("measured in", f"{found.seconds:.1f} s"), ("kept in", str(path or "nowhere"))
    console.table("profile", [*facts(found.profile).items(), *ending])
    return 0


def _rows(found: Calibration, direction: Direction) -> list[tuple[str, str]]:
    """One row a route, length and payload: how fast, and beside a computation what it costs that."""
    rows = [("one long DMA", f"{found.link[direction] / 1e9:.1f}")]
    for row in found.table:
        if row.direction is direction:
            rows.append((f"{size(row.fragment_bytes)}, {size(row.nbytes)}, {row.route.value}", _figures(row)))
    return rows


def _figures(row: Measurement) -> str:
    rate = f"{row.rate / 1e9:.1f}"
    return rate if row.slowdown is None else f"{rate} beside a computation, which takes {row.slowdown:.2f} of its time"


def _as_json(device: CudaDevice, found: Calibration, path: str | None) -> dict[str, Any]:
    table = [
        {
            "direction": row.direction.value,
            "fragment_bytes": row.fragment_bytes,
            "nbytes": row.nbytes,
            "route": row.route.value,
            "bytes_per_second": row.rate,
            "slowdown": row.slowdown,
        }
        for row in found.table
    ]
    return {
        "device": device.describe(),
        "seconds": found.seconds,
        "link": {direction.value: rate for direction, rate in found.link.items()},
        "profile": to_plain(found.profile),
        "file": path,
        "measurements": table,
    }
