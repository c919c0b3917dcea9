"""Rows of ``perf plane`` on a GPU, with the host's twins for kernels: what is right counts as right, and what is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvortex.codecs import RecordShape, calibrate, make_codec
from perf import coder_bench, coder_cachegen, coder_lossy, plane
from tests.kernels.plane_cases import usual
from tests.naive_digest import sums as naive_sums

SHAPE = RecordShape(2, 1, 64)


class Buffer:
    def __init__(self, nbytes: int) -> None:
        self.data, self.address = np.zeros(nbytes, np.uint8), 1 << 20

    def write(self, data: Any, at: int = 0) -> None:
        self.data[at : at + data.size] = data

    def read(self, at: int = 0, nbytes: int | None = None) -> Any:
        return self.data[at : None if nbytes is None else at + nbytes].copy()


class Device:
    name, multiprocessors, compute_capability = "cuda:0", 1, (9, 0)

    def allocate(self, nbytes: int) -> Buffer:
        return Buffer(nbytes)


def twin(codec: Any, spoil: bool, spoil_digests: bool = False) -> Any:
    """``Bench.launch`` by the codec; of what is loaded a byte is spoilt, or of digests a bit, or none."""

    def launch(
        self: Any, name: str, pitch: int, form: Any, extra: Any, ids: Any, blocks: int, run: int, *others: Any
    ) -> None:
        digesting = others[:2] == (self.numbers, self.sums)
        assert digesting == name.startswith(("plane", "lossy")) and len(others) == digesting * (3 - name.endswith("_digest"))
        pages = ids.data.view(np.int32).reshape(blocks, -1)[:, 0]
        room = self.staging.data[: blocks * pitch].reshape(blocks, pitch)
        records = np.empty((blocks, self.shape.raw_bytes), np.uint8)
        if name.endswith("encode"):
            for at in range(self.shape.planes):
                self.of_plane(records, at)[:] = self.read_plane(at)[pages]
            codec.encode_into(records, room)
        elif name.endswith(("decode", "digest")):
            assert codec.decode_into(room, records).all()
            records[0, 0] ^= spoil
            for at in range(self.shape.planes):
                data = self.read_plane(at)
                data[pages] = self.of_plane(records, at)
                self.write_plane(at, data)
        if digesting:
            sums = self.sums.data.view(np.uint64).reshape(-1, 2)
            for row, found in zip(room, sums, strict=True):
                found += np.array(naive_sums(row.tobytes()), np.uint64)
            sums[0, 0] += np.uint64(spoil_digests)

    return launch


class Clock:
    def __init__(self, device: Any) -> None:
        pass

    def seconds(self, call: Any) -> float:
        call()
        return 1e-3

    def close(self) -> None:
        pass


@pytest.mark.parametrize("spoil", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("name", ["plane", "int8", "cachegen"])
def test_wrong_bytes_of_a_gpu_are_counted(name: str, spoil: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "cachegen" and spoil[1]:
        return  # its kernels do not digest
    words = usual(np.random.default_rng(2), 6, SHAPE.planes, SHAPE.tokens, SHAPE.channels)
    records = words.reshape(6, -1).view(np.uint8)
    codec = make_codec(name, SHAPE, calibrate(records, SHAPE), **({"level": 1} if name == "cachegen" else {}))
    monkeypatch.setattr(coder_bench, "CudaClock", Clock)
    monkeypatch.setattr(coder_bench, "_loaded", lambda device, name: name)
    monkeypatch.setattr(coder_bench.Bench, "launch", twin(codec, *spoil))
    monkeypatch.setattr(plane, "SHAPE", SHAPE)
    device: Any = Device()
    same: Any = codec
    if name == "plane":
        rows = plane._on_gpu(device, same, records, 2)
    elif name == "int8":
        rows = coder_lossy._Bench(device, SHAPE, records).rows(same, 2)
    else:
        rows = coder_cachegen._on_gpu(device, same, records, 2)
    assert rows and all((row["wrong_bytes"] > 0) == any(spoil) and row["ratio"] > 1.2 for row in rows), rows
