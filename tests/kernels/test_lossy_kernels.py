"""The kernels of bounded loss: byte by byte the host's twin in the simulator, lean machine code, and the same on a GPU."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest

from kvortex.codecs import RecordShape, calibrate, make_codec
from kvortex.codecs._lossy import scales
from kvortex.codecs.on_device_lossy import cells, constants
from kvortex.digests.keys import kernel_numbers
from kvortex.errors import CodecError
from kvortex.kernels import lossy_form as lossy
from kvortex.kernels.eights import LEAST_SCALE, ROOTS
from tests.kernels.beside import Simulated
from tests.kernels.compiled import compiled, sass
from tests.kernels.lossy_cases import FILL, GUARD, LARGE, NAMES, SMALL, LossyCase
from tests.kernels.on_gpu import Gpu, found_digests, host_digests
from tests.kernels.plane_cases import usual

KERNELS = ("lossy_encode", "lossy_decode", "lossy_decode_digest")


def test_in_the_simulator_they_write_what_the_host_writes(simulated: Simulated) -> None:
    assert simulated("simulate_lossy").count("simulated lossy: ") == len(SMALL) + 3


@pytest.mark.parametrize("name", KERNELS)
def test_the_machine_code_is_lean(name: str, tmp_path: Path) -> None:
    """Nothing in local memory, all of a page by lanes of 128 bits, no division of 64 bits, and no product and sum joined but
    where the host joins them: codes and numbers of K and V, where a rotation crosses lanes, and in a division."""
    text = sass(compiled(name, (9, 0)).code, tmp_path)
    assert not re.findall(r"\b(LDL|STL)\b", text), "registers were spilled to local memory"
    assert max(map(int, re.findall(r"\bR(\d+)\b", text))) < (128 if name == "lossy_encode" else 80)
    assert not re.findall(r"\b(DADD|DMUL|DFMA|I2F\.\S*64\S*)\b", text), "an index went through floating point of 64 bits"
    wide = re.findall(r"\b(LDG|STG)\.E\.\S*128", text)
    assert wide.count("LDG" if name == "lossy_encode" else "STG") >= 8
    joined = len(re.findall(r"\bFFMA\b", text.split("WARPSYNC")[0]))  # behind it lies what no whole warp comes to
    assert len(re.findall(r"\bFADD\b", text)) >= 200 and 3 * 32 <= joined < 3 * 32 + (32 if name == "lossy_encode" else 2)


def test_no_least_or_largest_number_hides_a_nan(tmp_path: Path) -> None:
    """Nothing else tells the encoder that V has one; of K a step's last code may take its place, and its scale tells."""
    text = sass(compiled("lossy_encode", (9, 0)).code, tmp_path)
    plain = len(re.findall(r"\bFMNMX R", text))
    assert plain == 32 and len(re.findall(r"\bFMNMX\.NAN\b", text)) >= 2 * 31 + 4 + 24


def steps_of(text: str) -> tuple[list[str], dict[str, int]]:
    """Instructions with their predicates, and where each label is among them."""
    steps, labels = list[str](), dict[str, int]()
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(steps)
        elif re.match(r"(@!?U?P\d+\s+)?[A-Z]", line.strip()):
            steps.append(line.strip())
    return steps, labels


def on_the_way(steps: list[str], labels: dict[str, int], at: int) -> list[str]:
    """All that may come behind a step, up to the first store on each way. Who came to it by a predicate branches by it too."""
    given = re.match(r"@!?U?P\d+", steps[at])
    seen, left, found = {at}, [at + 1], []
    while left:
        at = left.pop()
        if at in seen or at >= len(steps):
            continue
        seen.add(at)
        step = re.sub(r"^@!?U?P\d+\s+", "", steps[at])
        if step.startswith(("STG", "EXIT")):
            continue
        found.append(step)
        target = re.search(r"\.L_x_\d+", step) if step.startswith("BRA") else None
        if target:
            left.append(labels[target[0]])
        certain = steps[at] == step or (given and steps[at].startswith(given[0]))
        if target is None or not certain or ".DIV" in step:
            left.append(at + 1)
    return found


