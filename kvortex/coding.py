"""Which slots a block takes where records are coded.

A codec with loss is ruinous to the first block of a sequence, whose attention sinks it must keep exactly. That block needs more
bytes than a slot has, so it takes several, each with some of its bytes as they are, under keys of their own: a block that was
saved as the first of a sequence is found only by who asks for it as that, and the other way round.

Where the pool loses nothing and a tier does, a block takes a slot, whichever it is, and its key says what it is to the tier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.arguments import refuse_masked
from kvortex.codecs import Codec
from kvortex.codecs.lossy import LossyCodec
from kvortex.errors import ArgumentError, shown
from kvortex.issuing import Memory
from kvortex.keys import KeyArray, Namespace, adopt
from kvortex.tiers.codings import marked
from kvortex.transfer.plan import Int64s

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Rows:
    """The slots that the blocks of a call take, block by block.

    Attributes
    ----------
    keys : (m, 32) uint8
        Of what each slot holds.
    block : (m,) int64, or None
        Which block of the call it is of; None where each takes one slot.
    parts : (m,) int64, or None
        Which part of that block; -1 for a coded one.
    """

    keys: KeyArray
    block: Int64s | None = None
    parts: Int64s | None = None

    def check_different(self, asked: KeyArray) -> None:
        """ArgumentError where a call names a key twice: the index would say so by the places of slots."""
        if self.block is None:
            return
        _, names = np.unique(asked, axis=0, return_inverse=True)
        order = np.argsort(names.ravel(), kind="stable")
        twice = np.flatnonzero(np.diff(names.ravel()[order]) == 0)
        if len(twice):
            a, b = sorted(order[twice[0] : twice[0] + 2].tolist())
            raise ArgumentError(f"keys[{a}] and keys[{b}] are the same key; a batch names each key once")

    def whole(self, mask: Mask) -> Mask:
        """(n,) bool for the blocks, from (m,) for their slots: all of them."""
        if self.block is None or not len(mask):
            return mask
        return np.logical_and.reduceat(mask, np.flatnonzero(np.diff(self.block, prepend=-1)))


class Coding:
    """What an engine asks of its codec.

    Parameters
    ----------
    codec
        None for records as they lie in pages.
    namespace
        Of the engine's keys.
    below
        A tier's own codec, of several one with loss; None where no tier has one.

    Attributes
    ----------
    name : str
        Of a codec that knows pages alone, and not what is in buffers; empty where there is none.
    """

    def __init__(self, codec: Codec | None, namespace: Namespace, below: Codec | None = None) -> None:
        self.codec, self._namespace = codec, namespace
        self._losing = None if below is None or below.exact else below
        self._lossy = codec if isinstance(codec, LossyCodec) else None
        self.name = codec.name if codec is not None else "" if below is None else below.name

    def rows(self, keys: KeyArray, first: Any) -> Rows:
        """Where blocks of these keys are.

        Parameters
        ----------
        keys : (n, 32) uint8
        first
            See :meth:`kvortex.KVortexEngine.save_blocks`. Says nothing where nothing is lost.

        Raises
        ------
        ArgumentError
            The codec needs ``first``, or it is none.
        """
        if self._lossy is None and self._losing is not None:
            begins = _begins(first, len(keys), self._losing.name)
            return Rows(marked(self._namespace, keys, begins), np.arange(len(keys)) if begins.any() else None)
        if self._lossy is None:
            return Rows(keys)
        begins = _begins(first, len(keys), self._lossy.name)
        if not begins.any():
            return Rows(keys, None, np.full(len(keys), -1, np.int64))
        counts = np.where(begins, self._lossy.parts, 1)
        block = np.repeat(np.arange(len(keys)), counts)
        parts = np.where(begins[block], np.arange(len(block)) - np.repeat(np.cumsum(counts) - counts, counts), -1)
        made, own = keys[block], parts >= 0
        made[own] = self._part_keys(made[own], parts[own])
        return Rows(made, block, parts)

    def memory(self, memory: Memory, rows: Rows) -> Memory:
        """What a call names, as what its slots hold.

        Raises
        ------
        ArgumentError
            These are buffers, whose bytes no codec knows.
        """
        if self.name and not memory.paged:
            raise ArgumentError(f"codec {self.name} codes pages of the layout: pass block_ids; opaque buffers need an engine "
                                "without one")
        if self.codec is None:
            return memory
        made = memory if rows.block is None else memory[rows.block]
        payload = made.payload
        if rows.parts is not None and self._lossy is not None:
            left = payload - rows.parts * self._lossy.part_bytes
            payload = np.where(rows.parts < 0, payload, np.minimum(left, self._lossy.part_bytes))
        return Memory(True, made.pages, payload, np.full(len(made.pages), self.codec.slot_bytes), rows.parts)

    def record_bytes(self, page_bytes: int) -> int:
        """Bytes of what a slot holds of a page of so many."""
        return page_bytes if self.codec is None else self.codec.slot_bytes

    def followers(self, keys: KeyArray) -> KeyArray:
        """Under which keys blocks of these are kept that begin no sequence."""
        return keys if self._losing is None else marked(self._namespace, keys, np.zeros(len(keys), np.bool_))

    def others(self, keys: KeyArray) -> tuple[KeyArray, KeyArray]:
        """Under which keys blocks of these are kept as first ones: of their first parts, and of all others."""
        if self._losing is not None:
            return marked(self._namespace, keys, np.ones(len(keys), np.bool_)), keys[:0]
        if self._lossy is None:
            return keys[:0], keys[:0]
        parts = np.tile(np.arange(self._lossy.parts), len(keys))
        made = self._part_keys(np.repeat(keys, self._lossy.parts, axis=0), parts)
        return made[parts == 0], made[parts > 0]

    def _part_keys(self, keys: KeyArray, parts: Int64s) -> KeyArray:
        """SHA-256 of 32 bytes of the namespace, the key, and the part's number: 33 bytes, as no scheme hashes them."""
        return adopt(self._namespace, np.concatenate((keys, parts.astype(np.uint8)[:, None]), axis=1))


def _begins(first: Any, count: int, codec: str) -> Mask:
    wanted = "True where keys[0] begins a sequence, False where no key does, or (n,) bools"
    if first is None:
        raise ArgumentError(f"first is missing: codec {codec} keeps the first block of each sequence exactly, and ruins what a "
                            f"model says where it cannot. Pass {wanted}; the same for loads as for saves.")
    if isinstance(first, (bool, np.bool_)):
        return np.arange(count) < int(first)
    refuse_masked(first, "first")
    try:
        mask = np.asarray(first)
    except Exception as error:
        raise ArgumentError(f"first = {shown(first)}: must be {wanted}") from error
    if mask.size == 0 and count == 0:
        return np.zeros(0, np.bool_)
    if mask.dtype != np.bool_ or mask.shape != (count,):
        seen = f"shape {mask.shape}, dtype {shown(str(mask.dtype))}"
        raise ArgumentError(f"first must be {wanted}, n = {count}; seen: {seen}")
    return mask
