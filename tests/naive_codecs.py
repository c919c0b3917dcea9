"""Codecs as their description says, value by value: slow, obvious, and independent of the compiled ones."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np


def plane_tile(tile: Any, base: Any) -> tuple[int, bytes, bytes]:
    """Entry, fixed part and tail of (16, 64) bf16 patterns under (64,) bases; see kernels/plane_form.py."""
    first, signs, second = b"", b"", []
    late = {0: 0, 4: 1, 5: 2, 6: 3, 7: 4, 8: 5, 9: 6}
    for half in (tile[:8].tolist(), tile[8:].tolist()):
        for pair in range(0, 64, 2):
            word = 0
            for odd in (0, 1):
                for row, line in enumerate(half):
                    exponent = line[pair + odd] >> 7 & 255
                    below = int(base[pair + odd]) - exponent
                    code = {1: 0, 2: 1, 3: 2}.get(below, 3)
                    word |= code << 16 * odd + 2 * row
                    if code == 3:
                        second.append((late.get(below, 7), exponent))
            first += struct.pack("<I", word)
            signs += bytes((line[pair + odd] >> 15) << 7 | line[pair + odd] & 127 for line in half for odd in (0, 1))
    tail, escaped = b"", []
    count = len(second)
    second += [(0, 0)] * (-len(second) % 32)
    for begin in range(0, len(second), 32):
        words, shorts = [], []
        for sixteen in (second[begin : begin + 16], second[begin + 16 : begin + 32]):
            fours = [[sixteen[4 * four + k] for k in (0, 2, 1, 3)] for four in range(4)]
            escaped += [exponent for four in fours for code, exponent in four if code == 7]
            a, b, c, d = (sum(code << 4 * k for k, (code, _) in enumerate(four)) for four in fours)
            words.append(a | (d & 0x1111) << 3 | (b | (d & 0x2222) << 2) << 16)
            shorts.append(c | (d & 0x4444) << 1)
        tail += struct.pack("<IIHH", *words, *shorts)
    tail += bytes(escaped) + bytes(-len(escaped) % 4)
    if len(tail) >= 768:
        raw = tile.astype("<u2").tobytes()
        return 0xFFFFFFFF, raw[:1280], raw[1280:]
    return count | len(escaped) << 16, first + signs, tail


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
    head = b"KVXC" + struct.pack("<HHIIQQ", 1, 2, stored, 0, record.size, 64 + len(body)) + codec.digest
    return head + body


def cachegen_record(record: Any, codec: Any) -> bytes:
    """What codec ``cachegen`` makes of one record that it codes."""
    shape, (form, mean, step, kinds, most, starts) = codec.shape, codec.compiled
    numbers = (record.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    planes = numbers.reshape(shape.planes, shape.tokens, shape.channels)
    table, bodies = b"", b""
    for first in range(0, shape.planes, int(form[0])):
        symbols = []  # (steps, kind) of each value
        for p in range(first, min(first + int(form[0]), shape.planes)):
            for row in np.rint((planes[p] - mean[p]) / step[p]).astype(int).tolist():
                symbols += list(zip(row, kinds[p].tolist(), strict=True))
        states, words, escapes = [1 << 16] * 32, [], []
        for at in reversed(range(len(symbols))):
            steps, kind = symbols[at]
            place = steps + int(most[kind])
            if abs(steps) > most[kind]:
                place = 2 * int(most[kind]) + 1
                escapes.insert(0, steps)
            start, end = int(starts[kind, place]), int(starts[kind, place + 1])
            if states[at % 32] >= (end - start) << 18:
                words.insert(0, states[at % 32] & 0xFFFF)
                states[at % 32] >>= 16
            turns, rest = divmod(states[at % 32], end - start)
            states[at % 32] = turns * (1 << 14) + start + rest
        table += struct.pack("<II", len(words), len(escapes))
        bodies += struct.pack("<32I", *states) + struct.pack(f"<{len(words)}H", *words) + bytes(2 * (len(words) % 2))
        bodies += struct.pack(f"<{len(escapes)}h", *escapes) + bytes(2 * (len(escapes) % 2))
    size = 64 + len(table) + len(bodies)
    return b"KVXC" + struct.pack("<HHIIQQ", 6, 1, 0, 0, record.size, size) + codec.digest + table + bodies


class Shipped:
    """LMCache's CacheGen as 0.5.6 ships it, restated from its description: no anchors, no levels, tables in every chunk.

    ``values`` is float32 (layers, 2, tokens, channels), at most 256 tokens. Pickle, in which it is shipped, is left out.
    """

    def __init__(self, values: Any, deep: tuple[int, int] = (10, 2)) -> None:
        layers = len(values)
        planes = [values[:, part] for part in (0, 1)]
        bins = np.concatenate([np.where(np.arange(layers) < first, 32, 16) for first in deep])
        self.half = (bins // 2 - 1).astype(np.float32)[:, None, None]
        self.values = np.concatenate(planes)  # K layers first
        largest = np.abs(self.values).max(2, keepdims=True)
        self.most = (largest.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)  # kept in bf16, as the input was
        self.codes = np.rint(self.values * (self.half / self.most) + self.half).astype(np.int64)

    def decoded(self) -> Any:
        """What comes back, in the form that was handed in."""
        back = (self.codes - self.half) / self.half * self.most
        return np.stack(np.split(back.astype(np.float32), 2), 1)

    def tables(self) -> Any:
        """(planes, channels, 33) of a chunk: the cumulated counts of each channel's codes, as 16 bits."""
        planes, tokens, channels = self.codes.shape
        below = np.stack([(self.codes < i).sum(1) for i in range(33)], 2)
        return (65535 - 32) * below // tokens + np.arange(33)

    def nbytes(self) -> dict[str, int]:
        """Of the parts of a chunk."""
        planes, tokens, channels = self.codes.shape
        streams = self.codes.swapaxes(1, 2).reshape(-1, tokens)
        bits = arithmetic_bits(streams, self.tables().reshape(-1, 33))
        payload = int(sum(-(-bits // 8)))
        return {"payload": payload, "tables": 66 * len(streams), "lengths": 4 * len(streams), "maxima": 2 * planes * tokens}


def arithmetic_bits(streams: Any, tables: Any) -> Any:
    """Bits that LMCache's arithmetic coder writes for each stream of codes; (n,) int64."""
    n, tokens = streams.shape
    low, high = np.zeros(n, np.int64), np.full(n, (1 << 32) - 1)
    pending, bits, rows = np.zeros(n, np.int64), np.zeros(n, np.int64), np.arange(n)
    for token in range(tokens):
        code = streams[:, token]
        begin, end = tables[rows, code], np.where(code + 1 == 32, 65536, tables[rows, np.minimum(code + 1, 32)])
        span = high - low + 1
        low, high = low + (span * begin >> 16), low + (span * end >> 16) - 1
        going = np.ones(n, bool)
        while going.any():
            lower, upper = going & (high < 1 << 31), going & (low >= 1 << 31)
            middle = going & ~lower & ~upper & (low >= 1 << 30) & (high < 3 << 30)
            bits += np.where(lower | upper, 1 + pending, 0)
            pending = np.where(lower | upper, 0, pending + middle)
            going = lower | upper | middle
            low = np.where(middle, low << 1 & 0x7FFFFFFF, np.where(going, low << 1 & 0xFFFFFFFF, low))
            high = np.where(middle, high << 1 & 0xFFFFFFFF | 0x80000001, np.where(going, (high << 1 | 1) & 0xFFFFFFFF, high))
    return bits + 2 + pending
