"""The plane kernels: byte by byte the host's twin in the simulator, lean machine code, and the same on a GPU."""

from __future__ import annotations

import ctypes
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvortex.codecs import RecordShape
from kvortex.codecs.on_device import cells, constants
from kvortex.digests.keys import kernel_numbers
from kvortex.errors import CodecError
from kvortex.kernels import coded_read, lane, lossy_decode, move, plane, plane_decode, plane_tile, written
from tests.kernels.beside import Simulated
from tests.kernels.compiled import compiled, sass
from tests.kernels.on_gpu import Gpu, found_digests, host_digests
from tests.kernels.plane_cases import CASES, GUARD, PlaneCase
from tests.kernels.test_build import on_hopper

KERNELS = ("plane_encode", "plane_decode", "plane_decode_digest")
READERS = ("read_records",)
LEAN = [*itertools.product((*KERNELS, *READERS), [(9, 0), (10, 0)])]


def test_in_the_simulator_they_write_what_the_host_writes(simulated: Simulated) -> None:
    assert simulated("simulate_plane").count("simulated plane: ") == len(CASES) + 3


@pytest.mark.parametrize(("name", "capability"), LEAN)
def test_the_machine_code_is_lean(name: str, capability: tuple[int, int], tmp_path: Path) -> None:
    """Nothing in local memory, and four CTAs of 256 threads in the registers of a multiprocessor, or eight of 128 that code, or
    two of 256 that only read; on Blackwell three and six.

    Not so before Hopper, where a vote that the compiler does not know to be whole becomes a call, with registers of its own.
    """
    text = sass(compiled(name, capability).code, tmp_path)
    assert not re.findall(r"\b(LDL|STL)\b", text), "registers were spilled to local memory"
    assert max(map(int, re.findall(r"\bR(\d+)\b", text))) < {"read_records": 128}.get(name, 64 if capability < (10, 0) else 80)
    assert not re.findall(r"\b(DADD|DMUL|DFMA|I2F\.F64\S*)\b", text), "an index went through floating point of 64 bits"


def test_a_tile_is_copied_while_another_is_decoded() -> None:
    """All of its fixed part and the first of its tail in one batch; and who waits lets the last batch be."""
    text = on_hopper("plane_decode")
    found = re.findall(r"\b(LDGSTS\.E\.BYPASS\.128|LDGSTS\.E|LDGDEPBAR|DEPBAR\.LE SB0, 0x\w+|STG\.E)\b", text)
    names = {"LDGSTS.E.BYPASS.128": "C", "LDGSTS.E": "c", "LDGDEPBAR": "B", "DEPBAR.LE SB0, 0x1": "W", "STG.E": "S"}
    kinds = "".join(names.get(each, "?") for each in found)
    assert re.search(r"CCCc+B+CCCc+BWS*S{16}", kinds), kinds  # the first tile's; in the loop, the next one's, and rows
    assert "?" not in kinds and kinds.count("W") == 1


@pytest.mark.parametrize(
    ("name", "left"), [("plane_encode", [1, 1]), ("plane_decode_digest", [1, 3]), ("lossy_decode_digest", [0, 1, 3])]
)
def test_who_waits_for_copies_lets_others_be(name: str, left: list[int], tmp_path: Path) -> None:
    """Of a ring of three or five slots all batches but the one that is digested next, and of tiles the last one. A simulator's
    copies are there at once, so that nothing else on a CPU tells."""
    waits = re.findall(r"\bDEPBAR\.LE SB0, 0x(\w+)", sass(compiled(name, (9, 0)).code, tmp_path))
    assert sorted(int(each, 16) for each in waits) == left


def test_rings_lie_in_what_is_free() -> None:
    """Of a warp: in an encoder before the tails that it keeps, in a decoder where no tile lies yet, and 8 warps in 48 KiB."""
    assert written.WRITTEN_SHARED <= plane_tile.SHARED_BYTES
    assert coded_read.SLICE_SHARED <= plane_decode._WARP and 8 * (coded_read.SLICE_SHARED + lossy_decode._SLOTS) <= 48 << 10


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
    case = CASES[2]
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


