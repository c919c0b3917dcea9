"""Where planes lie in records and in pages."""

from __future__ import annotations

import numpy as np
import pytest

from kvortex import KVLayout
from kvortex.codecs import RecordShape
from kvortex.errors import CodecError


def test_planes_of_both_orders() -> None:
    nhd, hnd, mla = RecordShape(2, 3, 64), RecordShape(2, 3, 64, order="HND"), RecordShape(2, 1, 576, parts="L")
    assert (nhd.planes, nhd.channels, nhd.parts_of_planes) == (4, 192, "KVKV")
    assert (hnd.planes, hnd.channels, hnd.parts_of_planes) == (12, 64, "KKKVVVKKKVVV")
    assert (mla.planes, mla.channels, mla.parts_of_planes) == (2, 576, "LL")
    assert nhd.raw_bytes == hnd.raw_bytes == 2 * 2 * 3 * 64 * 16 * 2


@pytest.mark.parametrize("field", ["layers", "heads", "head_dim", "tokens", "order", "parts", "dtype"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5, "x", None, 1 << 21])
def test_impossible_fields_are_named(field: str, value: object) -> None:
    with pytest.raises(CodecError, match=f"^{field} = "):
        RecordShape(**({"layers": 1, "heads": 1, "head_dim": 64} | {field: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize("together", [False, True])
def test_planes_are_found_in_pages(order: str, together: bool) -> None:
    """By reading each plane where it is said to be: layers apart, or all in one tensor that makes one fragment of a block."""
    shape = RecordShape(2, 2, 64, order=order)
    page = (16, 2, 64) if order == "NHD" else (2, 16, 64)
    blocks = 5
    if together:
        memory = np.arange(blocks * 4 * 2048, dtype=np.uint16).reshape(blocks, 2, 2, *page)
        layout = KVLayout.from_arrays(memory, 0, 1)
        assert len(layout.fragments) == 1
    else:
        memory = np.arange(blocks * 4 * 2048, dtype=np.uint16).reshape(2, 2, blocks, *page)
        layout = KVLayout.from_arrays(list(memory), 1)
    rows = shape.plane_addresses(layout.fragments)
    assert rows.shape == (shape.planes, 2) and rows.dtype == np.uint64
    for block in range(blocks):
        record = memory[block] if together else memory[:, :, block]
        planes = record.reshape(shape.planes, -1)
        for (base, stride), plane in zip(rows.tolist(), planes, strict=True):
            at = (base + block * stride - memory.ctypes.data) // 2
            assert (memory.reshape(-1)[at : at + plane.size] == plane).all()


def test_pages_that_hold_no_whole_planes_are_told() -> None:
    memory = np.zeros((4, 16, 2, 128), np.uint16)[..., :64]  # a gap behind every head
    layout = KVLayout.from_arrays(memory, 0)
    with pytest.raises(CodecError, match="no contiguous part"):
        RecordShape(1, 2, 64, parts="L").plane_addresses(layout.fragments)
    with pytest.raises(CodecError, match="the layout's records have 4096 bytes"):
        RecordShape(1, 2, 64).plane_addresses(layout.fragments)
