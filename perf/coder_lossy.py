"""Rows of ``perf plane`` for the codecs of bounded loss: pages in VRAM to coded records there and back, by codec and run.

``save`` is :func:`lossy_encode`, ``load`` :func:`lossy_decode_digest`: what transfers launch, digests included.
``wrong_bytes``: records and their digests against the host's twin, and what a load put elsewhere against what the twin decodes,
of the first ``CHECKED`` blocks. On the host: the twin itself, and records
that it cannot read.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.codecs import RecordShape, calibrate, make_codec
from kvortex.codecs.lossy import LossyCodec
from kvortex.codecs.on_device_lossy import cells, constants
from kvortex.devices.cuda import CudaDevice
from perf.clock import HostClock
from perf.coder_bench import Bench, pitch_of, wrong_digests
from perf.report import progress

CODECS = ("int8", "k6v4", "k4v4", "k4v3")
RUNS = (1, 4, 16)  # of 1,024 tiles in a block
CTAS_EACH = 6  # a multiprocessor: waves of the two that registers hold of an encoder, or of the three of a decoder
CHECKED = 16
NAMES = "lossy_encode", "lossy_decode_digest"
Bytes = npt.NDArray[np.uint8]


def rows(device: Any, records: Bytes, shape: RecordShape, rounds: int) -> list[dict[str, Any]]:
    """Of (n, raw_bytes) records of a shape."""
    made, tables = [], calibrate(records[:12], shape)
    bench = _Bench(device, shape, records) if isinstance(device, CudaDevice) else None
    for name in CODECS:
        progress(name)
        codec = make_codec(name, shape, tables)
        assert isinstance(codec, LossyCodec)
        made += _on_host(codec, records[:4]) if bench is None else bench.rows(codec, rounds)
    if bench is not None:
        bench.clock.close()
    return made


def _row(name: str, codec: LossyCodec, run: int, seconds: list[float], nbytes: int) -> dict[str, Any]:
    middle, ratio = statistics.median(seconds), codec.shape.raw_bytes / codec.slot_bytes
    return {"kernel": f"{codec.name}, {name}", "run": run, "rate": nbytes / middle / 1e9, "us": middle * 1e6, "ratio": ratio}


def _on_host(codec: LossyCodec, records: Bytes) -> list[dict[str, Any]]:
    coded, back, clock = np.zeros((len(records), codec.slot_bytes), np.uint8), np.zeros_like(records), HostClock()
    save = [clock.seconds(lambda: codec.encode_into(records, coded)) for _ in range(2)]
    load = [clock.seconds(lambda: codec.decode_into(coded, back)) for _ in range(2)]
    wrong = int((~codec.decode_into(coded, back)).sum())
    made = (_row(name, codec, 0, times, records.size) for name, times in (("save", save), ("load", load)))
    return [row | {"wrong_bytes": wrong} for row in made]


class _Bench(Bench):
    """Pages and kernels, for all codecs."""

    def __init__(self, device: CudaDevice, shape: RecordShape, records: Bytes) -> None:
        super().__init__(device, shape, records, shape.raw_bytes, NAMES, CTAS_EACH)
        n, rows = len(records), {"save": self.source, "load": self.target}
        self.blocks = {name: self.upload(np.stack((ids, np.full(n, -1, np.int32)), 1)) for name, ids in rows.items()}
        self.counts, self.status = self.upload(np.zeros(n, np.uint32)), self.upload(np.zeros(n, np.uint32))

    def rows(self, codec: LossyCodec, rounds: int) -> list[dict[str, Any]]:
        """Of a codec, by run."""
        pitch, n, made = pitch_of(codec.slot_bytes), len(self.records), []
        fixed = self.upload(constants(codec))
        form = self.upload(cells(codec, self.fragments, fixed.address))
        for run in RUNS:
            self.status.write(np.zeros(4 * len(self.records), np.uint8))
            save = self._call("lossy_encode", pitch, form, self.counts, self.blocks["save"], n, run, self.status)
            load = self._call("lossy_decode_digest", pitch, form, self.status, self.blocks["load"], n, run)
            times = [[self.clock.seconds(each) for _ in range(rounds)] for each in (save, load)]
            wrong = sum(wrong_digests(self, each, pitch, min(CHECKED, n)) for each in (save, load))
            wrong += self._wrong(codec, pitch)
            named = zip(("save", "load"), times, strict=True)
            pair = (_row(name, codec, run, seconds, self.records.size) for name, seconds in named)
            made += [row | {"wrong_bytes": wrong} for row in pair]
        return made

    def _call(
        self, name: str, pitch: int, form: Any, extra: Any, ids: Any, n: int, run: int, *others: Any
    ) -> Callable[[], None]:
        """A launch with digests."""
        return lambda: self.launch(name, pitch, form, extra, ids, n, run, self.numbers, self.sums, *others)

    def _wrong(self, codec: LossyCodec, pitch: int) -> int:
        """Bytes that differ from the twin's, of records and of pages, and records that were not read; clears the pages."""
        few = self.records[:CHECKED]
        mine, back = np.zeros((len(few), codec.slot_bytes), np.uint8), np.zeros_like(few)
        codec.encode_into(few, mine)
        seen = self.staging.read(0, len(few) * pitch).reshape(len(few), pitch)[:, : codec.slot_bytes]
        wrong = int((seen != mine).sum()) + int((~codec.decode_into(mine, back)).sum())
        wrong += int(self.status.read().view(np.uint32).sum()) + int(self.counts.read().view(np.uint32).sum())
        width, pages = self.shape.plane_bytes, self.pages
        for at, page in enumerate(self.target[: len(few)]):
            for plane in range(self.shape.planes):
                place = (plane * pages + int(page)) * width
                wrong += int((self.memory.read(place, width) != back[at, plane * width : (plane + 1) * width]).sum())
                self.memory.write(np.zeros(width, np.uint8), place)
        return wrong
