"""Rows of ``perf plane`` on a GPU, with the host's twins for kernels: what is right counts as right, and what is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvortex.codecs import RecordShape, calibrate, make_codec
from perf import coder_bench, coder_cachegen, coder_lossy, plane
from tests.kernels.plane_cases import usual

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


def twin(codec: Any, spoil: bool) -> Any:
    """``Bench.launch`` by the codec; of what is loaded a byte is spoilt, or none."""

    def launch(
        self: Any, name: str, pitch: int, form: Any, extra: Any, ids: Any, blocks: int, run: int, *span: int
    ) -> None:
        whole = {"plane_decode": lambda: (0, codec.tiles, codec.fixed_bytes), "lossy_decode": lambda: (0, codec.tiles)}
        assert span == whole.get(name, tuple)(), "all tiles of each record"
        pages = ids.data.view(np.int32).reshape(blocks, -1)[:, 0]
        room = self.staging.data[: blocks * pitch].reshape(blocks, pitch)
        records = np.empty((blocks, self.shape.raw_bytes), np.uint8)
        if name.endswith("encode"):
            for at in range(self.shape.planes):
                self.of_plane(records, at)[:] = self.read_plane(at)[pages]
            codec.encode_into(records, room)
        elif name.endswith("decode"):
            assert codec.decode_into(room, records).all()
            records[0, 0] ^= spoil
            for at in range(self.shape.planes):
                data = self.read_plane(at)
                data[pages] = self.of_plane(records, at)
                self.write_plane(at, data)

    return launch


class Clock:
    def __init__(self, device: Any) -> None:
        pass

    def seconds(self, call: Any) -> float:
        call()
        return 1e-3

    def close(self) -> None:
        pass


@pytest.mark.parametrize("spoil", [False, True])
@pytest.mark.parametrize("name", ["plane", "int8", "cachegen"])
def test_wrong_bytes_of_a_gpu_are_counted(name: str, spoil: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    words = usual(np.random.default_rng(2), 6, SHAPE.planes, SHAPE.tokens, SHAPE.channels)
    records = words.reshape(6, -1).view(np.uint8)
    codec = make_codec(name, SHAPE, calibrate(records, SHAPE), **({"level": 1} if name == "cachegen" else {}))
    monkeypatch.setattr(coder_bench, "CudaClock", Clock)
    monkeypatch.setattr(coder_bench, "_loaded", lambda device, name: name)
    monkeypatch.setattr(coder_bench.Bench, "launch", twin(codec, spoil))
    monkeypatch.setattr(plane, "SHAPE", SHAPE)
    device: Any = Device()
    same: Any = codec
    if name == "plane":
        rows = plane._on_gpu(device, same, records, 2)
    elif name == "int8":
        rows = coder_lossy._Bench(device, SHAPE, records).rows(same, 2)
    else:
        rows = coder_cachegen._on_gpu(device, same, records, 2)
    assert rows and all((row["wrong_bytes"] > 0) == spoil and row["ratio"] > 1.2 for row in rows), rows
