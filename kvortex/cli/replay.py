"""``kvortex replay``: a recorded trace of requests, on a pool of a given number of blocks."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from typing import Any

import numpy as np

from kvortex.cli import console
from kvortex.cli.pages import Pages
from kvortex.cli.serve import Server, open_engine, warm_up
from kvortex.cli.trace import BLOCK_TOKENS, read_trace, tokens_of
from kvortex.cli.versions import versions
from kvortex.devices import open_device
from kvortex.errors import ArgumentError, cut

# The pages of the stand-in model hold 16 tokens of 4 layers, whatever a block of the trace holds: 8 fragments a record.
_LAYERS, _TOKENS, _LEAST_DIM = 4, 16, 4
_RECORD_UNIT = _LAYERS * 2 * _TOKENS * _LEAST_DIM * 2
_MOST_RECORD = 1 << 40


def run(arguments: argparse.Namespace) -> int:
    """The command; 1 where a byte was wrong or a transfer failed."""
    if not 0 < arguments.record_bytes <= _MOST_RECORD or arguments.record_bytes % _RECORD_UNIT:
        size = cut(str(arguments.record_bytes))
        raise ArgumentError(f"--record-bytes {size}: must be a multiple of {_RECORD_UNIT}, {_MOST_RECORD} at most")
    _check_writable(arguments.json, arguments.trace)
    requests = read_trace(arguments.trace, arguments.limit)
    report = replay(requests, arguments.blocks, arguments.record_bytes, arguments.device)
    report = {"command": arguments.command_line, "versions": versions(), **report}
    if arguments.json != "-":
        console.table(f"kvortex replay of {os.path.basename(arguments.trace)} on {report['device']['device']}", _rows(report))
    if arguments.json:
        _write(report, arguments.json)
    return 1 if report["wrong_bytes"] or report["failed_blocks"] else 0


def replay(requests: list[list[int]], blocks: int, record_bytes: int, device: str) -> dict[str, Any]:
    """Serves the requests one after the other, and counts.

    Parameters
    ----------
    requests
        Block ids. One id always follows the same other, so chained keys and ids name the same blocks.
    blocks
        Of the pool. Of a longer request only so many leading blocks are used.
    record_bytes
        A multiple of 1 KiB.
    device

    Returns
    -------
    dict
        Ready for JSON; "hits" has one number for each request.
    """
    # A request moves in one load and one save: in parts, what is evicted for its head could be blocks of its own tail.
    longest = min(max(map(len, requests)), blocks)
    dim = record_bytes // (_RECORD_UNIT // _LEAST_DIM)
    with Pages(open_device(device), max(1, longest), _LAYERS, _TOKENS, 1, dim) as pages:
        console.note(f"replay on {pages.device.name}: compiling, where this is the first time")
        warm_up(pages, "--record-bytes")
        with open_engine(pages, blocks, BLOCK_TOKENS, "--blocks") as engine:
            server, hits, began = Server(engine, pages), [], time.perf_counter()
            with console.Progress("requests", len(requests)) as progress:
                for ids in requests:
                    keys = engine.block_keys(tokens_of(ids[:blocks]))
                    hits.append(server.serve(keys, np.arange(len(keys))))
                    progress.advance()
            seconds, stats = time.perf_counter() - began, engine.get_stats()
        references = sum(map(len, requests))
        return {
            "device": pages.device.describe(),
            "requests": len(requests),
            "block_references": references,
            "blocks_beyond_pool": references - server.blocks,
            "prefix_hits": server.hits,
            "prefix_hit_rate": server.hits / references if references else 0.0,
            "pool_blocks": stats.capacity_blocks,
            "record_bytes": record_bytes,
            "evictions": stats.evictions,
            "saved_blocks": stats.saved_blocks,
            "saved_bytes": stats.saved_bytes,
            "loaded_blocks": stats.loaded_blocks,
            "loaded_bytes": stats.loaded_bytes,
            "failed_blocks": stats.failed_blocks,
            "verified_bytes": server.verified_bytes,
            "wrong_bytes": server.wrong_bytes,
            "seconds": seconds,
            "save_bytes_per_second": stats.save_bytes_per_second,
            "load_bytes_per_second": stats.load_bytes_per_second,
            "hits": hits,
        }


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("requests", f"{report['requests']} in {report['seconds']:.1f} s"),
        ("pool", f"{report['pool_blocks']} blocks of {console.amount(report['record_bytes'])}"),
        ("block references", str(report["block_references"])),
        ("prefix hits", f"{report['prefix_hits']} ({report['prefix_hit_rate']:.1%})"),
        ("evictions", str(report["evictions"])),
        ("bytes saved", console.amount(report["saved_bytes"])),
        ("bytes loaded", console.amount(report["loaded_bytes"])),
        ("load, device-timed", f"{report['load_bytes_per_second'] / 1e9:.2f} GB/s"),
        ("save, device-timed", f"{report['save_bytes_per_second'] / 1e9:.2f} GB/s"),
        ("bytes verified", str(report["verified_bytes"])),
        ("wrong bytes", str(report["wrong_bytes"])),
        ("failed blocks", str(report["failed_blocks"])),
    ]
    if report["blocks_beyond_pool"]:
        rows.insert(3, ("left out", f"{report['blocks_beyond_pool']} references: requests longer than the pool"))
    return rows


def _check_writable(path: str | None, trace: str) -> None:
    """Before the work, not after it."""
    if path in (None, "-"):
        return
    if not path:
        raise ArgumentError("--json '': names no file; - is stdout")
    if os.path.exists(path) and os.path.exists(trace) and os.path.samefile(path, trace):
        raise ArgumentError(f"--json {path}: is the trace itself, which would be lost")
    folder = os.path.dirname(os.path.realpath(path))
    place = path if _is_special(path) else folder
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(place, os.W_OK):
        raise ArgumentError(f"--json {path}: no file can be written there")


def _is_special(path: str) -> bool:
    """A pipe or a device, which is written into; a file is replaced."""
    return os.path.exists(path) and not os.path.isfile(path)


def _write(report: dict[str, Any], path: str) -> None:
    text = json.dumps(report) + "\n"
    if path == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    try:
        if _is_special(path):
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        else:
            _replace(os.path.realpath(path), text)
    except OSError as error:
        raise ArgumentError(f"--json {path}: {error.strerror or error}") from None


def _replace(path: str, text: str) -> None:
    """The whole text or nothing: what was there stays until all of it is written."""
    folder, name = os.path.split(path)
    part = os.path.join(folder, f".{name[:99]}.{os.getpid()}.part")
    try:
        with open(part, "x", encoding="utf-8") as file:
            file.write(text)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        raise
