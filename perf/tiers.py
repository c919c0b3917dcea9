"""How fast are tiers below RAM beside what they stand on, and what does a dead one cost?

The rows of ``tiers_disk.py`` (the disk tier beside bare reads and writes with O_DIRECT), ``tiers_engines.py`` (those by
threads, Linux AIO and io_uring), ``tiers_remote.py`` (Redis and S3 beside bare clients of the same servers) and
``tiers_replay.py`` (a replay with a dead tier beside one without), which say how each is measured; a part whose servers are
not installed is left out, and so is what ``--parts`` does not name. ``ratio`` is of rates, above 1 where the tier is faster.
Runs on the host, whatever ``--device`` says.
"""

from __future__ import annotations

import argparse
from typing import Any

from kvortex.errors import ArgumentError
from perf import tiers_disk, tiers_engines, tiers_remote, tiers_replay
from perf.report import Report, progress

PARTS = {"disk": tiers_disk, "engines": tiers_engines, "remote": tiers_remote, "replay": tiers_replay}
KEYS = ("tier", "operation", "block_bytes", "depth")
BETTER = {"ratio": "higher"}
COLUMNS = (*KEYS, "ratio", "wrong_bytes")


def add_options(parser: Any) -> None:
    """Those of this question, None where they are not given."""
    parser.add_argument("--parts", help=f"of {','.join(PARTS)}; all of them")


def measure(
    device_name: str, *, quick: bool, options: argparse.Namespace | None = None
) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The device's name, all rows, and what each part says of itself."""
    from tests.tiers import servers

    named = getattr(options, "parts", None)
    wanted = list(PARTS) if named is None else named.split(",")
    if unknown := set(wanted) - set(PARTS):
        raise ArgumentError(f"--parts {','.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    rows: list[dict[str, Any]] = []
    methods, absent = {}, {}
    for part in wanted:
        module = PARTS[part]
        progress(part)
        try:
            rows += module.rows(quick=quick)
        except servers.Absent as error:
            absent[part] = str(error)
            continue
        methods[part] = " ".join(str(module.__doc__).split())
    return "host", [dict.fromkeys(COLUMNS, "") | row for row in rows], {"parts": methods, "absent": absent}


def draw(axes: Any, report: Report) -> None:
    """Ratios, a bar a row."""
    axes.barh(range(len(report.rows)), [row["ratio"] for row in report.rows], 0.7, color="#27608f")
    axes.set_yticks(range(len(report.rows)), [" ".join(str(row[key]) for key in KEYS) for row in report.rows], fontsize=7)
    axes.axvline(1, color="black", linewidth=0.6, linestyle=":")
    axes.set_xlabel("rate, tier to what it stands on")
    axes.set_title("Tiers below RAM", fontsize=10)
