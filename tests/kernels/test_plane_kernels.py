"""The plane kernels: byte by byte the host's twin in the simulator, lean machine code, and the same on a GPU."""

from __future__ import annotations

import ctypes
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvortex.codecs.on_device import cells, constants
from kvortex.digests.host import add_lengths
from kvortex.digests.keys import kernel_numbers
from kvortex.errors import CodecError
from kvortex.kernels import build, plane
from tests.kernels.beside import Simulated
from tests.kernels.compiled import compiled, sass
from tests.kernels.plane_cases import CASES, GUARD, PlaneCase
from tests.kernels.test_build import on_hopper
from tests.naive_digest import digest

KERNELS = ("plane_encode", "plane_decode", "plane_decode_digest")
READERS = ("read_records",)
LEAN = [*itertools.product((*KERNELS, *READERS), [(9, 0), (10, 0)])]


def test_in_the_simulator_they_write_what_the_host_writes(simulated: Simulated) -> None:
    assert simulated("simulate_plane").count("simulated plane: ") == len(CASES) + 3


@pytest.mark.parametrize(("name", "capability"), LEAN)
def test_the_machine_code_is_lean(name: str, capability: tuple[int, int], tmp_path: Path) -> None:
    """Nothing in local memory, and three CTAs of 256 threads in the registers of a multiprocessor, or five of 128 that code, or
    two of 256 that only read.

    Not so before Hopper, where a vote that the compiler does not know to be whole becomes a call, with registers of its own.
    """
    text = sass(compiled(name, capability).code, tmp_path)
    assert not re.findall(r"\b(LDL|STL)\b", text), "registers were spilled to local memory"
    assert max(map(int, re.findall(r"\bR(\d+)\b", text))) < {"plane_encode": 96, "read_records": 128}.get(name, 80)
    assert not re.findall(r"\b(DADD|DMUL|DFMA|I2F\.F64\S*)\b", text), "an index went through floating point of 64 bits"


def test_a_tile_is_copied_while_another_is_decoded() -> None:
    """All of its fixed part and the first of its tail in one batch; and who waits lets the last batch be."""
    text = on_hopper("plane_decode")
    found = re.findall(r"\b(LDGSTS\.E\.BYPASS\.128|LDGSTS\.E|LDGDEPBAR|DEPBAR\.LE SB0, 0x\w+|STG\.E)\b", text)
    names = {"LDGSTS.E.BYPASS.128": "C", "LDGSTS.E": "c", "LDGDEPBAR": "B", "DEPBAR.LE SB0, 0x1": "W", "STG.E": "S"}
    kinds = "".join(names.get(each, "?") for each in found)
    assert re.search(r"CCCc+B+CCCc+BWS*S{16}", kinds), kinds  # the first tile's; in the loop, the next one's, and rows
    assert "?" not in kinds and kinds.count("W") == 1


def test_rows_are_loaded_eight_at_a_time() -> None:
    """Each into a register of its own, of which nothing is used before the last one was asked for: of the first tile, of its
    other rows, and of the next tile."""
    eights, open_loads = 0, []  # registers that loads are under way to, of which nothing was used
    for line in on_hopper("plane_encode").splitlines():
        used = re.findall(r"\bR\d+\b", line)
        loaded = re.search(r"\bLDG\.E\.NA R\d+,", line)
        if set(used[1:] if loaded else used) & set(open_loads):
            open_loads = []
        if loaded:
            open_loads = [*open_loads, used[0]]
        eights += len(open_loads) == 8 and bool(loaded)
        open_loads = open_loads if len(open_loads) < 8 else []
    assert eights >= 3


def test_cells_and_their_refusals() -> None:
    case = CASES[1]
    made = cells(case.codec, case.fragments(4096), 1 << 20)
    assert made[plane.N_PLANES] == 1 and made[plane.GROUPS] == 2 and made[plane.ACROSS] == 2 and made[plane.TABLE_WORDS] == 4
    assert made[plane.HEADER] == 1 << 20 and made[plane.BASES] == (1 << 20) + 64 and made[plane.PLANES] == 4096
    assert constants(case.codec)[64:].tolist() == case.codec.tables.base.ravel().tolist()
    with pytest.raises(CodecError, match="multiples of 4"):
        cells(case.codec, case.fragments(4098), 0)


