"""The spec's half beside a model runner, without vLLM's classes: chunks of blocks by the manager's slots."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.integrations.vllm.manager import Place
from kvortex.integrations.vllm.messages import Blocks, Done, Int64s
from kvortex.integrations.vllm.store import Store

log = logging.getLogger(__name__)


class Mover:
    """Moves chunks of ``blocks_per_chunk`` blocks, each block a record of its own.

    Parameters
    ----------
    store
        Of ``blocks_per_chunk`` times as many slots as the manager's ledger.
    blocks_per_chunk
    stream
        Gives the stream that the model's kernels are on, None on the host.
    """

    def __init__(self, store: Store, blocks_per_chunk: int, stream: Callable[[], Any]) -> None:
        self.store, self._per_chunk, self._stream = store, blocks_per_chunk, stream

    def save(self, number: int, pages: Any, place: Place, groups: Sequence[tuple[int, int]] | None) -> None:
        """Starts to store pages, behind the model's stream.

        Parameters
        ----------
        number
            Of vLLM's job.
        pages : (n,) integers
            Block ids, group by group.
        place
            Chunks, in the same order.
        groups
            (blocks, place of the first in its request) of each group; None for whole chunks of one group, but that the first
            chunk may begin before the first block.
        """
        self.store.save(number, self._blocks(pages, place, groups), self._stream())

    def load(self, number: int, pages: Any, place: Place, groups: Sequence[tuple[int, int]] | None) -> None:
        """Starts to load pages; as :meth:`save`."""
        self.store.load(number, self._blocks(pages, place, groups), self._stream())

    def poll(self) -> list[Done]:
        """What has ended. A store that failed is no failure to vLLM, which would end: its blocks are found missing when they
        are looked up. A load that failed is one: wrong bytes would be worse."""
        ended = self.store.poll()
        for done in ended:
            if done.failed and not done.saved:
                log.critical("kvortex: %d blocks that were promised could not be loaded; vLLM ends", len(done.failed))
        return ended

    def wait(self, numbers: Iterable[int]) -> None:
        """Blocks until these jobs have ended."""
        self.store.wait(numbers)

    def check(self, slots: Int64s, names: npt.NDArray[np.uint8]) -> str:
        """Whether chunks are in their slots as they were stored: ``"good"``, ``"writing"`` or ``"bad"``."""
        at = (slots[:, None] * self._per_chunk + np.arange(self._per_chunk)).ravel()
        if self.store.is_writing(at):
            return "writing"
        blocks = Blocks(at, np.repeat(names, self._per_chunk, axis=0), np.zeros(len(at), np.int64))
        stored = self.store.held(at)  # of a chunk that a sliding window had left in part, only a part is
        good = self.store.good(blocks)
        whole = stored.reshape(len(slots), -1).any(axis=1).all() and bool(good[stored].all())
        return "good" if whole else "bad"

    def _blocks(self, pages: Any, place: Place, groups: Sequence[tuple[int, int]] | None) -> Blocks:
        ids, each = np.asarray(pages, np.int64), self._per_chunk
        if groups is None:
            groups = [(len(ids), len(place.slots) * each - len(ids))]
        at, first = [], 0
        for count, start in groups:
            if not count:
                continue
            skipped = start % each
            chunks = -(-(skipped + count) // each)
            at.append(first * each + np.arange(skipped, skipped + count))
            first += chunks
        places = np.concatenate(at) if at else np.empty(0, np.int64)
        chunk, within = np.divmod(places, each)
        slots = place.slots[chunk]
        return Blocks(np.where(slots < 0, -1, slots * each + within), place.names[chunk], ids)
