"""The kernels of ``cachegen``: byte by byte the host's twin in the simulator, lean machine code, and the same on a GPU."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvortex.codecs import RecordShape, _ranges, cachegen, make_codec
from kvortex.codecs.base import HEADER_BYTES
from kvortex.codecs.on_device_cachegen import cells, constants
from kvortex.errors import CodecError
from kvortex.kernels import cachegen_encode, plane
from kvortex.kernels import cachegen_form as kernels
from kvortex.kernels.cachegen import BODY
from tests.kernels.beside import Simulated
from tests.kernels.cachegen_cases import CASES, GUARD, CacheGenCase, damages, escaping
from tests.kernels.compiled import compiled, sass
from tests.kernels.on_gpu import Gpu

NAMES = ("cachegen_count", "cachegen_encode", "cachegen_decode")


def test_in_the_simulator_they_write_what_the_host_writes(simulated: Simulated) -> None:
    assert simulated("simulate_cachegen").count("simulated cachegen: ") == len(CASES) + 1


@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
@pytest.mark.parametrize("name", NAMES)
def test_the_machine_code_is_lean(name: str, capability: tuple[int, int], tmp_path: Path) -> None:
    """Nothing in local memory, and four CTAs of 256 threads in the registers of a multiprocessor."""
    text = sass(compiled(name, capability).code, tmp_path)
    assert not re.findall(r"\b(LDL|STL)\b", text), "registers were spilled to local memory"
    assert max(map(int, re.findall(r"\bR(\d+)\b", text))) < 64
    assert not re.findall(r"\b(DADD|DMUL|DFMA|I2F\.F64\S*)\b", text), "an index went through floating point of 64 bits"
    if name == "cachegen_decode":
        assert "FMUL" in text and "FADD" in text and "FFMA" not in text, "a product and a sum were contracted"
        assert not re.findall(r"\bF(?:MUL|ADD)\.FTZ", text), "denormals are numbers"
    else:
        assert re.search(r"\bFADD R", text), "denormals are numbers"


def test_cells_and_their_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[1]
    codec, planes = case.cachegen, case.shape.planes
    fixed = constants(codec)
    made = cells(codec, case.fragments(4096), 1 << 20)
    assert made[plane.N_PLANES] == planes and made[plane.PLANES] == 4096
    assert made.size == plane.PLANES + 2 * planes + kernels.CELLS
    more = made[plane.PLANES + 2 * planes :].astype(np.int64)
    _, mean, step, kinds, most, starts = codec.compiled

    def at(cell: int, count: int, dtype: Any) -> np.ndarray:
        return fixed[cell - (1 << 20) :][: count * np.dtype(dtype).itemsize].view(dtype)

    assert (at(int(made[plane.HEADER]), 64, np.uint8) == codec.header.view(np.uint8)).all()
    assert (at(int(made[plane.BASES]), mean.size, np.uint8) == codec.tables.base.ravel()).all()
    assert (at(more[kernels.MEANS], mean.size, np.float32) == mean.ravel()).all()
    assert (at(more[kernels.STEPS], planes, np.float32) == step).all()
    tables = at(more[kernels.TABLES], int(more[kernels.N_TABLES]) * kernels.ROW, np.uint16).reshape(-1, kernels.ROW)
    own = at(more[kernels.KINDS], mean.size, np.uint8)
    assert (tables[own, : kernels.MOST_AT] == starts[kinds.ravel()]).all()
    assert (tables[own, kernels.MOST_AT] == most[kinds.ravel()]).all()
    largest = 2 * int(tables[:, kernels.MOST_AT].max()) + 1
    assert more[kernels.TOP] <= largest < 2 * more[kernels.TOP], "a search of halves reaches every symbol"
    assert (more[kernels.STREAM_PLANES], more[kernels.STREAMS]) == (2, 2) and more[kernels.MOST] == 2 * 16 * 64
    with pytest.raises(CodecError, match="multiples of 4"):
        cells(codec, case.fragments(4098), 0)
    monkeypatch.setattr("kvortex.codecs.on_device_cachegen.MOST_BYTES", codec.worst_bytes)
    with pytest.raises(CodecError, match="larger than kernels can count"):
        cells(codec, case.fragments(4096), 0)


def test_the_numbers_agree_with_the_host() -> None:
    assert (kernels.LANES, kernels.PROBABILITY_BITS, kernels.LEAST_STATE) == (
        _ranges.LANES, _ranges.PROBABILITY_BITS, _ranges.LEAST_STATE
    )  # fmt: skip
    assert np.array([cachegen_encode._FARTHEST], np.uint32).view(np.float32)[0] == _ranges.MOST_STEPS
    most, starts = cachegen._shares(np.ones_like(CASES[0].codec.tables.counts))
    assert starts.shape == (kernels.MOST_TABLES, kernels.MOST_AT) and kernels.ROW == kernels.MOST_AT + 1
    assert kernels.HALVES * 2 <= 48 << 10, "shared memory that no kernel has to ask for"
    # A search of halves may look at any of them; behind the last symbol nothing begins at or before a place.
    assert all((line[2 * far + 2 :] == 1 << _ranges.PROBABILITY_BITS).all() for far, line in zip(most, starts, strict=True))
    assert BODY == HEADER_BYTES


class OnGpu(Gpu):
    """Launches of these kernels."""

    def form(self, case: CacheGenCase, memory: Any, pages: int | None = None) -> Any:
        fixed = self.upload(constants(case.cachegen))
        return self.upload(cells(case.cachegen, case.fragments(memory.address, pages), fixed.address))

    def run(self, name: str, staging: int, pitch: int, form: Any, extra: Any, ids: Any, n: int) -> None:
        u64, i32 = ctypes.c_uint64, ctypes.c_int32
        values = (staging, pitch, form.address, extra.address, ids.address, n, 1)
        self.launch(name, 33, 256, values, (u64, u64, u64, u64, u64, i32, i32))


def coded_and_back(case: CacheGenCase) -> None:
    """Pages into records and back: all bytes are the host's."""
    gpu, n, codec = OnGpu(), len(case.blocks), case.cachegen
    memory, staging = gpu.upload(case.memory), gpu.upload(np.full(n * case.pitch + 2 * GUARD, 0xA5, np.uint8))
    form, ids = gpu.form(case, memory), gpu.upload(case.blocks)
    counts, status = gpu.upload(np.zeros((n, case.streams, 2), np.uint32)), gpu.upload(np.zeros(n, np.uint32))
    start = staging.address + GUARD
    gpu.run("cachegen_count", start, case.pitch, form, counts, ids, n)
    gpu.run("cachegen_encode", start, case.pitch, form, counts, ids, n)
    seen = staging.read()
    coded, sizes = case.coded()
    assert (seen[:GUARD] == 0xA5).all() and (seen[-GUARD:] == 0xA5).all()
    rows = seen[GUARD:-GUARD].reshape(n, case.pitch)
    assert not case.wrong(rows)
    for row, size in zip(rows, sizes, strict=True):
        assert (row[64 if size < 0 else size :] == 0xA5).all()
    memory.write(np.full(case.memory.nbytes, 0x5A, np.uint8))
    gpu.run("cachegen_decode", start, case.pitch, form, status, ids, n)
    assert (status.read().view(np.uint32) == (sizes < 0)).all()
    back, whole = np.empty((n, codec.shape.raw_bytes), np.uint8), sizes > 0
    assert (codec.decode_into(coded, back) == whole).all()
    found = memory.read().view(np.uint16).reshape(case.memory.shape)
    assert (found[:, case.blocks[whole]] == case.pages_of(back)[:, whole]).all()
    assert (found[:, case.blocks[~whole]] == 0x5A5A).all()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_on_a_gpu_they_write_what_the_host_writes(case: CacheGenCase) -> None:
    coded_and_back(case)