def test_the_codes_agree_with_the_host() -> None:
    from kvortex.codecs import base
    from kvortex.kernels import plane

    assert (plane.CODED, plane.VERBATIM, plane.DECLINED) == (base.CODED, base.VERBATIM, base.DECLINED)
    names = list(base.HEADER.names or ())
    offsets = [base.HEADER.fields[name][1] // 4 for name in names]  # type: ignore[index]
    where = dict(zip(names, offsets, strict=True))
    assert (where["stored"], where["used_bytes"]) == (plane.STORED_AT, plane.USED_AT)
    assert 4 * plane.HEADER_WORDS == base.HEADER_BYTES


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_on_a_gpu_they_write_what_the_host_writes(case: PlaneCase) -> None:
    from kvortex.devices import driver as cu
    from kvortex.devices.cuda import CudaDevice

    device, n = CudaDevice(0), len(case.blocks)
    held: list[Any] = []

    def upload(array: np.ndarray) -> Any:
        held.append(device.allocate(array.nbytes))
        held[-1].write(array.reshape(-1).view(np.uint8))
        return held[-1]

    memory, staging = upload(case.memory), upload(np.full(n * case.pitch + 2 * GUARD, 0xA5, np.uint8))
    form = upload(cells(case.codec, case.fragments(memory.address), upload(constants(case.codec)).address))
    counter = upload(np.zeros(1, np.uint32))
    counts, status, ids = upload(np.zeros(n * (1 + case.tiles), np.uint32)), upload(np.zeros(n, np.uint32)), upload(case.blocks)

    def launch(name: str, extra: Any, sums: Any) -> None:
        """``extra`` of all kernels but ``read_records``."""
        cubin = build.load(name, device.compute_capability)
        u64, i32 = ctypes.c_uint64, ctypes.c_int32
        values: tuple[Any, ...] = staging.address + GUARD, case.pitch, form.address, extra.address, ids.address, n, case.run
        with cu.current(device.context) as driver:
            module = cu.check(driver.cuModuleLoadData(cubin.code), "cuModuleLoadData")
            kernel = cu.check(driver.cuModuleGetFunction(module, cubin.entry.encode()), "cuModuleGetFunction")
            kinds: tuple[Any, ...] = u64, u64, u64, u64, u64, i32, i32
            start = staging.address + GUARD
            if name == "plane_encode":
                values, kinds = (*values, numbers.address, sums.address, declined.address), (*kinds, u64, u64, u64)
            elif name == "plane_decode":
                values, kinds = (*values, 0, case.tiles, case.codec.fixed_bytes), (*kinds, i32, i32, i32)
            elif name == "plane_decode_digest":
                values, kinds = (*values, numbers.address, sums.address), (*kinds, u64, u64)
            elif name == "read_records":
                values = (start, case.pitch, n, numbers.address, sums.address, 0, case.pitch, 0, 1)
                kinds = (u64, u64, i32, u64, u64, i32, i32, i32, i32)
            packed = (*values, counter.address), (*kinds, u64)
            cu.check(driver.cuLaunchKernel(kernel, 3, 1, 1, 64, 1, 1, 0, 0, packed, 0), "cuLaunchKernel")
            cu.check(driver.cuCtxSynchronize(), "cuCtxSynchronize")
        assert not counter.read().any(), "the next launch would find shares taken"

    numbers, declined = upload(kernel_numbers(case.pitch)), upload(np.zeros(n, np.uint32))
    sums, again = upload(np.zeros((n, 2), np.uint64)), upload(np.zeros((n, 2), np.uint64))
    launch("plane_encode", counts, sums)
    assert not counts.read().any(), "the next launch would find shares done"
    seen = staging.read()
    whole, sizes = case.coded()
    whole[np.arange(case.pitch) >= np.where(sizes < 0, 64, sizes)[:, None]] = 0
    assert (seen[:GUARD] == 0xA5).all() and (seen[-GUARD:] == 0xA5).all()
    assert (seen[GUARD:-GUARD].reshape(n, case.pitch) == whole).all()
    assert (declined.read().view(np.uint32) == (sizes < 0)).all()
    launch("read_records", status, again)
    for summed in (sums, again):
        found = add_lengths(summed.read().view(np.uint64).reshape(n, 2), np.full(n, case.pitch))
        for mine, row, size in zip(found, whole, sizes, strict=True):
            assert size < 0 or mine.tobytes() == digest(row.tobytes())
    for name in ("plane_decode", "plane_decode_digest"):
        memory.write(np.full(case.memory.nbytes, 0x5A, np.uint8))
        status.write(np.zeros(4 * n, np.uint8))
        third = upload(np.zeros((n, 2), np.uint64))
        launch(name, status, third)
        assert (status.read().view(np.uint32) == (sizes < 0)).all()
        back, kept = memory.read().view(np.uint16).reshape(case.memory.shape), case.blocks[sizes > 0]
        assert (back[:, kept] == case.memory[:, kept]).all()
    assert (third.read() == again.read()).all(), "digests are those of who only reads"