def ahead(text: str) -> set[str]:
    """Loads, by width and first register, whose words nothing touches on any way to the tile's stores, where on one of these
    lies the tile's longest work, 160 sums."""
    steps, labels = steps_of(text)
    found = set()
    for at, step in enumerate(steps):
        load = re.match(r"(?:@!?U?P\d+\s+)?LDG\.E(?:\.(64|128|U16))? R(\d+)", step)
        if load:
            own = {f"R{int(load[2]) + k}" for k in range({"64": 2, "128": 4}.get(load[1], 1))}
            behind = on_the_way(steps, labels, at)
            if sum(each.startswith("FADD") for each in behind) >= 150 and not any(
                own & set(re.findall(r"\bR\d+\b", each)) for each in behind
            ):
                found.add(f"{load[1] or 32} R{load[2]}")
    return found


# Of K of 8, 6 and 4 bits and of V of 8, 4 and 3 a decoder loads other words.
@pytest.mark.parametrize(
    ("name", "widths"), [("lossy_encode", {"128": 5}), ("lossy_decode", {"128": 2, "64": 4, "32": 4, "U16": 4})]
)
def test_loads_of_a_tile_are_in_flight_while_the_one_before_is_worked_on(
    name: str, widths: dict[str, int], tmp_path: Path
) -> None:
    found = [each.split()[0] for each in ahead(sass(compiled(name, (9, 0)).code, tmp_path))]
    assert all(found.count(width) >= count for width, count in widths.items()), found


def test_scales_are_those_of_the_host() -> None:
    assert [root | 127 << 23 for root in ROOTS] == scales()[128:132].view(np.uint32).tolist()
    assert scales()[0] == 2.0 ** (LEAST_SCALE - 127) and scales()[255:].view(np.uint32)[0] == lossy.LARGEST_SCALE
    assert (1 / scales()[1:] == scales()[:0:-1]).all(), "the inverse of a scale is that of 256 - code"


