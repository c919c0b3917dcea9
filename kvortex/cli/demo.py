"""``kvortex demo``: conversations that grow turn by turn, on a pool that is too small for all of them."""

from __future__ import annotations

import argparse
import time

import numpy as np
import numpy.typing as npt

from kvortex.cli import console
from kvortex.cli.pages import BlockIds, Pages
from kvortex.cli.serve import Server, open_engine, warm_up
from kvortex.devices import open_device
from kvortex.engine import KVortexEngine
from kvortex.errors import ArgumentError, shown
from kvortex.stats import EngineStats

Tokens = npt.NDArray[np.uint32]

# A small model: records of 128 KiB in 16 fragments of 8 KiB.
_BLOCK_TOKENS, _LAYERS, _HEADS, _DIM = 16, 8, 4, 64
_MESSAGE_TOKENS = (200, 600)  # the answer to the last message, and the next message
_VOCABULARY = 128_000
_MOST_TOKENS = 1 << 28  # 1 GiB
_MOST_POOL_BLOCKS = 4096  # 512 MiB, unless the user asks for more


def run(arguments: argparse.Namespace) -> int:
    """The command; 1 where a byte was wrong, a block was damaged or a transfer failed."""
    _check_length(arguments.conversations, arguments.turns, arguments.system_tokens)
    prompts = chat(arguments.conversations, arguments.turns, arguments.system_tokens, arguments.seed)
    lengths = [len(prompt) // _BLOCK_TOKENS for prompt in prompts]
    # What is alive at the end: each conversation's last prompt, and once what they share.
    made = sum(lengths[-arguments.conversations :]) - (arguments.conversations - 1) * (arguments.system_tokens // _BLOCK_TOKENS)
    pool_blocks = arguments.pool_blocks or min(max(1, made * 3 // 4), _MOST_POOL_BLOCKS)
    longest = min(max(*lengths, 1), pool_blocks)
    with Pages(open_device(arguments.device), longest, _LAYERS, _BLOCK_TOKENS, _HEADS, _DIM) as pages:
        console.note(f"demo on {pages.device.name}: compiling, where this is the first time")
        warm_up(pages, "--pool-blocks")
        with open_engine(pages, pool_blocks, _BLOCK_TOKENS, "--pool-blocks") as engine:
            server = Server(engine, pages)
            began = time.monotonic()
            _play(server, engine, prompts, pages, arguments.seed, began + arguments.seconds)
            stats, seconds = engine.get_stats(), time.monotonic() - began
    console.table(f"kvortex demo on {pages.device.name}", _rows(server, stats, len(prompts), seconds))
    if server.requests < len(prompts):
        console.note(f"stopped after {arguments.seconds:g} s; --seconds allows more")
    return 1 if server.wrong_bytes or stats.failed_blocks or stats.corrupt_blocks else 0


def _check_length(conversations: int, turns: int, system_tokens: int) -> None:
    """Before the memory is gone: what is said is kept as tokens."""
    tokens = conversations * (system_tokens + turns * _MESSAGE_TOKENS[1])
    if tokens > _MOST_TOKENS:
        raise ArgumentError(
            f"a chat of up to {shown(tokens)} tokens is too long, {_MOST_TOKENS} at most; "
            "lower --conversations, --turns or --system-tokens"
        )


def chat(conversations: int, turns: int, system_tokens: int, seed: int) -> list[Tokens]:
    """The prompts of all turns in the order in which they come: every conversation in turn, each time longer.

    A prompt is the system prompt, all that was said, and the next message.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(*_MESSAGE_TOKENS, size=(turns, conversations))
    ends = system_tokens + np.cumsum(lengths, axis=0)
    system = rng.integers(_VOCABULARY, size=system_tokens, dtype=np.uint32)
    said = [np.concatenate((system, rng.integers(_VOCABULARY, size=n, dtype=np.uint32))) for n in lengths.sum(axis=0)]
    return [said[who][: ends[turn, who]] for turn in range(turns) for who in range(conversations)]


def _play(server: Server, engine: KVortexEngine, prompts: list[Tokens], pages: Pages, seed: int, deadline: float) -> None:
    rng = np.random.default_rng(seed)
    first = 0
    with console.Progress("turns", len(prompts)) as progress:
        for prompt in prompts:
            if time.monotonic() >= deadline:
                return
            keys = engine.block_keys(prompt)[: pages.num_blocks]
            found = server.serve(keys, _take_pages(rng, first, len(keys), pages.num_blocks))
            first += len(keys)
            progress.advance(f"{len(keys)} blocks, {found} found, {engine.get_stats().evictions} evicted so far")


def _take_pages(rng: np.random.Generator, first: int, count: int, num_blocks: int) -> BlockIds:
    """The next pages of a ring, so that all are used again and again, not in order."""
    ids: BlockIds = (first + np.arange(count, dtype=np.int64)) % num_blocks
    for part in np.array_split(ids, max(1, count // 32)):  # nearly in order: a GPU's pages are written run by run
        rng.shuffle(part)
    return ids


def _rows(server: Server, stats: EngineStats, turns: int, seconds: float) -> list[tuple[str, str]]:
    rate = server.hits / server.blocks if server.blocks else 0.0
    return [
        ("turns", f"{server.requests} of {turns} in {seconds:.1f} s"),
        ("pool", f"{stats.capacity_blocks} blocks, {stats.resident_blocks} in use"),
        ("blocks checked", str(server.blocks)),
        ("blocks hit", str(server.hits)),
        ("hit rate", f"{rate:.1%}"),
        ("blocks loaded", f"{stats.loaded_blocks} ({console.amount(stats.loaded_bytes)})"),
        ("blocks saved", f"{stats.saved_blocks} ({console.amount(stats.saved_bytes)})"),
        ("blocks evicted", str(stats.evictions)),
        ("load, device-timed", f"{stats.load_bytes_per_second / 1e9:.2f} GB/s"),
        ("save, device-timed", f"{stats.save_bytes_per_second / 1e9:.2f} GB/s"),
        ("bytes verified", str(server.verified_bytes)),
        ("wrong bytes", str(server.wrong_bytes)),
        ("failed blocks", str(stats.failed_blocks)),
        ("corrupt blocks", str(stats.corrupt_blocks)),
    ]