@pytest.mark.gpu
@pytest.mark.parametrize("level", [0, 1, 2])
def test_on_a_gpu_at_size(level: int) -> None:
    """An eight-billion model's shape with streams as they are, the hostile pages among them, and one of every bf16 pattern
    that has steps, denormals included."""
    case = CacheGenCase("at size", RecordShape(32, 8, 128), 8, hostile=True, level=level, per=2, sample=9)
    patterns = np.arange(1 << 16, dtype=np.uint16)
    near = patterns[np.abs((patterns.astype(np.uint32) << np.uint32(16)).view(np.float32)) < 1000]
    page = case.memory[:, 0].ravel()
    page[np.random.default_rng(level).permutation(page.size)[: near.size]] = near  # more of them, and no record would hold them
    case.memory[:, 0] = page.reshape(case.memory[:, 0].shape)
    assert make_codec("cachegen", case.shape, case.codec.tables)._form[0] == case.per
    sizes = case.coded()[1]
    assert sizes[case.blocks == 0] > 0 and (sizes < 0).any()
    coded_and_back(case)


@pytest.mark.gpu
def test_on_a_gpu_damage_is_told_as_the_host_tells_it() -> None:
    """Known lies, and 4,000 records with random bytes or words wrong; where the host sees nothing, pages are the host's."""
    gpu, case, rng = OnGpu(), CASES[0], np.random.default_rng(11)
    codec, (record, size) = case.cachegen, escaping(case)
    rows = np.concatenate((np.stack(list(damages(case).values())), np.repeat(record[None], 4000, 0)))
    n_escapes = int(record[HEADER_BYTES : HEADER_BYTES + 8 * case.streams].view(np.uint32)[-1])
    for at, row in enumerate(rows[-4000:]):
        if at % 4 == 0:
            row[rng.integers(0, size)] ^= 1 << rng.integers(0, 8)
        elif at % 4 == 1:
            row[HEADER_BYTES + 8 * case.streams :][: 4 * rng.integers(1, 100)] = rng.integers(0, 256)
        elif at % 4 == 2:
            begin = 4 * int(rng.integers(16, size // 4))
            row[begin : begin + 64] = rng.integers(0, 256, row[begin : begin + 64].size)
        else:  # escapes of the last stream, which may be anything
            begin = (size - 2 * n_escapes) & ~3
            row[begin + rng.integers(4, size - begin)] = rng.integers(0, 256)
    n, planes = len(rows), case.memory.shape[0]
    shape = planes, n + 2, *case.memory.shape[2:]
    memory, staging = gpu.upload(np.full(shape, 0x5A5A, np.uint16)), gpu.upload(rows)
    ids, status = gpu.upload(np.arange(1, n + 1, dtype=np.int32)), gpu.upload(np.zeros(n, np.uint32))
    gpu.run("cachegen_decode", staging.address, case.pitch, gpu.form(case, memory, n + 2), status, ids, n)
    back = np.empty((n, codec.shape.raw_bytes), np.uint8)
    told = codec.decode_into(rows, back)
    assert 100 < told.sum() < n - 100
    assert (status.read().view(np.uint32) == ~told).all()
    found = memory.read().view(np.uint16).reshape(shape)
    assert (found[:, [0, -1]] == 0x5A5A).all()
    assert (found[:, 1:-1][:, told] == case.pages_of(back)[:, told]).all()
