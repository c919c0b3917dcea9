"""Keys of a sequence that grows: only blocks that are new are hashed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from kvortex.keys.arrays import KEY_BYTES, KeyArray, Tokens, token_array

HashBlocks: TypeAlias = Callable[[Tokens, bytes, int], KeyArray]
_FIRST_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class Chain:
    """How one sequence is named, once all but its tokens is known.

    Parameters
    ----------
    first
        What stands before the first block, 32 bytes.
    block_size
        Tokens of a block.
    most
        The largest token.
    hash_blocks
        Called with tokens, what stands before them, and the place of the first in its sequence; gives the keys of their full
        blocks.
    ahead
        Tokens behind a block that its key covers too.
    placed
        Whether that place matters.
    """

    first: bytes
    block_size: int
    most: int
    hash_blocks: HashBlocks
    ahead: int = 0
    placed: bool = False

    def count(self, tokens: Tokens) -> int:
        """Full blocks that can be named."""
        return max(0, len(tokens) - self.ahead) // self.block_size


class _State(NamedTuple):
    """All that changes, so that one assignment changes all of it. Rows of ``rows`` from ``blocks`` on mean nothing."""

    rows: KeyArray
    blocks: int
    tail: Tokens


class KeySequence:
    """The keys of one sequence while it grows, token by token if need be. Made by :meth:`KeyScheme.sequence`.

    Tokens that fill no block yet are kept, so each token is handed in once and hashed once. Not for two threads at once. A
    call that raises, or is interrupted, has taken all of its tokens or none: :attr:`num_tokens` tells.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._state = _State(np.empty((_FIRST_ROWS, KEY_BYTES), np.uint8), 0, np.empty(0, np.int64))

    @property
    def keys(self) -> KeyArray:
        """Keys of all full blocks so far, (n, 32) uint8; a copy."""
        state = self._state
        return state.rows[: state.blocks].copy()

    @property
    def num_tokens(self) -> int:
        """Tokens so far, with those that fill no block yet."""
        state = self._state
        return state.blocks * self._chain.block_size + len(state.tail)

    def extend(self, token_ids: Any) -> KeyArray:
        """Takes the next tokens of the sequence, and gives the keys of the blocks that they have filled.

        Parameters
        ----------
        token_ids
            As for :meth:`KeyScheme.block_keys`; any number of them.

        Returns
        -------
        numpy.ndarray
            (m, 32) uint8, new, often empty.

        Raises
        ------
        ArgumentError
            As there. Nothing was taken.
        """
        chain, (rows, count, tail) = self._chain, self._state
        tokens = np.concatenate((tail, token_array(token_ids, chain.most)))
        found = chain.count(tokens)
        if not found:
            self._state = _State(rows, count, tokens)
            return np.empty((0, KEY_BYTES), np.uint8)
        before = rows[count - 1].tobytes() if count else chain.first
        keys = chain.hash_blocks(tokens, before, count * chain.block_size)
        if count + found > len(rows):
            rows = np.concatenate((rows[:count], np.empty((max(len(rows), found), KEY_BYTES), np.uint8)))
        rows[count : count + found] = keys
        self._state = _State(rows, count + found, tokens[found * chain.block_size :].copy())
        return keys
