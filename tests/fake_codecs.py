"""Kernels of codecs on a GPU made of RAM (:mod:`tests.fake_gpu`): loops over records around the CPU's twins."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvortex.codecs._lossy import decode_lossy, encode_lossy, scales
from kvortex.codecs._plane import _decode_tile, encode_plane
from kvortex.codecs.base import CODED, DECLINED, HEADER
from kvortex.kernels import lossy_form as lf
from kvortex.kernels import plane_form as pf
from tests.transfer.recorder import Call

if TYPE_CHECKING:
    from tests.fake_gpu import FakeGpu

ENTRIES = {b"plane_encode": 0xE2, b"plane_decode": 0xE3, b"read_records": 0xE4,
           b"lossy_encode": 0xE6, b"lossy_decode": 0xE7, b"plane_decode_digest": 0xE8,
           b"lossy_decode_digest": 0xE9}  # fmt: skip
_NAMES = {entry: name.decode() for name, entry in ENTRIES.items()}
Words = npt.NDArray[np.uint32]
_BUSY = 0x1234567  # in a counter of a record that is being coded


def code(gpu: FakeGpu, call: Call) -> Iterator[str]:
    """A kernel of a codec; it stops behind each record."""
    name, (staging, pitch, *rest) = _NAMES[call.arguments[0]], call.parameters
    assert staging % 16 == pitch % 16 == 0
    count = {"read_records": 7, "plane_decode": 8, "lossy_decode": 7}.get(name, 5)  # before the counter
    count += 2 * name.endswith("_digest") + 3 * name.endswith("_encode")
    gpu.check_counter(rest[count], call.stream)
    if name == "read_records":
        return _read(gpu, staging, pitch, *rest[:count])
    cells_at, extra, ids, n, run, *span = rest[:count]
    assert run > 0
    kernel = _plane if name.startswith("plane") else _lossy
    if name.endswith("_digest"):
        whole = _whole_plane(gpu, cells_at) if kernel is _plane else (0, _Form(gpu, cells_at).tiles)
        decoded = kernel(gpu, name.removesuffix("_digest"), staging, pitch, cells_at, extra, ids, n, whole)
        return itertools.chain(_read(gpu, staging, pitch, n, *span, 0, pitch, 0, 1), decoded)
    if name.endswith("_encode"):
        coded = kernel(gpu, name, staging, pitch, cells_at, extra, ids, n, ())
        return itertools.chain(coded, _seal(gpu, staging, pitch, n, *span))
    return kernel(gpu, name, staging, pitch, cells_at, extra, ids, n, tuple(span))


def _whole_plane(gpu: FakeGpu, cells_at: int) -> tuple[int, int, int]:
    """All tiles of a record, and where its tails begin."""
    planes, groups, across, table = gpu.array(cells_at + 8 * pf.N_PLANES, 4, ctypes.c_uint64).astype(np.int64).tolist()
    tiles = planes * groups * across
    return 0, tiles, 4 * (16 + table) + pf.FIXED_BYTES * tiles


def _seal(gpu: FakeGpu, staging: int, pitch: int, n: int, numbers_at: int, sums: int, status: int) -> Iterator[str]:
    """What encoders do behind coding: digests, zeros behind records, and which were declined."""
    for b in range(n):
        record = staging + b * pitch
        header, used = _header(gpu, record, pitch)
        if header["stored"] == DECLINED:
            used = HEADER.itemsize
            gpu.array(status + 4 * b, 1, ctypes.c_uint32)[:] = 1
        gpu.array(record + used, pitch - used, ctypes.c_uint8)[:] = 0
        if sums:
            gpu.digest(record, used, 0, numbers_at, sums + 16 * b)
        yield "sealed"


def _read(gpu: FakeGpu, staging: int, pitch: int, n: int, numbers_at: int, sums: int, *span: int) -> Iterator[str]:
    first, end, shift, headed = span
    assert first % 16 == end % 16 == shift % 16 == 0 <= first - shift <= end - shift <= pitch
    for b in range(n):
        record = staging + b * pitch
        last = min(end, _header(gpu, record, end)[1] if headed else end)
        if first < last:
            gpu.digest(record + first - shift, last - first, first, numbers_at, sums + 16 * b)
        yield "read"


def _header(gpu: FakeGpu, record: int, room: int) -> tuple[Any, int]:
    """A header, and the bytes that it says, but no more than there are."""
    header = gpu.array(record, HEADER.itemsize, ctypes.c_uint8).view(HEADER)[0]
    return header, min(int(header["used_bytes"]), room)


def _plane(
    gpu: FakeGpu, name: str, staging: int, pitch: int, cells_at: int, extra: int, ids: int, n: int, span: tuple[int, ...]
) -> Iterator[str]:
    cells = gpu.array(cells_at, pf.PLANES, ctypes.c_uint64).astype(np.int64)
    planes, groups, across = cells[[pf.N_PLANES, pf.GROUPS, pf.ACROSS]].tolist()
    base = gpu.array(int(cells[pf.BASES]), planes * across * pf.CHANNELS, ctypes.c_uint8).reshape(planes, -1)
    header = gpu.array(int(cells[pf.HEADER]), 16, ctypes.c_uint32)
    form, tiles = np.array([groups, across, cells[pf.TABLE_WORDS]]), planes * groups * across
    for b, block in enumerate(gpu.array(ids, n, ctypes.c_int32).tolist()):
        pages = _pages(gpu, cells_at + 8 * pf.PLANES, planes, block, groups * across * 1024)
        values = np.concatenate(pages)[None]
        record = gpu.array(staging + b * pitch, pitch // 4, ctypes.c_uint32)
        if name == "plane_encode":
            with _alone(gpu, extra + 4 * (tiles + 1) * b, tiles + 1):
                encode_plane(values, record[None], header, base, form, np.empty(1, np.int64))
                yield "half"
        elif not _decode_tiles(record, pages, header, base, form, span):
            gpu.array(extra + 4 * b, 1, ctypes.c_uint32)[:] = 1
        yield "coded"


def _decode_tiles(
    record: Words,
    pages: list[npt.NDArray[np.uint16]],
    header: Words,
    base: npt.NDArray[np.uint8],
    form: npt.NDArray[np.int64],
    span: tuple[int, ...],
) -> bool:
    """What the kernel does with one record, of which the parts that some tiles need lie side by side."""
    (groups, across, table), (first, end, tails_from) = form.tolist(), span
    tiles, head, own = groups * across * len(pages), 16 + table, 16 + table + pf.FIXED_WORDS * (end - first)
    varies = np.isin(np.arange(16), (pf.STORED_AT, pf.USED_AT))
    if not 0 <= first < end <= tiles or own > len(record) or (record[:16] != header)[~varies].any():
        return False
    entries = record[16 : 16 + tiles].astype(np.int64)
    count, escapes = entries & 0xFFFF, entries >> 16
    size = 12 * (count + 31 >> 5) + (escapes + 3 & ~3)
    size[(count > pf.VALUES) | (escapes > count) | (size > pf.MOST_TAIL)] = 1 << 20
    size[entries == pf.RAW_TILE] = pf.RAW_TAIL
    fixed_bytes = 4 * head + pf.FIXED_BYTES * tiles
    if record[pf.STORED_AT] != CODED or fixed_bytes + size.sum() != record[pf.USED_AT]:
        return False
    good, second, tile = True, np.zeros(pf.VALUES, np.int16), np.zeros(pf.TILE_BYTES, np.uint16)
    late = np.zeros((pf.ROWS, pf.CHANNELS), np.int16)
    for number in range(first, end):
        at, words = fixed_bytes + size[:number].sum() - tails_from, int(size[number]) // 4
        if at < 0 or size[number] > pf.RAW_TAIL or own + at // 4 + words > len(record):
            good = False
            continue
        fixed = record[head + pf.FIXED_WORDS * (number - first) :][: pf.FIXED_WORDS]
        tile.view(np.uint32)[: pf.FIXED_WORDS] = fixed
        tile.view(np.uint32)[pf.FIXED_WORDS :][:words] = record[own + at // 4 :][:words]
        plane, within = divmod(number, groups * across)
        begin, step = within // across * pf.ROWS * 64 * across + within % across * 64, 64 * across
        bases = base[plane, within % across * 64 :][:64]
        good &= bool(_decode_tile(tile, int(entries[number]), pages[plane], begin, step, bases, second, late))
    return good


def _lossy(
    gpu: FakeGpu, name: str, staging: int, pitch: int, cells_at: int, extra: int, ids: int, n: int, span: tuple[int, ...]
) -> Iterator[str]:
    form = _Form(gpu, cells_at)
    begin, end = (0, lf.HEADER_BYTES + form.body_bytes) if name == "lossy_encode" else form.range_of(*span[:2])
    assert end - begin <= pitch
    for b, row in enumerate(gpu.array(ids, 2 * n, ctypes.c_int32).reshape(-1, 2).tolist()):
        record = gpu.array(staging + b * pitch, (end - begin) // 4, ctypes.c_uint32)
        if name == "lossy_encode":
            yield from form.encode(*row, record, extra + 4 * b)
        else:
            yield from form.decode(*row, record, extra + 4 * b, begin, span)
        yield "coded"


@contextlib.contextmanager
def _alone(gpu: FakeGpu, address: int, count: int) -> Iterator[None]:
    """What a launch keeps in these cells while it codes a record: zeros before and behind it, and nobody else's."""
    cells = gpu.array(address, count, ctypes.c_uint32)
    free, cells[:] = not cells.any(), _BUSY
    yield
    if not free or (cells != _BUSY).any():
        gpu.wild.append("two launches count in one place")
    cells[:] = 0


