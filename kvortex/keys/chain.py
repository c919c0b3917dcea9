"""The scheme ``kvortex``: a chain of SHA-256 over the token ids, started from everything else that shapes the bytes.

Two blocks share a key only if model, dtype, layout, block size, rank, LoRA, salt and every token up to the block's
end are the same, so a key that is found names bytes that may be used. Digests are never truncated.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy.typing as npt

from kvortex.errors import ArgumentError, ConfigError
from kvortex.keys.arrays import KeyArray, Tokens, compiled
from kvortex.keys.namespace import Namespace, a_namespace
from kvortex.keys.scheme import KeyScheme, empty_keys
from kvortex.keys.sequence import Chain

_MAX_TOKEN = 2**32 - 1
_REMEMBERED = 256  # LoRAs and salts whose seeds are kept


class KvortexKeys(KeyScheme):
    """``key[i] = SHA-256(key[i - 1] || tokens of block i as little-endian uint32)``, before the first the namespace's seed.

    Parameters
    ----------
    namespace
        Where chains start, and how many tokens a block has.

    Raises
    ------
    ArgumentError
        ``namespace`` is none.
    """

    name = "kvortex"

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = a_namespace(namespace)
        self.block_size = namespace.block_size
        self._remembered = functools.lru_cache(_REMEMBERED)(self._chain)

    def chain(self, *, lora: str | None = None, salt: str | None = None) -> Chain:  # type: ignore[override]
        """How a sequence is named, with another LoRA or salt than the namespace's unless None."""
        texts = isinstance(lora, str | None) and isinstance(salt, str | None)
        return self._remembered(lora, salt) if texts else self._chain(lora, salt)  # which says what is wrong

    def _chain(self, lora: str | None, salt: str | None) -> Chain:
        namespace = self.namespace
        if lora is not None or salt is not None:
            own, other = namespace.lora if lora is None else lora, namespace.salt if salt is None else salt
            try:
                namespace = dataclasses.replace(namespace, lora=own, salt=other)
            except ConfigError as error:  # no option's value here, but an argument of one call
                raise ArgumentError(str(error)) from None
        size = self.block_size

        def hash_blocks(tokens: Tokens, parent: bytes, start: int) -> KeyArray:
            keys = empty_keys(len(tokens) // size)
            if len(keys):
                loops, hardware = compiled()
                loops.hash_chain(tokens, size, loops.bytes_of(parent), keys, hardware.available())
            return keys

        return Chain(first=namespace.seed, block_size=size, most=_MAX_TOKEN, hash_blocks=hash_blocks)

    def stored(self, keys: KeyArray) -> KeyArray:
        """The keys themselves: they have all of the namespace in them."""
        return keys


def block_keys(
    namespace: Namespace, token_ids: npt.ArrayLike | Sequence[int] | range, parent: bytes | KeyArray | None = None
) -> KeyArray:
    """Keys of the full blocks of a token sequence, by the scheme ``kvortex``.

    ``key[i] = SHA-256(key[i - 1] || tokens of block i as little-endian uint32)``, and before the first block stands
    ``parent``, or without one ``namespace.seed``.

    Parameters
    ----------
    namespace
        Where the chain starts, and how many tokens a block has.
    token_ids
        n token ids from 0 to 2**32 - 1: a 1-d integer array (a memoryview of items wider than a byte is one), or a
        sequence of integers. Tokens behind the last full block are checked and otherwise ignored.
    parent
        Key of the block before ``token_ids[0]``: 32 ``bytes``, or a row of an earlier result. A sequence that grew is
        continued by hashing the new blocks only.

    Returns
    -------
    numpy.ndarray
        (n // block_size, 32) uint8, C-contiguous, new.

    Raises
    ------
    ArgumentError
        Token ids that are no integers (bools, floats and bytes are none), are masked, out of range or not 1-d; a bad
        ``parent``; ``namespace`` is none.
    """
    return KvortexKeys(namespace).block_keys(token_ids, parent)
