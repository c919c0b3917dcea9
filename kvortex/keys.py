"""Names of blocks: a chain of SHA-256 digests over the token ids, started from everything else that shapes the bytes.

Two blocks share a key only if model, dtype, layout, block size, rank, LoRA, salt and every token up to the block's
end are the same, so a key that is found names bytes that may be used. Digests are never truncated.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvortex.arguments import LARGEST, integer_array, refuse_masked
from kvortex.errors import ArgumentError, ConfigError, cut, shown, told

KEY_BYTES = 32
KeyArray: TypeAlias = npt.NDArray[np.uint8]
KeysLike: TypeAlias = KeyArray | Sequence[bytes]

_DOMAIN = b"kvortex-keys-1"  # a new way of hashing gets a new tag, so that old and new keys never meet
_MAX_TOKEN = 2**32 - 1


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
        digest = hashlib.sha256()
        for part in (_DOMAIN, *(_encoded(getattr(self, field.name)) for field in fields(self))):
            # Without its length, a character could move from one field to the next and leave the seed as it was.
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.digest()


def as_keys(keys: KeysLike) -> KeyArray:
    """Keys as one array, one row a key.

    Parameters
    ----------
    keys
        Array (n, 32) uint8, or a sequence of n ``bytes`` of length 32. An empty sequence is fine.

    Returns
    -------
    numpy.ndarray
        (n, 32) uint8, C-contiguous; the array that was given if it is already that, else a copy.

    Raises
    ------
    ArgumentError
        Anything else, masked arrays too; the message says what was seen.
    """
    try:
        return _as_keys(keys)
    except ArgumentError:
        raise
    except Exception as error:  # sequences that raise whatever they like
        raise ArgumentError(f"keys cannot be read: {told(error)}") from error


def _as_keys(keys: KeysLike) -> KeyArray:
    refuse_masked(keys, "keys")
    if isinstance(keys, np.ndarray):
        if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != KEY_BYTES:
            seen = f"shape {keys.shape}, dtype {cut(str(keys.dtype))}"
            raise ArgumentError(f"keys must be an (n, {KEY_BYTES}) uint8 array; seen: {seen}")
        return np.ascontiguousarray(keys)
    if isinstance(keys, (bytes, bytearray, memoryview, str)) or not isinstance(keys, Sequence):
        seen = f"one {type(keys).__name__}"
        raise ArgumentError(f"keys must be an (n, {KEY_BYTES}) uint8 array or sequence of {KEY_BYTES}-byte keys; seen: {seen}")
    items = list(itertools.islice(keys, len(keys) + 1))  # and no more, should it go on for ever
    if len(items) != len(keys):
        raise ArgumentError(f"keys have a length of {len(keys)}, and give another number of keys")
    for place, key in enumerate(items):
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            seen = f"bytes of length {len(key)}" if isinstance(key, bytes) else type(key).__name__
            raise ArgumentError(f"keys[{place}] must be bytes of length {KEY_BYTES}; seen: {seen}")
    # Joined into a bytearray, so that the array can be written, as every other key array can.
    return np.frombuffer(bytearray().join(items), np.uint8).reshape(-1, KEY_BYTES)


def block_keys(
    namespace: Namespace, token_ids: npt.ArrayLike | Sequence[int] | range, parent: bytes | KeyArray | None = None
) -> KeyArray:
    """Keys of the full blocks of a token sequence.

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
        ``parent``.
    """
    tokens = _little_endian(token_ids).tobytes()
    digest = namespace.seed if parent is None else _parent(parent)
    step = 4 * namespace.block_size
    keys = bytearray()
    for start in range(0, len(tokens) - step + 1, step):
        digest = hashlib.sha256(digest + tokens[start : start + step]).digest()
        keys += digest
    return np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES)


def _encoded(value: str | bytes | int) -> bytes:
    if isinstance(value, bytes):
        return value
    # Paths of models may hold undecodable bytes as lone surrogates; surrogatepass keeps different texts different.
    return str(value).encode("utf-8", "surrogatepass")


def _parent(parent: Any) -> bytes:
    refuse_masked(parent, "parent")
    if isinstance(parent, np.ndarray):
        if parent.dtype == np.uint8 and parent.shape == (KEY_BYTES,):
            return parent.tobytes()
        seen = f"shape {parent.shape}, dtype {cut(str(parent.dtype))}"
    elif isinstance(parent, bytes):
        if len(parent) == KEY_BYTES:
            return parent
        seen = f"bytes of length {len(parent)}"
    else:
        seen = f"{cut(type(parent).__name__)} {shown(parent)}"
    raise ArgumentError(f"parent must be one key: {KEY_BYTES} bytes, or a ({KEY_BYTES},) uint8 row; seen: {seen}")


def _little_endian(token_ids: Any) -> npt.NDArray[np.uint32]:
    """Token ids as a contiguous little-endian uint32 array, or ArgumentError."""
    array = integer_array(token_ids, "token_ids")
    if array.size:
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > _MAX_TOKEN:
            raise ArgumentError(f"token_ids must be from 0 to {_MAX_TOKEN}; seen: {low} to {high}")
    return np.ascontiguousarray(array, dtype="<u4")
