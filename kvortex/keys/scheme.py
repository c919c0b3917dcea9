"""The interface behind which blocks are named in one way or another."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from kvortex.errors import ArgumentError, shown
from kvortex.keys.arrays import KEY_BYTES, KeyArray, one_key, token_array
from kvortex.keys.namespace import Namespace
from kvortex.keys.sequence import Chain, KeySequence

LONGEST_SEQUENCE = 1 << 31  # tokens that places are counted over


class KeyScheme(ABC):
    """A way of naming the blocks of token sequences. Made by :func:`kvortex.keys.make_scheme`.

    Attributes
    ----------
    name
        As in the option ``key_scheme``.
    namespace
        What blocks are of, besides their tokens.
    block_size
        Tokens in one block.
    """

    name: str
    namespace: Namespace
    block_size: int

    @abstractmethod
    def chain(self, **about: Any) -> Chain:
        """How a sequence is named of which all but the tokens is known.

        Raises
        ------
        ArgumentError, ConfigError
            What is known cannot be; the message names it.
        """

    @abstractmethod
    def stored(self, keys: KeyArray) -> KeyArray:
        """The keys under which a pool holds blocks of these keys: such as differ wherever bytes may differ.

        One compiled call, or none.
        """

    def block_keys(
        self, token_ids: Any, parent: bytes | KeyArray | None = None, *, start: int | None = None, **about: Any
    ) -> KeyArray:
        """Keys of the full blocks of a token sequence, in one compiled call without the GIL.

        Parameters
        ----------
        token_ids
            Integers from 0 on: a 1-d integer array (a memoryview of items wider than a byte is one), or a sequence. Tokens
            behind the last full block are checked and otherwise ignored.
        parent
            Key of the block before ``token_ids[0]``: 32 ``bytes``, or a row of an earlier result. A sequence that grew is
            continued by hashing the new blocks only.
        start
            Tokens before ``token_ids[0]``. Only needed with a ``parent``, and only where places in the sequence matter
            (multimodal inputs, prompt embeddings).
        **about
            What else the keys cover; see :class:`KvortexKeys` and :class:`VllmKeys`.

        Returns
        -------
        numpy.ndarray
            (n, 32) uint8, C-contiguous, new.

        Raises
        ------
        ArgumentError
            Token ids that are no integers (bools, floats and bytes are none), are masked, out of range or not 1-d; a bad
            ``parent`` or ``start``.
        """
        chain = self.chain(**about)
        tokens = token_array(token_ids, chain.most)
        before = chain.first if parent is None else one_key(parent)
        return chain.hash_blocks(tokens, before, self._start(start, parent is not None, chain.placed))

    def sequence(self, **about: Any) -> KeySequence:
        """The keys of one sequence while it grows; ``about`` as for :meth:`block_keys`."""
        return KeySequence(self.chain(**about))

    def _start(self, start: int | None, continued: bool, placed: bool) -> int:
        if start is None:
            if continued and placed:
                raise ArgumentError("start is missing: with a parent, multimodal inputs or embeddings need to know how many "
                                    "tokens are before token_ids[0]")  # fmt: skip
            return self.block_size if continued else 0
        good = isinstance(start, (int, np.integer)) and not isinstance(start, bool)
        at = operator.index(start) if good else -1  # a narrow integer of NumPy cannot be divided by a large block size
        if at % self.block_size or (at <= 0 if continued else at != 0) or at > LONGEST_SEQUENCE:
            what = f"a positive multiple of the block size {self.block_size}, of 2**31 at most"
            wanted = what if continued else "0 without a parent"
            raise ArgumentError(f"start = {shown(start)}: must be {wanted}")
        return at


def empty_keys(count: int) -> KeyArray:
    """An array for so many keys."""
    return np.empty((count, KEY_BYTES), np.uint8)
