"""Compiling without a GPU: every kernel for every architecture, 128-bit lanes in the machine code, and the cache."""

from __future__ import annotations

import functools
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from kvortex.errors import BuildError
from kvortex.kernels import build, ptx
from kvortex.transfer import lane
from tests.kernels.compiled import ARCHITECTURES, compiled, sass

MOVERS = [name for name in build.KERNELS if "gather" in name or "scatter" in name]
READERS = ["read_pages", "read_buffers"]
SHARING = [*(name for name in MOVERS if "resident" not in name), "plane_encode", "plane_decode", "lossy_encode",
           "lossy_decode", "plane_decode_digest", "lossy_decode_digest", "read_records"]  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVORTEX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("name", build.KERNELS)
def test_every_kernel_compiles_for_every_architecture(name: str, capability: tuple[int, int]) -> None:
    cubin = compiled(name, capability)
    assert cubin.code[:4] == b"\x7fELF" and name in cubin.entry
    assert int.from_bytes(cubin.code[18:20], "little") == 190  # EM_CUDA: machine code, no PTX


def test_what_architectures_share_changes_no_code(tmp_path: Path) -> None:
    """Else what is shared would hide from these tests what a user compiles."""
    compiled("gather_digest", (8, 0))
    texts = []
    for cubin in (compiled("gather_digest", (12, 0)), build.compile_kernel("gather_digest", (12, 0))):
        texts.append(sass(cubin.code, tmp_path).replace(cubin.entry, "kernel"))
    assert texts[0] == texts[1] and "SHFL" in texts[0]


