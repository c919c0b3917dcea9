"""``kvortex replay``: a recorded trace of requests, on pools of given numbers of blocks, under given policies."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from kvortex.cli import console, plot
from kvortex.cli.output import check_writable, write, write_json
from kvortex.cli.versions import versions
from kvortex.errors import ArgumentError, cut, shown
from kvortex.traces.format import Trace, read_trace
from kvortex.traces.sweep import Grid, label

_POOL_BLOCKS = 3000
_RECORD_BYTES = 16 << 10
_ALL = "all"
_NEVER = "wrong_bytes", "failed_blocks", "corrupt_blocks"  # columns that must be 0

Row = dict[str, Any]
Tell = Callable[[str], None]


def run(arguments: argparse.Namespace) -> int:
    """The command; 1 where a byte was wrong, a block was damaged or a transfer failed."""
    grid = Grid(_policies(arguments.policy), arguments.admit_after or (1,), arguments.pool_blocks or (_POOL_BLOCKS,))
    _check(arguments)
    trace = read_trace(arguments.trace, arguments.limit)
    if trace.dropped:
        console.note(f"kvortex: {trace.dropped} calls are missing in this trace: whoever recorded them was too slow")
    if trace.torn:
        console.note("kvortex: this trace ends within a line, which is passed over: whoever wrote it was interrupted")
    if arguments.no_data:
        from kvortex.cli import replay_index

        facts, runs = replay_index.play(trace, grid)
    else:
        from kvortex.cli import replay_data

        facts, runs = replay_data.play(trace, grid, arguments.record_bytes or _RECORD_BYTES, arguments.device or "auto")
    report = _report(arguments, trace, facts, runs)
    name = f"{os.path.basename(arguments.trace)}, {'index only' if arguments.no_data else facts['device']['device']}"
    if arguments.json != "-":
        _show(f"kvortex replay of {name}", report, runs)
    if arguments.json:
        write_json(report, arguments.json)
    if arguments.plot:  # last: whatever becomes of the picture, the numbers are there
        write("--plot", arguments.plot, plot.draw(name, runs, facts["bound"]))
    return 1 if any(row.get(name) for row in runs for name in _NEVER) else 0


def _policies(text: str | None) -> list[str]:
    """The policies of ``--policy``."""
    from kvortex.index import POLICIES

    if text is None:
        return ["lru"]
    names = [name.strip() for name in text.split(",")]
    if _ALL in names and len(names) > 1:
        raise ArgumentError(f"--policy {cut(text)}: '{_ALL}' stands alone")
    if names == [_ALL]:
        return list(POLICIES)
    for name in names:
        if name not in POLICIES:
            known = ", ".join((*POLICIES, _ALL))
            raise ArgumentError(f"--policy {cut(text)}: {shown(name)} is no policy; known are {known}")
    if len(set(names)) < len(names):
        raise ArgumentError(f"--policy {cut(text)}: names a policy twice")
    return names


def _check(arguments: argparse.Namespace) -> None:
    """What can be refused before anything is read."""
    for option, value in (("--device", arguments.device), ("--record-bytes", arguments.record_bytes)):
        if arguments.no_data and value is not None:
            raise ArgumentError(f"{option} with --no-data: nothing is moved then; leave one of them out")
    if not arguments.no_data:
        from kvortex.cli.replay_data import check_record_bytes

        check_record_bytes(_RECORD_BYTES if arguments.record_bytes is None else arguments.record_bytes)
    check_writable("--json", arguments.json, {"the trace itself": arguments.trace})
    check_writable("--plot", arguments.plot, {"the trace itself": arguments.trace, "the file of --json": arguments.json})
    if arguments.plot == "-":
        raise ArgumentError("--plot -: a picture goes to a file")
    if arguments.plot:
        plot.check_installed()


def _report(arguments: argparse.Namespace, trace: Trace, facts: Row, runs: list[Row]) -> Row:
    """What ``--json`` writes. The numbers of a single run lie beside those of the trace, and hits of each request too."""
    report = {
        "command": arguments.command_line,
        "versions": versions(),
        **facts,
        "requests": trace.asked,
        "block_references": trace.references,
        "distinct_blocks": trace.distinct,
        "block_tokens": trace.block_tokens,
    }
    if len(runs) == 1:
        return report | runs[0]
    return report | {"runs": [{name: value for name, value in row.items() if name != "hits"} for row in runs]}


def _show(title: str, report: Row, runs: list[Row]) -> None:
    if len(runs) == 1:
        console.table(title, _rows(report))
        return
    sizes = list(dict.fromkeys(row["pool_blocks"] for row in runs))
    rates: dict[str, dict[int, float]] = {}
    for row in runs:
        rates.setdefault(label(row["policy"], row["admit_after"]), {})[row["pool_blocks"]] = row["prefix_hit_rate"]
    lines = [[policy, *(f"{of[size]:.2%}" for size in sizes)] for policy, of in rates.items()]
    bounds = {row["pool_blocks"]: row["hit_rate"] for row in report["bound"]}
    lines.append(["at most (Belady)", *(f"{bounds[size]:.2%}" for size in sizes)])
    console.grid(f"{title}: prefix hits by blocks in the pool", ["policy", *map(str, sizes)], lines)
    left = [f"{row['blocks_beyond_pool']} at {row['pool_blocks']}" for row in runs if row["blocks_beyond_pool"]]
    moved = [name for name in _NEVER if name in runs[0]]
    rows = [
        ("requests", str(report["requests"])),
        ("block references", f"{report['block_references']}, {report['distinct_blocks']} different blocks"),
        *([("left out", f"references of requests longer than the pool: {', '.join(dict.fromkeys(left))}")] if left else []),
        *((name.replace("_", " "), str(sum(row[name] for row in runs))) for name in moved),
        ("played in", f"{report['seconds']:.1f} s"),
    ]
    console.table("", rows)


def _rows(report: Row) -> list[tuple[str, str]]:
    """Of a single run."""
    (bound,) = report["bound"]
    data = "record_bytes" in report
    size = f" of {console.amount(report['record_bytes'])}" if data else ", no data"
    rows = [
        ("requests", f"{report['requests']} in {report['seconds']:.1f} s"),
        ("policy", label(report["policy"], report["admit_after"])),
        ("pool", f"{report['pool_blocks']} blocks{size}"),
        ("block references", str(report["block_references"])),
        ("prefix hits", f"{report['prefix_hits']} ({report['prefix_hit_rate']:.1%})"),
        ("at most (Belady)", f"{bound['hits']} ({bound['hit_rate']:.1%})"),
        ("evictions", str(report["evictions"])),
    ]
    if report["blocks_beyond_pool"]:
        rows.insert(4, ("left out", f"{report['blocks_beyond_pool']} references: requests longer than the pool"))
    if not data:
        return rows
    return rows + [
        ("bytes saved", console.amount(report["saved_bytes"])),
        ("bytes loaded", console.amount(report["loaded_bytes"])),
        ("load, device-timed", f"{report['load_bytes_per_second'] / 1e9:.2f} GB/s"),
        ("save, device-timed", f"{report['save_bytes_per_second'] / 1e9:.2f} GB/s"),
        ("bytes verified", str(report["verified_bytes"])),
        ("wrong bytes", str(report["wrong_bytes"])),
        ("failed blocks", str(report["failed_blocks"])),
        ("corrupt blocks", str(report["corrupt_blocks"])),
    ]
