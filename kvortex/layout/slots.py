"""Slots of tokens in a paged cache: ``slot = block_id * block_size + offset``, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvortex.arguments import LARGEST, integer, integer_array
from kvortex.errors import ArgumentError

PADDING = -1  # the slot of a token that is nowhere


def slot_mapping(block_ids: ArrayLike, block_size: int, num_tokens: int | None = None) -> NDArray[np.int64]:
    """Slots of consecutive tokens that fill the blocks in the order given.

    Parameters
    ----------
    block_ids
        Integers, shape (n,), none negative.
    block_size
        Tokens in a block.
    num_tokens
        How many tokens there are, at most ``n * block_size``; by default they fill every block.

    Returns
    -------
    numpy.ndarray
        int64, shape (num_tokens,).

    Raises
    ------
    ArgumentError
        Something is no integer, negative, too large, or the blocks are too few for the tokens.
    """
    ids = _vector(block_ids, "block_ids")
    size = integer(block_size, "block_size", 1)
    capacity = len(ids) * size
    tokens = capacity if num_tokens is None else integer(num_tokens, "num_tokens", 0)
    if tokens > capacity:
        raise ArgumentError(f"num_tokens = {tokens} do not fit in {len(ids)} blocks of {size} tokens; give more block_ids")
    used = ids[: -(-tokens // size)]
    if len(ids) and int(ids.min()) < 0:
        raise ArgumentError(f"block_ids holds {int(ids.min())}; block ids are never negative")
    if len(used) and (int(used.max()) + 1) * size - 1 > LARGEST:
        raise ArgumentError(f"block id {int(used.max())} times block_size = {size} is past the range of int64")
    return (used[:, None] * size + np.arange(min(size, tokens), dtype=np.int64)).reshape(-1)[:tokens]


def blocks_of_slots(slots: ArrayLike, block_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Block and place in the block of each slot.

    Parameters
    ----------
    slots
        Integers, shape (n,): slots, or -1 for padding.
    block_size
        Tokens in a block.

    Returns
    -------
    block_ids, offsets
        int64, shape (n,) each; -1 and -1 for padding.

    Raises
    ------
    ArgumentError
        Something is no integer, or a slot is below -1.
    """
    flat = _vector(slots, "slots")
    size = integer(block_size, "block_size", 1)
    if len(flat) and int(flat.min()) < PADDING:
        raise ArgumentError(f"slots holds {int(flat.min())}; a slot is at least 0, or -1 for padding")
    block_ids, offsets = np.divmod(flat, size)
    offsets[flat == PADDING] = PADDING  # the quotient of -1 is -1 already, its remainder is not
    return block_ids, offsets


def _vector(values: Any, what: str) -> NDArray[np.int64]:
    array = integer_array(values, what)
    if array.size and int(array.max()) > LARGEST:
        raise ArgumentError(f"{what} holds {int(array.max())}, past the range of int64")
    return array.astype(np.int64, copy=False)