@functools.cache
def on_hopper(name: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return sass(compiled(name, (9, 0)).code, Path(folder))


@pytest.mark.parametrize("name", [*MOVERS, *READERS])
def test_lanes_are_128_bits_wide_on_hopper(name: str) -> None:
    text = on_hopper(name)
    # What a DMA writes while the kernel runs must not come from a stale line of L1, nor through the constant path.
    fresh = name.startswith("scatter_resident") or name in READERS
    way = r"128\.STRONG\.GPU" if fresh else r"NA\.128 "  # through the constant path, and they would not stay in their places
    assert len(re.findall(rf"\bLDG\.E\.{way}", text)) >= 5  # four in flight, and one for what is left
    assert len(re.findall(r"\bSTG\.E\.\S*128", text)) >= 5 or name in READERS
    spilled = [at.start() for at in re.finditer(r"\b(LDL|STL)\b", text)]
    if "resident_digest" in name:  # what a chunk begins with may be, and nothing that belongs to a piece
        assert len(spilled) <= 6 and max(spilled, default=0) < text.index("IMAD.WIDE.U32 ")
    else:
        assert not spilled, "registers were spilled to local memory"
    for width in ("64", "U16", "U8"):
        assert re.search(rf"\bLDG\.E\.\S*{width}\S*{'STRONG.GPU' if fresh else 'CONSTANT'}", text), f"no lane of {width}"
    assert "NA.128.CONSTANT" not in text


@pytest.mark.parametrize("name", MOVERS)
def test_only_kernels_that_digest_pay_for_it(name: str) -> None:
    """The sums of a warp go by shuffles, and to memory in one addition of 64 bits."""
    text = on_hopper(name)
    if name.endswith("_digest"):
        # Of each 16 bytes 16 multiplications of 32 bits and none of 64, in loops of eight, four and one times as many.
        assert 13 * 8 <= len(re.findall(r"\bIMAD\.WIDE\.U32\b", text)) <= 13 * 8 + 100
        assert text.count("SHFL.BFLY") >= 10 and len(re.findall(r"\bREDG?\.E\.ADD\.64", text)) == 1
        assert "PRMT" in text
    else:
        assert "SHFL.BFLY" not in text and "PRMT" not in text


@pytest.mark.parametrize("name", ["gather_digest", "scatter_digest", *READERS])
def test_sums_of_a_piece_leave_in_one_store(name: str) -> None:
    """Two lanes of a warp put 8 bytes each, which are neighbours, where the same two would else add them: nothing is read back,
    and no fence holds up what follows."""
    text = on_hopper(name)
    (stored,) = re.findall(r"@!?U?P\d+\s+STG\.E\.64 (\S+), (R\d+)", text)
    assert re.findall(r"\bREDG\.E\.ADD\.64\.STRONG\.GPU (\S+), (R\d+)", text) == [stored]
    assert "MEMBAR" not in text
    assert len(re.findall(r"\bATOMG?\b", text)) == (0 if name in READERS else 2), "sums by atomics that give something back"


@pytest.mark.parametrize("name", [name for name in SHARING if name != "plane_encode"])  # which asks when it has none
def test_who_asks_for_a_share_does_not_wait_for_it(name: str) -> None:
    """Of additions of 1 by several lanes the assembler makes one, whose answer is dealt out by a shuffle right behind it."""
    text = on_hopper(name)
    (asked,) = re.finditer(r"\bATOMG\.E\.INC\S* PT, (R\d+)", text)
    (register,) = asked.groups()
    behind = re.split(r"\n", text[asked.end() :], maxsplit=12)[1:12]
    assert not any(re.search(rf"\bSHFL\S* .*, {register}, ", line) for line in behind), behind


@pytest.mark.parametrize("name", build.KERNELS)
def test_nothing_is_called(name: str) -> None:
    """A division of numbers of 64 bits is a call of a hundred instructions and more, in each warp of short launches."""
    assert "CALL.REL" not in on_hopper(name)


def test_two_distances_take_one_instruction_on_hopper(tmp_path: Path) -> None:
    """A sum and a minimum of both halves of a word; what has no such instruction gets the other text of a statement."""
    assert len(re.findall(r"\bVIADDMNMX\.U16x2\b", on_hopper("plane_encode"))) >= 16
    assert "U16x2" not in sass(compiled("plane_encode", (8, 0)).code, tmp_path)


def test_a_text_for_each_generation() -> None:
    both = f"a; {ptx._NEW}b;{ptx._OLD}c;{ptx._END} d; {ptx._NEW}e;{ptx._OLD}{ptx._END} f;"
    assert ptx.text_for(both, (9, 0)) == ptx.text_for(both, (12, 0)) == "a; b; d; e; f;"
    assert ptx.text_for(both, (8, 6)) == "a; c; d;  f;"
    for lost in (ptx._NEW, ptx._OLD, ptx._END):
        with pytest.raises(BuildError, match="not whole"):
            ptx.text_for(both.replace(lost, "", 1), (9, 0))


def test_who_codes_asks_for_a_share_when_the_last_one_is_done() -> None:
    """Behind the addition by which a warp says so: all shares behind one that waits for its turn would wait too."""
    text = on_hopper("plane_encode")
    assert text.rindex("ATOMG.E.ADD") < text.index("ATOMG.E.INC")


@pytest.mark.parametrize("name", SHARING)
def test_a_cta_asks_once_for_the_first_shares_of_its_warps(name: str) -> None:
    ahead, *_ = on_hopper(name).split("BAR.SYNC", 1)
    assert len(re.findall(r"\bATOMG\.E\.ADD", ahead)) == 1 and "ATOMG.E.INC" not in ahead


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("name", READERS)
def test_512_threads_that_read_find_registers(name: str, capability: tuple[int, int], tmp_path: Path) -> None:
    most = max(map(int, re.findall(r"\bR(\d+)\b", sass(compiled(name, capability).code, tmp_path))))
    assert -(-(most + 1) // 8) * 8 * lane.READING_THREADS <= 65536, "a launch would be refused"


@pytest.mark.parametrize("name", [name for name in MOVERS if "resident" in name])
def test_512_threads_of_a_resident_kernel_find_registers(name: str) -> None:
    assert max(map(int, re.findall(r"\bR(\d+)\b", on_hopper(name)))) < 128


def test_the_load_keeps_its_work_and_fills_a_multiprocessor(tmp_path: Path) -> None:
    """Four CTAs of 512 threads share 65,536 registers; and a compiler that saw nobody use the result would drop the work."""
    text = sass(build.compile_kernel("compute", (9, 0)).code, tmp_path)
    assert re.search(r"\bATOMG?\.E\.ADD", text) and len(re.findall(r"\bFFMA\b", text)) >= 2
    assert max(map(int, re.findall(r"\bR(\d+)\b", text))) < 32 and not re.findall(r"\bD(FMA|ADD|MUL)\b", text)


@pytest.mark.parametrize("name", [*MOVERS, *READERS])
def test_eight_loads_are_in_flight(name: str) -> None:
    """Eight 128-bit loads, each into registers of its own, before the first is stored, or multiplied where nothing is stored;
    not counting the digest's numbers."""
    rows = re.findall(
        r"\b(?:(LDG)\.E\.(?:NA\.128|128\.STRONG\.GPU)|(STG)\.E\.128|(IMAD\.WIDE)\.U32)\s+(R\d+|desc)", on_hopper(name)
    )
    uses = [bool(stored or multiplied and name in READERS) for _, stored, multiplied, _ in rows]
    loads = [(bool(loaded), register) for (loaded, _, _, register), use in zip(rows, uses, strict=True) if loaded or use]
    kinds = "".join("L" if loaded else "|" for loaded, _ in loads)
    at = kinds.find("L" * 8 + "|")
    assert at >= 0, kinds
    assert len({register for _, register in loads[at : at + 8]}) == 8


def test_a_warm_start_reads_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cold = build.load("gather", (9, 0))
    monkeypatch.setattr(build, "compile_kernel", lambda *_: pytest.fail("compiled again"))
    began = time.perf_counter()
    assert build.load("gather", (9, 0)) == cold
    assert time.perf_counter() - began < 1
    assert [path.suffix for path in cache.iterdir()] == [".cubin"]


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "version", "foreign"])
def test_a_damaged_cache_file_is_built_anew(cache: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build.Cubin(b"code" * 100, "entry")
    monkeypatch.setattr(build, "compile_kernel", lambda *_: made)
    build.load("gather", (9, 0))
    (path,) = cache.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-1] ^= 1
    elif damage == "version":
        data[8] += 1
    elif damage == "foreign":
        data[:8] = b"ANOTHER!"
    else:
        del data[0 if damage == "empty" else len(data) // 2 :]
    path.write_bytes(data)
    fresh = build.Cubin(b"fresh", "other")
    monkeypatch.setattr(build, "compile_kernel", lambda *_: fresh)
    assert build.load("gather", (9, 0)) == fresh
    monkeypatch.setattr(build, "compile_kernel", lambda *_: pytest.fail("compiled again"))
    assert build.load("gather", (9, 0)) == fresh


def test_another_compiler_or_target_is_another_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "compile_kernel", lambda *_: build.Cubin(b"code", "entry"))
    build.load("gather", (9, 0))
    build.load("gather", (8, 0))
    build._fingerprint.cache_clear()
    monkeypatch.setattr(build.importlib.metadata, "version", lambda _: "99")
    build.load("gather", (9, 0))
    build._fingerprint.cache_clear()
    assert len(list(cache.iterdir())) == 3


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("KVORTEX_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(build, "compile_kernel", lambda *_: build.Cubin(b"code", "entry"))
    assert build.load("gather", (9, 0)).code == b"code"


def test_numpy_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(vars(np))
    with build._row_stack():
        assert np.row_stack is not None  # type: ignore[attr-defined]
    build.compile_kernel("gather", (9, 0))
    assert set(vars(np)) == before


def test_what_does_not_compile_says_why() -> None:
    with pytest.raises(BuildError, match=r"gather.*\(1, 0\)"):
        build.compile_kernel("gather", (1, 0))


def test_block_ids_of_one_launch_agree() -> None:
    from kvortex.kernels import paged
    from kvortex.transfer import planner

    assert planner.MAX_BLOCKS == paged.MAX_BLOCKS
