"""What the kernels of bounded loss read of a codec, as arrays that the caller puts into VRAM."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvortex.codecs.base import HEADER_BYTES
from kvortex.codecs.lossy import LossyCodec
from kvortex.codecs.on_device import MOST_BYTES, Cells, check_size, planes_of
from kvortex.errors import CodecError
from kvortex.kernels.lossy_form import (
    ACROSS,
    BACK,
    BODY_BYTES,
    EACH,
    FACTOR,
    GROUPS,
    HEADERS,
    K_BITS,
    KEY_BYTES,
    LANES,
    MEANS,
    N_PLANES,
    PLANES,
    V_BITS,
    VALUE_BYTES,
)

LEAST_HEAD, MOST_HEAD = 32, 1024  # of what a lane has, and a warp


def constants(codec: LossyCodec) -> npt.NDArray[np.uint8]:
    """Headers and means one behind the other, uint8: to lie at a multiple of 16 in VRAM as long as kernels run."""
    return np.concatenate((codec.headers.ravel().view(np.uint8), codec.tables.mean.ravel().view(np.uint8)))


def cells(codec: LossyCodec, fragments: npt.NDArray[np.int64], constants_at: int) -> Cells:
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
    (16 + 2 * planes,) uint64

    Raises
    ------
    CodecError
        Planes do not lie contiguous in these pages, or not at multiples of 16; heads are of a width that kernels do not have;
        or records are too large.
    """
    shape = codec.shape
    planes = planes_of(codec, fragments, 16)
    width = shape.head_dim
    if width & (width - 1) or not LEAST_HEAD <= width <= MOST_HEAD:
        raise CodecError(f"head_dim = {width}: kernels of {codec.name} take powers of two from {LEAST_HEAD} to {MOST_HEAD}")
    check_size(codec, MOST_BYTES)
    made = np.zeros(PLANES + planes.size, np.uint64)
    made[HEADERS], made[MEANS] = constants_at, constants_at + 2 * HEADER_BYTES
    made[[N_PLANES, GROUPS, ACROSS]] = shape.planes, shape.tokens // 16, shape.channels // 64
    made[EACH] = shape.heads if shape.order == "HND" else 1
    made[[K_BITS, V_BITS, LANES]] = codec.k_bits, codec.v_bits, width // LEAST_HEAD
    made[[FACTOR, BACK]] = codec.turn.view(np.uint32)
    made[[KEY_BYTES, VALUE_BYTES]] = codec.key_bytes, codec.value_bytes
    made[BODY_BYTES] = codec.part_bytes
    made[PLANES:] = planes.ravel()
    return made
