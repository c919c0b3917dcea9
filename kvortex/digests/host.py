"""Digests by the CPU: what kernels compute while bytes stream through them, of records that lie in host memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray, njit, types
from numba.extending import intrinsic

from kvortex.digests.keys import COLUMNS, ROW_BYTES, Numbers, columns, lengths, rows


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(typingctx: Any, address: Any) -> Any:
    """An address as a pointer to bytes."""
    if not isinstance(address, types.Integer):
        return None

    def emit(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        number = context.cast(builder, given[0], signature.args[0], types.int64)
        return builder.inttoptr(number, context.get_value_type(signature.return_type))

    return types.CPointer(types.uint8)(address), emit


@njit(nogil=True, cache=True)
def _reversed(word: np.uint64) -> np.uint64:
    low, high = word & np.uint64(0x00FF00FF), word & np.uint64(0xFF00FF00)
    word = (low << np.uint64(8)) | (high >> np.uint64(8))
    return ((word << np.uint64(16)) | (word >> np.uint64(16))) & np.uint64(0xFFFFFFFF)


@njit(nogil=True, cache=True)
def _digest(data: Any, nbytes: int, c: Numbers, r: Numbers, l: Numbers, out: Numbers) -> None:  # noqa: E741
    first, second = l[0] * np.uint64(nbytes), l[1] * np.uint64(nbytes)
    row = np.zeros(ROW_BYTES, np.uint8)
    words = row.view(np.uint32)
    for j in range((nbytes + ROW_BYTES - 1) // ROW_BYTES):
        start = j * ROW_BYTES
        here = min(ROW_BYTES, nbytes - start)
        row[:here] = data[start : start + here]
        row[here:] = 0
        a, b = np.uint64(0), np.uint64(0)
        for i in range(COLUMNS):
            word = np.uint64(words[i])
            a += c[0, i] * word
            b += c[1, i] * _reversed(word)
        first += r[j, 0] * a
        second += r[j, 1] * b
    out[0], out[1] = first, second


@njit(nogil=True, cache=True)
def _digest_all(
    addresses: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], c: Numbers, r: Numbers, l: Numbers, out: Numbers  # noqa: E741
) -> None:
    for at in range(addresses.size):
        _digest(carray(_pointer(addresses[at]), (sizes[at],)), sizes[at], c, r, l, out[at])


def digest_records(
    addresses: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]
) -> None:
    """Digests of records in host memory, in one call without the GIL.

    Parameters
    ----------
    addresses, sizes : (n,) int64
        Where each record lies, and its bytes. Nobody may write there meanwhile.
    out : (n, 16) uint8, C-contiguous
        Gets the digests: the two halves as little-endian 64-bit numbers.
    """
    if len(addresses):
        _digest_all(addresses, sizes, columns(), rows(int(sizes.max())), lengths(), out.view(np.uint64))