class OnGpu(Gpu):
    """Pages, staging and what kernels read of a case, in VRAM."""

    def __init__(self, case: PlaneCase) -> None:
        super().__init__()
        self.case, self.n = case, len(case.blocks)
        self.memory = self.upload(case.memory)
        self.staging = self.upload(np.full(self.n * case.pitch + 2 * GUARD, 0xA5, np.uint8))
        self.form = self.upload(
            cells(case.codec, case.fragments(self.memory.address), self.upload(constants(case.codec)).address)
        )
        self.counter = self.upload(np.zeros(1, np.uint32))
        self.counts = self.upload(np.zeros(self.n * (1 + case.tiles), np.uint32))
        self.ids, self.numbers = self.upload(case.blocks), self.upload(kernel_numbers(case.pitch))
        self.sums, self.status = self.upload(np.zeros((self.n, 2), np.uint64)), self.upload(np.zeros(self.n, np.uint32))
        self.whole, self.sizes = case.coded()
        self.whole[np.arange(case.pitch) >= np.where(self.sizes < 0, 64, self.sizes)[:, None]] = 0

    def run(self, name: str, grid: int = 3, threads: int = 64, run: int | None = None) -> None:
        """With sums and status that are zeros before."""
        u64, i32, case = ctypes.c_uint64, ctypes.c_int32, self.case
        start, sums, status = self.staging.address + GUARD, self.sums.address, self.status.address
        self.sums.write(np.zeros(16 * self.n, np.uint8))
        self.status.write(np.zeros(4 * self.n, np.uint8))
        values: tuple[Any, ...] = start, case.pitch, self.form.address, status, self.ids.address, self.n, run or case.run
        kinds: tuple[Any, ...] = u64, u64, u64, u64, u64, i32, i32
        if name == "plane_encode":
            values = *values[:3], self.counts.address, *values[4:], self.numbers.address, sums, status
            kinds = *kinds, u64, u64, u64
        elif name == "plane_decode":
            values, kinds = (*values, 0, case.tiles, case.codec.fixed_bytes), (*kinds, i32, i32, i32)
        elif name == "plane_decode_digest":
            values, kinds = (*values, self.numbers.address, sums), (*kinds, u64, u64)
        else:
            values = start, case.pitch, self.n, self.numbers.address, sums, 0, case.pitch, 0, 1
            kinds = u64, u64, i32, u64, u64, i32, i32, i32, i32
        self.launch(name, grid, threads, (*values, self.counter.address), (*kinds, u64))
        assert not self.counter.read().any(), "the next launch would find shares taken"

    def check_encoded(self, *how: int) -> None:
        """Records, zeros behind them, what was declined, and digests are the host's."""
        case = self.case
        self.staging.write(np.full(self.n * case.pitch + 2 * GUARD, 0xA5, np.uint8))
        self.run("plane_encode", *how)
        seen = self.staging.read()
        assert (seen[:GUARD] == 0xA5).all() and (seen[-GUARD:] == 0xA5).all()
        assert (seen[GUARD:-GUARD].reshape(self.n, case.pitch) == self.whole).all()
        assert (self.status.read().view(np.uint32) == (self.sizes < 0)).all()
        assert not self.counts.read().any(), "the next launch would find shares done"
        self.check_digests()

    def check_digests(self) -> None:
        good = self.sizes > 0
        assert (found_digests(self.sums, self.case.pitch)[good] == host_digests(self.whole)[good]).all()

    def check_decoded(self, name: str, *how: int) -> None:
        """Pages come back, and those of what was declined are left alone."""
        case = self.case
        self.memory.write(np.full(case.memory.nbytes, 0x5A, np.uint8))
        self.run(name, *how)
        assert (self.status.read().view(np.uint32) == (self.sizes < 0)).all()
        back, kept = self.memory.read().view(np.uint16).reshape(case.memory.shape), case.blocks[self.sizes > 0]
        assert (back[:, kept] == case.memory[:, kept]).all()
        assert (back[:, case.blocks[self.sizes < 0]] == 0x5A5A).all()


def test_a_warp_reads_what_it_wrote_by_plain_loads() -> None:
    """What ``.nc`` loads find of memory that the kernel writes, nobody says."""
    assert all(".nc" not in each.ptx[0] for each in (lane.early4, lane.early16))
    assert move.CONSTANT[0] is lane.early16


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_on_a_gpu_they_write_what_the_host_writes(case: PlaneCase) -> None:
    gpu = OnGpu(case)
    gpu.check_encoded()
    gpu.run("read_records")
    gpu.check_digests()
    gpu.check_decoded("plane_decode")
    gpu.check_decoded("plane_decode_digest")
    gpu.check_digests()


@pytest.mark.gpu
@pytest.mark.parametrize("room", [None, 0.72])
def test_many_records_by_more_ctas_than_find_room(room: float | None) -> None:
    """Shares of 1 tile and of 16, whose warps wait for one another; among them records that fit no slot, or are kept as they
    are."""
    case = PlaneCase("many", RecordShape(8, 8, 128), 40, hostile=True, room=room)
    gpu = OnGpu(case)
    for _ in range(5):
        for run in (1, 3, 16):
            gpu.check_encoded(8 * gpu.device.multiprocessors, 128, run)
    gpu.check_decoded("plane_decode_digest", gpu.device.multiprocessors, 256, 16)
    gpu.check_digests()
