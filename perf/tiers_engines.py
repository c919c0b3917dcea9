"""Which engine reads and writes a disk fastest: threads with ``preadv`` and ``pwritev``, Linux AIO, or io_uring.

Blocks of 2 MiB and of 64 KiB of one file that was written before, with O_DIRECT, by turns, each engine with as many requests
at once. ``ratio`` is the median of the rounds' ratios of rates, to threads; ``tier`` names the engine. An engine that the
kernel does not have, or forbids, has no row. ``wrong_bytes`` counts bytes that were read other than they had been written.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from perf.kernel_io import Aio, Uring, transfer
from perf.report import progress
from perf.tiers_disk import Memory, RawFile, row

DEPTHS, SIZES = (1, 4, 16), ((2 << 20, 64), (64 << 10, 512))  # bytes of a block, and blocks
ROUNDS = 9
ENGINES = {"AIO": Aio, "io_uring": Uring}


def rows(folder: Path | None = None, *, quick: bool = False) -> list[dict[str, Any]]:
    """Each row: ``tier``, ``operation``, ``block_bytes``, ``depth``, ``gb_per_s``, ``raw_gb_per_s`` (of threads), ``ratio``,
    ``direct``, ``wrong_bytes``."""
    found = []
    home = Path(tempfile.mkdtemp(prefix="kvortex-perf-", dir=folder))
    try:
        for block, blocks in ((4096, 8),) if quick else SIZES:
            memory = Memory(blocks, block)
            raw = RawFile(home / f"raw-{block}", memory)
            try:
                for depth in DEPTHS[1:2] if quick else DEPTHS:
                    progress(f"engines, {block >> 10} KiB, {depth} at once")
                    with ExitStack() as stack:
                        engines = _opened(raw, depth, stack)
                        found += _at_depth(memory, raw, engines, depth, 2 if quick else ROUNDS)
            finally:
                raw.close()
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return found


def _opened(raw: RawFile, depth: int, stack: ExitStack) -> dict[str, Aio | Uring]:
    """The engines that there are; ``stack`` closes them."""
    engines: dict[str, Aio | Uring] = {}
    for name, engine in ENGINES.items():
        try:
            engines[name] = engine(raw.fd, depth)
        except OSError as error:
            progress(f"no {name}: {error}")
        else:
            stack.callback(engines[name].close)
    return engines


def _at_depth(
    memory: Memory, raw: RawFile, engines: dict[str, Aio | Uring], depth: int, rounds: int
) -> list[dict[str, Any]]:
    addresses = {True: memory.addresses(memory.data).tolist(), False: memory.addresses(memory.room).tolist()}

    def by(engine: Aio | Uring, write: bool) -> None:
        requests = [(address, memory.block, at * memory.block) for at, address in enumerate(addresses[write])]
        transfer(engine, requests, depth, write=write)

    ways: dict[str, dict[str, Callable[[], None]]] = {"put": {}, "get": {}}
    ways["put"]["threads"], ways["get"]["threads"] = lambda: raw.write(depth), lambda: raw.read(depth)
    for name, made in engines.items():
        ways["put"][name], ways["get"][name] = (lambda made=made, write=write: by(made, write) for write in (True, False))
    times: dict[tuple[str, str], list[float]] = {}
    wrong: Counter[tuple[str, str]] = Counter()  # puts have none
    for _ in range(2):
        raw.write(depth)  # both halves of the file
    for turn in range(rounds):
        for operation, each in ways.items():
            for name, work in list(each.items())[:: 1 if turn % 2 else -1]:
                began = time.perf_counter()
                work()
                times.setdefault((operation, name), []).append(time.perf_counter() - began)
                wrong[operation, name] += memory.wrong() if operation == "get" else 0
    return [
        row(name, operation, memory, depth, seconds, times[operation, "threads"], raw.direct, wrong[operation, name])
        for (operation, name), seconds in times.items()
    ]
