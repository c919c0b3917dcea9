"""The part of an inference engine that both the demo and the replay play."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kvortex.cli.pages import BlockIds, Pages
from kvortex.config import KVortexConfig
from kvortex.engine import KVortexEngine
from kvortex.errors import ArgumentError, PinnedMemoryError
from kvortex.keys import KeyArray
from kvortex.memory.arena import SLOT_ALIGNMENT

_MOST_BYTES = 1 << 60


class Server:
    """Serves requests from a cache, and verifies every byte that comes out of it.

    Attributes
    ----------
    requests, blocks, hits
        Requests served, their blocks, and those in the leading runs that were found.
    verified_bytes, wrong_bytes
        Of the pages that were loaded.
    """

    def __init__(self, engine: KVortexEngine, pages: Pages) -> None:
        self._engine, self._pages = engine, pages
        self.requests = self.blocks = self.hits = self.verified_bytes = self.wrong_bytes = 0

    def serve(self, keys: KeyArray, block_ids: BlockIds) -> int:
        """One request: load the leading blocks that are there, "compute" the others, save those.

        Parameters
        ----------
        keys : (n, 32) uint8
        block_ids : (n,) int64
            Different pages for them, whose contents are lost.

        Returns
        -------
        int
            Blocks found.
        """
        found = self._engine.check_blocks(keys)
        hits = len(found) if found.all() else int(found.argmin())
        loaded = self._load(keys[:hits], block_ids[:hits])
        missing = np.ones(len(keys), bool)
        missing[:hits] = ~loaded
        self._pages.fill(block_ids[missing], keys[missing])
        if missing.any():  # also what was found, and damaged
            self._engine.save_blocks(keys[missing], block_ids[missing]).wait()
        self.requests += 1
        self.blocks += len(keys)
        self.hits += hits
        return hits

    def store(self, keys: KeyArray, block_ids: BlockIds) -> None:
        """Blocks that the model generated: saved, and no request. Arguments as for :meth:`serve`."""
        self._pages.fill(block_ids, keys)
        self._engine.save_blocks(keys, block_ids).wait()

    def _load(self, keys: KeyArray, block_ids: BlockIds) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """Which blocks came; the engine counts those that failed."""
        if not len(keys):
            return np.ones(0, bool)
        self._pages.clear(block_ids)
        loaded = self._engine.load_blocks(keys, block_ids).wait()
        self.wrong_bytes += self._pages.wrong_bytes(block_ids[loaded], keys[loaded])
        self.verified_bytes += int(loaded.sum()) * self._pages.layout.record_bytes
        return loaded


def open_engine(
    pages: Pages, pool_blocks: int, block_size: int, option: str, options: Mapping[str, Any] | None = None
) -> KVortexEngine:
    """An engine with a pool of so many blocks; errors about its size name ``option``, which is what the user can change.

    ``options`` are further ones of the config.
    """
    slot_bytes = -(-pages.layout.record_bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
    if pool_blocks * slot_bytes > _MOST_BYTES:
        raise ArgumentError(f"{option}: {pool_blocks} blocks of {slot_bytes} bytes are more than any machine has; lower it")
    config = KVortexConfig(
        cpu_pool_size_bytes=pool_blocks * slot_bytes,
        device=pages.device.name,
        block_size=block_size,
        model="kvortex-cli",
        dtype="bf16",
        **(options or {}),
    )
    try:
        engine = KVortexEngine.create(config, pages.layout)
        engine.wait_ready()  # which blocks are evicted must not depend on how fast the pool is made
        return engine
    except PinnedMemoryError as error:
        raise PinnedMemoryError(str(error).replace("cpu_pool_size_bytes", option)) from None


def warm_up(pages: Pages, option: str) -> None:
    """Compiles or loads all that serving needs, in an engine of its own, so that nobody measures compilers."""
    with open_engine(pages, 1, 1, option, {"record_trace": ""}) as engine:
        server, keys = Server(engine, pages), engine.block_keys(range(1))
        for _ in range(2):  # the first saves, the second loads
            server.serve(keys, np.zeros(1, np.int64))
