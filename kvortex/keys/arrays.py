"""Keys, hashes and tokens as arrays."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvortex.arguments import integer_array, refuse_masked
from kvortex.errors import ArgumentError, cut, shown, told

KEY_BYTES = 32
KeyArray: TypeAlias = npt.NDArray[np.uint8]
KeysLike: TypeAlias = KeyArray | Sequence[bytes]
Tokens: TypeAlias = npt.NDArray[np.int64]


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
    return as_rows(keys, "keys", KEY_BYTES)


def as_rows(names: Any, name: str, width: int | None = None) -> KeyArray:
    """Byte strings of one length as one array, one row a string; as :func:`as_keys`, with any length for a width of None."""
    rows: KeyArray = names
    plain = type(names) is np.ndarray and names.dtype == np.uint8 and names.ndim == 2
    if plain and names.shape[1] == width and names.flags.c_contiguous:  # before anything else: look-ups wait for this
        return rows
    try:
        return _as_rows(names, name, width)
    except ArgumentError:
        raise
    except Exception as error:  # sequences that raise whatever they like
        raise ArgumentError(f"{name} cannot be read: {told(error)}") from error


def _as_rows(names: Any, name: str, width: int | None) -> KeyArray:
    refuse_masked(names, name)
    wanted = f"an (n, {width or 'bytes'}) uint8 array"
    if isinstance(names, np.ndarray):
        if names.dtype != np.uint8 or names.ndim != 2 or names.shape[1] != (width or max(1, names.shape[1])):
            raise ArgumentError(f"{name} must be {wanted}; seen: shape {names.shape}, dtype {cut(str(names.dtype))}")
        return np.ascontiguousarray(names)
    if isinstance(names, (bytes, bytearray, memoryview, str)) or not isinstance(names, Sequence):
        each = f"{width}-byte {name}" if width else "bytes of one length"
        raise ArgumentError(f"{name} must be {wanted} or sequence of {each}; seen: one {type(names).__name__}")
    items = list(itertools.islice(names, len(names) + 1))  # and no more, should it go on for ever
    if len(items) != len(names):
        raise ArgumentError(f"{name} have a length of {len(names)}, and give another number of {name}")
    if items and width is None:
        width = max(1, len(items[0])) if isinstance(items[0], bytes) else KEY_BYTES
    width = width or KEY_BYTES
    fitting = set(map(type, items)) <= {bytes} and set(map(len, items)) <= {width}
    for place, item in enumerate([] if fitting else items):
        if not isinstance(item, bytes) or len(item) != width:
            seen = f"bytes of length {len(item)}" if isinstance(item, bytes) else type(item).__name__
            raise ArgumentError(f"{name}[{place}] must be bytes of length {width}; seen: {seen}")
    # Joined into a bytearray, so that the array can be written, as every other key array can.
    return np.frombuffer(bytearray().join(items), np.uint8).reshape(-1, width)


def writable(rows: KeyArray) -> KeyArray:
    """Rows as compiled code takes them: others would be compiled for anew."""
    return np.require(rows, np.uint8, ["C", "A", "W"])


def token_array(token_ids: Any, most: int) -> Tokens:
    """Token ids from 0 to ``most`` (63 bits or fewer) as contiguous int64 that can be written, or ArgumentError."""
    array = integer_array(token_ids, "token_ids")
    if array.dtype == np.uint64 and array.size and int(array.max()) > most:
        low, high = int(array.min()), int(array.max())
    else:
        as_they_are = array.dtype == np.int64 and array.flags.carray
        tokens: Tokens = array if as_they_are else np.array(array, np.int64)
        low, high = compiled()[0].extremes(tokens)
        if low >= 0 and high <= most:
            return tokens
        low = int(tokens.min())  # it counts a 0 that need not be there
    raise ArgumentError(f"token_ids must be from 0 to {most}; seen: {low} to {high}")


@functools.cache  # a statement that imports is a search each time, and look-ups wait for it
def compiled() -> tuple[Any, Any]:
    """What hashes tokens, and what says whether the CPU has instructions for that."""
    from kvortex.keys import _loops, _sha_ni

    return _loops, _sha_ni


def one_key(parent: Any) -> bytes:
    """A parent, 32 ``bytes`` or a row of a key array, as bytes; or ArgumentError."""
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


