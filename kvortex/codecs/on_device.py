"""What kernels read of a codec, as arrays that the caller puts into VRAM."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvortex.codecs.base import HEADER_BYTES, Codec
from kvortex.codecs.plane import PlaneCodec
from kvortex.errors import CodecError
from kvortex.kernels.plane_form import ACROSS, BASES, GROUPS, HEADER, N_PLANES, PLANES, TABLE_WORDS

Cells = npt.NDArray[np.uint64]
MOST_BYTES = 1 << 31  # of a record: kernels count its bytes in 32 bits


def planes_of(codec: Codec, fragments: npt.NDArray[np.int64], multiple: int) -> Cells:
    """``RecordShape.plane_addresses``; CodecError where they are not such that kernels may load them ``multiple`` bytes at a
    time."""
    planes = codec.shape.plane_addresses(fragments)
    if planes.size and int(np.bitwise_or.reduce(planes, axis=None)) % multiple:
        raise CodecError(f"planes of the pages do not lie at multiples of {multiple} bytes")
    return planes


def check_size(codec: Codec, most: int) -> None:
    """CodecError where kernels, which count less than ``most`` bytes, cannot count those of a record."""
    if codec.worst_bytes >= most:
        raise CodecError(f"a record of {codec.worst_bytes} bytes is larger than kernels can count; the most is {most}")


def constants(codec: PlaneCodec) -> npt.NDArray[np.uint8]:
    """Header and bases one behind the other, uint8: to lie at a multiple of 4 in VRAM as long as kernels run."""
    return np.concatenate((codec.header.view(np.uint8), codec.tables.base.ravel()))


def cells(codec: PlaneCodec, fragments: npt.NDArray[np.int64], constants_at: int) -> Cells:
    """The kernels' ``codec`` argument.

    Parameters
    ----------
    codec
    fragments : (F, 4) int64
        Of the layout whose pages are coded.
    constants_at
        Address of :func:`constants` in VRAM.

    Returns
    -------
    (8 + 2 * planes,) uint64

    Raises
    ------
    CodecError
        Planes do not lie contiguous in these pages, or not at multiples of 4, or records are too large.
    """
    planes = planes_of(codec, fragments, 4)
    check_size(codec, MOST_BYTES)
    made = np.zeros(PLANES + planes.size, np.uint64)
    made[HEADER], made[BASES] = constants_at, constants_at + HEADER_BYTES
    made[N_PLANES] = codec.shape.planes
    made[[GROUPS, ACROSS, TABLE_WORDS]] = codec.form.astype(np.uint64)
    made[PLANES:] = planes.ravel()
    return made