class _Form:
    """What cells say of a codec with loss, for its twin."""

    def __init__(self, gpu: FakeGpu, cells_at: int) -> None:
        cells = gpu.array(cells_at, lf.PLANES, ctypes.c_uint64).astype(np.int64)
        planes, groups, across, each = cells[[lf.N_PLANES, lf.GROUPS, lf.ACROSS, lf.EACH]].tolist()
        mean = gpu.array(int(cells[lf.MEANS]), planes * 64 * across, ctypes.c_uint16).astype(np.uint32) << np.uint32(16)
        self._gpu, self._planes_at, self._shape = gpu, cells_at + 8 * lf.PLANES, (1, planes, 16 * groups, 64 * across)
        self._headers = gpu.array(int(cells[lf.HEADERS]), 2 * lf.HEADER_WORDS, ctypes.c_uint32).reshape(2, -1)
        self._raw_bytes, self.body_bytes = 2 * int(np.prod(self._shape)), int(cells[lf.BODY_BYTES])
        self.tiles = self._raw_bytes // 2048
        is_key, turn = np.arange(planes) // each % 2 == 0, cells[[lf.FACTOR, lf.BACK]].astype(np.uint32).view(np.float32)
        bits = np.array([32 * cells[lf.LANES], cells[lf.K_BITS], cells[lf.V_BITS]])
        self._is_key, self._bytes = is_key, cells[[lf.VALUE_BYTES, lf.KEY_BYTES]]
        self._coding = is_key, mean.view(np.float32).reshape(planes, -1), bits, turn, scales()

    def range_of(self, first: int, end: int) -> tuple[int, int]:
        """Bytes of a record that a launch over these tiles finds."""
        before = lf.HEADER_BYTES + np.append(0, np.cumsum(self._bytes[self._is_key.astype(int)]))
        each = self._shape[2] * self._shape[3] // 1024
        assert first % each == end % each == 0 <= first < end
        return int(before[first // each]) if first else 0, int(before[end // each])

    def _header(self, part: int) -> tuple[Words, int, int]:
        """What a record has to begin with; and which bytes of the original a part keeps."""
        header, begin = self._headers[int(part >= 0)].copy(), max(part, 0) * self.body_bytes
        end = min(begin + self.body_bytes, self._raw_bytes)
        if part >= 0:
            header[lf.PART_AT], header[lf.USED_AT] = part, lf.HEADER_BYTES + end - begin
        return header, begin, end

    def _pages(self, block: int) -> list[npt.NDArray[np.uint16]]:
        _, planes, tokens, channels = self._shape
        return _pages(self._gpu, self._planes_at, planes, block, tokens * channels)

    def encode(self, block: int, part: int, record: Words, counter_at: int) -> Iterator[str]:
        header, begin, end = self._header(part)
        values, own = np.concatenate(self._pages(block)), record[lf.HEADER_WORDS :]
        if part >= 0:
            own[:] = 0
            own[: (end - begin) // 4] = values.view(np.uint32)[begin // 4 : end // 4]
        else:
            good = np.ones(1, np.bool_)
            with _alone(self._gpu, counter_at, 1):
                encode_lossy(values.reshape(self._shape), own[None], *self._coding, good)
                yield "half"
            if not good[0]:
                header[lf.STORED_AT], header[lf.USED_AT] = lf.DECLINED, 2 * lf.HEADER_BYTES + self._raw_bytes
        record[: lf.HEADER_WORDS] = header

    def decode(
        self, block: int, part: int, record: Words, status_at: int, missing: int, span: tuple[int, ...]
    ) -> Iterator[str]:
        header, begin, end = self._header(part)
        own, values = record[lf.HEADER_WORDS :], np.empty(self._shape, np.uint16)
        if part >= 0 and span[:2] != (0, self.tiles) or not missing and (record[: lf.HEADER_WORDS] != header).any():
            self._gpu.array(status_at, 1, ctypes.c_uint32)[:] = 1
        elif part >= 0:
            _put(self._pages(block), begin, own.view(np.uint8)[: end - begin])
        else:
            whole = np.zeros((lf.HEADER_BYTES + self.body_bytes) // 4, np.uint32)
            whole[missing // 4 :][: len(record)] = record
            decode_lossy(whole[None, lf.HEADER_WORDS :], values, *self._coding, np.ones(1, np.bool_))
            mine = slice(2048 * span[0], 2048 * span[1])
            _put(self._pages(block), mine.start, values.reshape(-1).view(np.uint8)[mine])
        yield "decoded"


def _pages(gpu: FakeGpu, table: int, planes: int, block: int, size: int) -> list[npt.NDArray[np.uint16]]:
    """The planes of a page, themselves."""
    where = gpu.array(table, 2 * planes, ctypes.c_uint64).astype(np.int64).reshape(-1, 2).tolist()
    return [gpu.array(at + block * step, size, ctypes.c_uint16) for at, step in where]


def _put(pages: list[npt.NDArray[np.uint16]], begin: int, data: npt.NDArray[np.uint8]) -> None:
    """Bytes of a record from ``begin`` on into its page, and no others."""
    for number, page in enumerate(pages):
        first = number * page.nbytes
        low, high = max(first, begin), min(first + page.nbytes, begin + len(data))
        if low < high:
            page.view(np.uint8)[low - first : high - first] = data[low - begin : high - begin]
