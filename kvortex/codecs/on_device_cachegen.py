"""What the kernels of ``cachegen`` read of a codec, as arrays that the caller puts into VRAM: :mod:`kvortex.codecs.on_device`
for another codec."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvortex.codecs import on_device
from kvortex.codecs.cachegen import CacheGenCodec
from kvortex.codecs.on_device import Cells
from kvortex.kernels import cachegen_form as form
from kvortex.kernels.plane import HEADER

MOST_BYTES = 1 << 30  # of a record: kernels count in 32 bits what damaged ones say
_FILL = 16


def constants(codec: CacheGenCodec) -> npt.NDArray[np.uint8]:
    """What :func:`cells` point at, uint8: to lie at a multiple of 16 in VRAM as long as kernels run."""
    return np.concatenate(_constants(codec))


def cells(codec: CacheGenCodec, fragments: npt.NDArray[np.int64], constants_at: int) -> Cells:
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
    (8 + 2 * planes + 10,) uint64

    Raises
    ------
    CodecError
        Planes do not lie contiguous in these pages, or not at multiples of 4, or records are too large.
    """
    on_device.check_size(codec, MOST_BYTES)
    made = on_device.cells(codec.kept, fragments, constants_at)  # of what is kept exactly: a header says its size
    ends = constants_at + np.cumsum([part.size for part in _constants(codec)])
    tables = _tables(codec)
    more = np.zeros(form.CELLS, np.uint64)
    made[HEADER], more[[form.KINDS, form.MEANS, form.STEPS, form.TABLES]] = ends[0], ends[1:5]
    more[form.N_TABLES] = len(tables)
    more[form.TOP] = 1 << (2 * int(tables[:, form.MOST_AT].max()) + 1).bit_length() - 1
    more[form.STREAM_PLANES], more[form.STREAMS] = codec.stream_planes, codec.streams
    more[form.MOST] = codec.stream_planes * codec.shape.tokens * codec.shape.channels
    more[form.WORST] = codec.worst_bytes
    return np.concatenate((made, more))


def _constants(codec: CacheGenCodec) -> list[npt.NDArray[np.uint8]]:
    """Constants of the exact codec, header, table of each channel, means, steps, tables; each filled to 16 bytes."""
    _, mean, step, kinds, _, _ = codec.compiled
    own = np.searchsorted(np.unique(kinds), kinds).astype(np.uint8)  # kernels get the tables that are used
    parts = (on_device.constants(codec.kept), codec.header, own, mean, step, _tables(codec))
    flat = [np.frombuffer(part.tobytes(), np.uint8) for part in parts]
    return [np.concatenate((part, np.zeros(-part.size % _FILL, np.uint8))) for part in flat]


def _tables(codec: CacheGenCodec) -> npt.NDArray[np.uint16]:
    """(tables, ROW) uint16, as kernels read them, of those that are used."""
    _, _, _, kinds, most, starts = codec.compiled
    used = np.unique(kinds)
    made = np.empty((len(used), form.ROW), np.uint16)
    made[:, : form.MOST_AT], made[:, form.MOST_AT] = starts[used], most[used]
    return made