def test_the_codes_agree_with_the_host() -> None:
    from kvortex.codecs import base

    where = {name: base.HEADER.fields[name][1] // 4 for name in base.HEADER.names or ()}  # type: ignore[index]
    assert lossy.DECLINED == base.DECLINED and lossy.HEADER_BYTES == base.HEADER_BYTES == 4 * lossy.HEADER_WORDS
    assert (where["stored"], where["part"], where["used_bytes"]) == (lossy.STORED_AT, lossy.PART_AT, lossy.USED_AT)


def test_cells_and_their_refusals() -> None:
    case = SMALL[3]
    made, codec = cells(case.codec, case.fragments(4096), 1 << 20), case.codec
    assert made[lossy.HEADERS] == 1 << 20 and made[lossy.MEANS] == (1 << 20) + 128 and made[lossy.PLANES] == 4096
    assert made[lossy.N_PLANES : lossy.LANES + 1].tolist() == [2, 2, 2, 1, 6, 4, 4]
    assert made[lossy.BODY_BYTES] == codec.slot_bytes - 64 == int(made[lossy.KEY_BYTES] + made[lossy.VALUE_BYTES])
    assert constants(codec)[128:].tolist() == codec.tables.mean.ravel().view(np.uint8).tolist()
    with pytest.raises(CodecError, match="multiples of 16"):
        cells(codec, case.fragments(4104), 0)
    shape = RecordShape(1, 4, 16)
    narrow = make_codec(
        "int8", shape, calibrate(usual(np.random.default_rng(0), 1, 2, 16, 64).reshape(1, -1).view(np.uint8), shape)
    )
    with pytest.raises(CodecError, match="head_dim = 16"):
        cells(narrow, np.array([[4096, 4096, 0, shape.raw_bytes]]), 0)  # type: ignore[arg-type]


class OnGpu(Gpu):
    """Pages, staging and what kernels read of a case, in VRAM."""

    def __init__(self, case: LossyCase) -> None:
        super().__init__()
        self.case, self.n = case, len(case.rows)
        self.memory = self.upload(case.memory)
        self.staging = self.upload(np.full(self.n * case.pitch + 2 * GUARD, 0xA5, np.uint8))
        self.form = self.upload(
            cells(case.codec, case.fragments(self.memory.address), self.upload(constants(case.codec)).address)
        )
        self.words, self.rows = self.upload(np.zeros(self.n, np.uint32)), self.upload(case.rows)
        self.counter = self.upload(np.zeros(1, np.uint32))

    def run(self, name: str, grid: int, *digests: int) -> None:
        """``digests`` are the addresses of the table and the sums, and of an encoder's status."""
        u64, i32 = ctypes.c_uint64, ctypes.c_int32
        staging, case = self.staging.address + GUARD, self.case
        span = (0, case.codec.tiles) if name == "lossy_decode" else ()
        values = (staging, case.pitch, self.form.address, self.words.address, self.rows.address, self.n, case.run, *span)
        values = (*values, *digests, self.counter.address)
        kinds = (u64, u64, u64, u64, u64, i32, i32, *[i32] * len(span), *[u64] * len(digests), u64)
        self.launch(name, grid, 256, values, kinds)
        assert not self.counter.read().any(), "the next launch would find shares taken"

    def encoded(self, grid: int) -> np.ndarray:
        """Staging after an encoding, without its guards; digests and what was declined are the host's."""
        pitch = self.case.pitch
        numbers, sums = self.upload(kernel_numbers(pitch)), self.upload(np.zeros((self.n, 2), np.uint64))
        status = self.upload(np.zeros(self.n, np.uint32))
        self.staging.write(np.full(self.n * pitch + 2 * GUARD, 0xA5, np.uint8))
        self.run("lossy_encode", grid, numbers.address, sums.address, status.address)
        seen = self.staging.read()
        assert (seen[:GUARD] == 0xA5).all() and (seen[-GUARD:] == 0xA5).all() and not self.words.read().any()
        rows = seen[GUARD:-GUARD].reshape(self.n, pitch)
        declined = self.case.declined(rows)
        assert (status.read().view(np.uint32) == declined).all()
        assert (found_digests(sums, pitch)[~declined] == host_digests(rows)[~declined]).all()
        return rows

    def check_decoded(self, rows: np.ndarray, grid: int) -> None:
        """Decodes these rows into pages of ``FILL``, and compares all with what the host makes of them."""
        self.staging.write(np.concatenate((np.full(GUARD, 0xA5, np.uint8), rows.reshape(-1), np.full(GUARD, 0xA5, np.uint8))))
        expected, good = self.case.decoded(rows)
        numbers, sums = self.upload(kernel_numbers(self.case.pitch)), self.upload(np.zeros((self.n, 2), np.uint64))
        for name, digests in (("lossy_decode", ()), ("lossy_decode_digest", (numbers.address, sums.address))):
            self.memory.write(np.full(self.case.memory.size, FILL, np.uint16).view(np.uint8))
            self.words.write(np.zeros(4 * self.n, np.uint8))
            self.run(name, grid, *digests)
            assert (self.words.read().view(np.uint32) == ~good).all()
            back = self.memory.read().view(np.uint16).reshape(expected.shape)
            assert (back == expected).all(), f"{(back != expected).sum()} values differ from the host's"
        used = np.minimum(np.ascontiguousarray(rows[:, 24:32]).view(np.uint64), self.case.pitch)
        whole = np.where(np.arange(self.case.pitch) < used, rows, 0).astype(np.uint8)
        assert (found_digests(sums, self.case.pitch) == host_digests(whole)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("at", range(len(LARGE)))
def test_on_a_gpu_they_write_what_the_host_writes(at: int) -> None:
    case = LARGE[at]()
    gpu = OnGpu(case)
    for grid in (1, 97):
        rows = gpu.encoded(grid)
        assert not case.wrong(rows), f"{case.wrong(rows)} bytes differ from the host's"
    gpu.check_decoded(rows.copy(), 97)
    rng, damaged = np.random.default_rng(9), case.staging()
    damaged[:, 64 : case.codec.slot_bytes] ^= rng.integers(0, 256, (len(damaged), case.codec.slot_bytes - 64)).astype(np.uint8)
    damaged[0, 40] ^= 1
    damaged[-1, 12] ^= 1
    gpu.check_decoded(damaged, 97)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_ten_million_values_of_any_kind(name: str) -> None:
    """Bit patterns drawn evenly, so that all exponents come, below what a rotation may make too large; some planes of one."""
    case = LossyCase(name, RecordShape(4, 8, 128), 1, hostile=False)
    rng, size = np.random.default_rng(11), (80, 8, 16, 1024)
    values = rng.integers(0, 0x4580, size).astype(np.uint16) | rng.integers(0, 2, size).astype(np.uint16) << np.uint16(15)
    near = rng.integers(0x2F00, 0x4580, (80, 8, 1, 1)).astype(np.uint16) & np.uint16(0xFF80)
    alike = rng.random((80, 8, 1, 1)) < 0.5
    values = np.where(alike, near | values & np.uint16(0x80FF), values)
    case.memory = np.ascontiguousarray(values.swapaxes(0, 1))
    case.rows = np.stack((rng.permutation(80), np.full(80, -1)), 1).astype(np.int32)
    gpu = OnGpu(case)
    rows = gpu.encoded(132)
    assert not case.declined(rows).any() and not case.wrong(rows)
    gpu.check_decoded(rows.copy(), 132)
