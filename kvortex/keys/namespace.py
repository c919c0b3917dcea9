"""What a key stands for besides tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from kvortex.arguments import LARGEST
from kvortex.errors import ArgumentError, ConfigError, shown
from kvortex.keys.arrays import KEY_BYTES, KeyArray, as_rows, writable

# A new way of hashing gets a new tag, so that old and new keys never meet.
_CHAIN = b"kvortex-keys-1"
_ADOPTED = b"kvortex-adopted-keys-1"


@dataclass(frozen=True, kw_only=True)
class Namespace:
    """Everything besides the tokens that decides what the bytes of a block are, or who may see them.

    Parameters
    ----------
    model, dtype, lora, salt
        Names; any text. ``salt`` keeps tenants apart.
    layout
        Fingerprint of the record layout, as bytes of any length.
    block_size
        Tokens in one block, at least 1.
    rank, world_size
        Which slice of the model this process holds; ``0 <= rank < world_size``.

    Raises
    ------
    ConfigError
        A field has the wrong type or an impossible value; the message names it.
    """

    model: str = ""
    dtype: str = ""
    layout: bytes = b""
    block_size: int = 16
    rank: int = 0
    world_size: int = 1
    lora: str = ""
    salt: str = ""

    def __post_init__(self) -> None:
        for name, kind in (("model", str), ("dtype", str), ("layout", bytes), ("lora", str), ("salt", str)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"{name} = {shown(getattr(self, name))}: must be {kind.__name__}")
        for name, least in (("block_size", 1), ("rank", 0), ("world_size", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
                raise ConfigError(f"{name} = {shown(value)}: must be an integer of at least {least} and of 63 bits at most")
        if self.rank >= self.world_size:
            raise ConfigError(f"rank = {self.rank}: must be below world_size = {self.world_size}")

    @cached_property
    def seed(self) -> bytes:
        """The 32 bytes that stand before the first block; namespaces that differ in any field differ here.

        SHA-256 over the tag ``kvortex-keys-1`` and the fields in the order of their declaration, each preceded by its
        length as a little-endian uint64; text as UTF-8, integers as decimal digits.
        """
        return self._digest(_CHAIN)

    @cached_property
    def adopting_seed(self) -> bytes:
        """The 32 bytes that stand before a foreign hash; as :attr:`seed`, with the tag ``kvortex-adopted-keys-1``."""
        return self._digest(_ADOPTED)

    def _digest(self, tag: bytes) -> bytes:
        digest = hashlib.sha256()
        for part in (tag, *(_encoded(getattr(self, field.name)) for field in fields(self))):
            # Without its length, a character could move from one field to the next and leave the seed as it was.
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.digest()


def adopt(namespace: Namespace, hashes: Any) -> KeyArray:
    """Keys in a namespace for blocks that somebody else has named.

    ``key[i] = SHA-256(namespace.adopting_seed || hashes[i])``: hashes that name content only, as vLLM's do, become keys that
    differ where the bytes may. One compiled call, without the GIL. No key of a chain (:func:`block_keys`) is ever among them.

    Parameters
    ----------
    namespace
    hashes
        n different names: (n, 32) uint8, or a sequence of n ``bytes`` of length 32. Another length of all is fine too: 36 for
        vLLM's offload keys, which end in a group's number.

    Returns
    -------
    numpy.ndarray
        (n, 32) uint8, C-contiguous, new; the same hash always gets the same key.

    Raises
    ------
    ArgumentError
        As from :func:`as_keys`; ``namespace`` is none.
    """
    from kvortex.keys._loops import bytes_of, hash_rows
    from kvortex.keys._sha_ni import available

    rows = writable(as_rows(hashes, "hashes"))
    namespace = a_namespace(namespace)
    keys = np.empty((len(rows), KEY_BYTES), np.uint8)
    hash_rows(bytes_of(namespace.adopting_seed), rows, keys, available())
    return keys


def a_namespace(namespace: Any) -> Namespace:
    """What was handed in as one, or ArgumentError."""
    if not isinstance(namespace, Namespace):
        raise ArgumentError(f"namespace = {shown(namespace)}: must be a kvortex.keys.Namespace")
    return namespace


def _encoded(value: str | bytes | int) -> bytes:
    if isinstance(value, bytes):
        return value
    # Paths of models may hold undecodable bytes as lone surrogates; surrogatepass keeps different texts different.
    return str(value).encode("utf-8", "surrogatepass")


