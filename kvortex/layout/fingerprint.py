"""What a record's bytes mean, as 32 bytes: two layouts with equal fingerprints can load each other's records."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from itertools import groupby

from kvortex.layout.fragments import TensorBlocks

_VERSION = b"kvortex-layout-1"


def fingerprint(tensors: Iterable[tuple[int, TensorBlocks]], order: str) -> bytes:
    """Hash where every element of a block lies in its record.

    A record is layer after layer, so a tensor with a layer axis is hashed as that many layers: a model's layers in
    separate tensors and the same layers in one tensor make the same records. Addresses, padding, the number of blocks
    and the place of the block axis leave no trace in a record, and none here. Of the dtype only the width is known:
    what tells fp16 from bf16 belongs in `order` or in the blocks' keys.

    Parameters
    ----------
    tensors
        Bytes of an element, and the tensor, in record order.
    order
        The caller's label.

    Returns
    -------
    bytes
        SHA-256 digest.
    """
    digest = hashlib.sha256()
    for part in (_VERSION, order.encode()):
        digest.update(struct.pack("<Q", len(part)) + part)
    layers = (
        (itemsize, len(blocks.shape), *blocks.shape, *blocks.record_strides)
        for itemsize, blocks in tensors
        for _ in range(blocks.num_layers)
    )
    for layer, repeats in groupby(layers):
        row = (sum(1 for _ in repeats), *layer)
        digest.update(struct.pack(f"<Q{len(row)}Q", len(row), *row))
    return digest.digest()
