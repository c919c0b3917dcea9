"""What do transfers cost a model that computes meanwhile, by the share of the link that they take?

Engines with one ``link_share_beside_compute`` each move the same kind of blocks, of 64 fragments of 18 KiB, by turns beside a
layer of a model's prompt; loop, turns, rates and slowdowns are those of :mod:`perf.compute`. ``rate``: GB/s of payload, which
shows whether a share is kept.
"""

from __future__ import annotations

import contextlib
from typing import Any

from perf import moving
from perf.loads import Loop
from perf.moving import BUFFERS, STAGING_BYTES, Blocks, open_gpu, rows_of
from perf.pages import WAYS
from perf.raw import RawCopy
from perf.report import Report, progress
from perf.turns import Mover, Turns, raw_movers

LOAD = "prefill"
FRAGMENT_BYTES = 18 << 10
SHARES = (0.25, 0.5, 0.75, 0.92, 1.0)
KEYS = ("share", "direction")
BETTER, COLUMNS = moving.BETTER, (*KEYS, *moving.FIGURES)


def measure(device_name: str, *, quick: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The device's name, a row for each share and direction, and what the rows have in common."""
    device = open_gpu(device_name)
    payload, seconds, rounds = (64 << 20, 0.05, 1) if quick else (512 << 20, 0.2, 7)
    notes: dict[str, Any] = {"payload_bytes": payload, "gpu_pool_size_bytes": STAGING_BYTES, "staging_buffers": BUFFERS}
    notes |= {"load": LOAD, "loop_seconds": seconds, "rounds": rounds, "fragment_bytes": FRAGMENT_BYTES}
    notes["unit"] = "GB/s of payload"
    with contextlib.ExitStack() as stack:
        raw = RawCopy(device, payload)
        stack.callback(raw.close)
        notes["raw_wrong_bytes"] = raw.wrong_bytes()  # from here on its bytes are random
        movers: dict[Any, Mover] = dict(raw_movers(raw))
        kinds = {}
        for share in SHARES:
            progress(f"a share of {share}")
            options = {"transfer_route": "staged", "link_share_beside_compute": share}
            kinds[share] = Blocks(device, FRAGMENT_BYTES, payload, **options)
            stack.callback(kinds[share].close)
            movers |= zip([(share, way) for way in WAYS], kinds[share].movers(), strict=True)
        turns = Turns(movers)
        turns.run(Loop(LOAD, seconds), rounds, LOAD)
        notes["nothing_moves"] = turns.control()
        if turns.failed:
            notes["failed"] = {f"{share or 'one DMA'}, {way}": why for (share, way), why in turns.failed.items()}
        rows: list[dict[str, Any]] = []
        for share, blocks in kinds.items():
            rows += rows_of(turns, share, blocks, {"share": share}, f"a share of {share}")
    return device.name, rows, notes


def draw(axes: Any, report: Report) -> None:
    """Slowdown against the rate, a line a direction, from the rounds' least to their largest; and that of contiguous DMAs."""
    for way, colour in zip(WAYS, ("#27608f", "#d0792a"), strict=True):
        rows = sorted((row for row in report.rows if row["direction"] == way), key=lambda row: row["rate"])
        if not rows:
            continue
        rates, costs = [row["rate"] for row in rows], [row["slowdown"] for row in rows]
        axes.plot(rates, costs, "o-", color=colour, label=way)
        axes.fill_between(
            rates, [row["slowdown_least"] for row in rows], [row["slowdown_most"] for row in rows], color=colour, alpha=0.12
        )
        axes.plot(rows[0]["raw_rate"], rows[0]["raw_slowdown"], "x", color=colour, label=f"{way}, contiguous DMAs")
    axes.axhline(1, color="black", linewidth=0.6, linestyle=":")
    axes.set_xlabel("GB/s of payload")
    axes.set_ylabel("time of the computation, against its time alone")
    axes.set_title(f"What a share of the link costs a prompt, {report.device}", fontsize=10)
    axes.legend(fontsize=8)
