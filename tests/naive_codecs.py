"""Codecs as their description says, value by value: slow, obvious, and independent of the compiled ones."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np


def plane_tile(tile: Any, base: Any) -> tuple[int, bytes, bytes]:
    """Entry, fixed part and tail of (16, 64) bf16 patterns under (64,) bases; see kernels/plane_form.py."""
    first, signs, second, escaped = b"", b"", [], []
    order = [*range(0, 64, 2), *range(1, 64, 2)]
    for row in tile.tolist():
        codes = {}
        for channel in order:
            exponent = row[channel] >> 7 & 255
            below = int(base[channel]) - exponent
            codes[channel] = {1: 0, 2: 1, 3: 2}.get(below, 3)
            if codes[channel] == 3:
                second.append({0: 0, 4: 1, 5: 2, 6: 3, 7: 4, 8: 5, 9: 6}.get(below, 7))
                if second[-1] == 7:
                    escaped.append(exponent)
        for odd in (0, 1):
            for bit in (0, 1):
                first += struct.pack("<I", sum((codes[2 * lane + odd] >> bit & 1) << lane for lane in range(32)))
        signs += bytes((value >> 15) << 7 | value & 127 for value in row)
    tail = b""
    for begin in range(0, len(second), 32):
        group = second[begin : begin + 32]
        for bit in (0, 1, 2):
            tail += struct.pack("<I", sum((code >> bit & 1) << lane for lane, code in enumerate(group)))
    tail += bytes(escaped) + bytes(-len(escaped) % 4)
    if len(tail) >= 768:
        raw = tile.astype("<u2").tobytes()
        return 0xFFFFFFFF, raw[:1280], raw[1280:]
    return len(second) | len(escaped) << 16, first + signs, tail


def plane_record(record: Any, codec: Any) -> bytes:
    """What codec ``plane`` makes of one record, where there is room for everything."""
    shape = codec.shape
    planes = record.view(np.uint16).reshape(shape.planes, shape.tokens, shape.channels)
    tiles = [
        plane_tile(planes[p, t : t + 16, c : c + 64], codec.tables.base[p, c : c + 64])
        for p in range(shape.planes)
        for t in range(0, shape.tokens, 16)
        for c in range(0, shape.channels, 64)
    ]
    table = b"".join(struct.pack("<I", entry) for entry, _, _ in tiles)
    body = table + bytes(-len(table) % 16) + b"".join(fixed for _, fixed, _ in tiles) + b"".join(tail for _, _, tail in tiles)
    stored = 0
    if len(body) >= record.size:
        stored, body = 1, record.tobytes()
    head = b"KVXC" + struct.pack("<HHIIQQ", 1, 1, stored, 0, record.size, 64 + len(body)) + codec.digest
    return head + body
