"""Statements of PTX do what their Python bodies say: each is executed for a warp on a CPU, on numbers that its users have."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvortex.codecs._lossy import scales
from kvortex.kernels import ahead, digest, eights, float32, marked, packed, plane_row, shares, warp_words
from kvortex.kernels.eights import LEAST_SCALE, NEAREST, ROOTS
from tests.kernels.ptx_machine import LANES, Machine, floats, words

Rng = np.random.Generator
PLACES = {"e": 8, "w": 8, "v": 4, "p": 2}
TOGETHER = ("from_lane", "scale_codes", "gathered")
STATEMENTS = {
    f"{module.__name__.rsplit('.', 1)[1]}.{name}": function
    for module in (eights, float32, packed, plane_row)
    for name, function in vars(module).items()
    if hasattr(function, "ptx") and function.__module__ == module.__name__ and name not in TOGETHER
}


def _any_float(rng: Rng, places: int) -> np.ndarray:
    """(places, 32) words: of all sizes, zeros of both signs and subnormal numbers too."""
    made = words(rng.normal(size=(places, 32)) * np.exp2(rng.integers(-40, 17, (places, 32))))
    return np.where(rng.random((places, 32)) < 0.1, rng.choice([0, 0x80000000, 3, 0x80000100], (places, 32)), made).astype(
        np.uint32
    )


def _fixed(*values: float) -> Callable[[Rng, int], np.ndarray]:
    return lambda rng, places: words(np.broadcast_to(rng.choice(values, 32).astype(np.float32), (places, 32)))


def _short_float(rng: Rng, places: int) -> np.ndarray:
    """Of 11 bits, as those of fp16."""
    return _any_float(rng, places) & np.uint32(0xFFFFE000)


def _with_nan(rng: Rng, places: int) -> np.ndarray:
    return np.where(rng.random((places, 32)) < 0.1, np.uint32(0x7FC00000), _between(-9, 9)(rng, places))


def _between(low: float, high: float) -> Callable[[Rng, int], np.ndarray]:
    return lambda rng, places: words(rng.uniform(low, high, (places, 32)).astype(np.float32))


def _whole(low: int, high: int) -> Callable[[Rng, int], np.ndarray]:
    return lambda rng, places: rng.integers(low, high, (places, 32)).astype(np.uint32)


def _bytes_below(end: int) -> Callable[[Rng, int], np.ndarray]:
    return lambda rng, places: rng.integers(0, end, (places, 32, 4), np.uint8).view(np.uint32)[..., 0]


def _bases(rng: Rng, places: int) -> np.ndarray:
    pairs = rng.choice([0, 1, 2, 3, 4, 5, 127, 254, 255], (places, 32, 2)).astype(np.uint32)
    return pairs[..., 0] << np.uint32(7) | pairs[..., 1] << np.uint32(23) | np.uint32(0x8000)


def _late(rng: Rng, places: int) -> np.ndarray:
    """How much is to be added, from 4 to -5 exponents, or an escaped exponent, or nothing; of two values."""
    near = 128 * rng.integers(-5, 5, (2, places, 32)) & 0x7FFF
    escaped = rng.integers(0, 256, (2, places, 32)) << 7 | plane_row.ESCAPED
    both = np.where(rng.random((2, places, 32)) < 0.3, escaped, near) * (rng.random((2, places, 32)) < 0.7)
    return (both[0] | both[1] << 16).astype(np.uint32)


def _distances(rng: Rng, places: int) -> np.ndarray:
    low, high = rng.integers(0, plane_row.FAR + 1, (2, places, 32)).astype(np.uint32)
    return low | high << np.uint32(16)


def _nibbles(rng: Rng, places: int) -> np.ndarray:
    """Codes of the second tier, and above the lower half anything."""
    codes = rng.integers(0, 8, (4, places, 32)).astype(np.uint32) << np.uint32([[[0]], [[4]], [[8]], [[12]]])
    return np.bitwise_or.reduce(codes) | rng.integers(0, 1 << 16, (places, 32)).astype(np.uint32) << np.uint32(16)


def _kept(rng: Rng, places: int) -> np.ndarray:
    """Distances of the second tier, and bytes of exponents."""
    far = rng.choice([0, 4, 5, 6, 7, 8, 9, plane_row.FAR], (places, 32, 2)).astype(np.uint32)
    far |= rng.integers(0, 256, (places, 32, 2)).astype(np.uint32) << np.uint32(8)
    return far[..., 0] | far[..., 1] << np.uint32(16)


def _shifted_bases(rng: Rng, places: int) -> np.ndarray:
    low, high = rng.choice([0, 1, 9, 10, 11, 127, 254, 255], (2, places, 32)).astype(np.uint32) + np.uint32(0xFF01)
    return low & np.uint32(0xFFFF) | high << np.uint32(16)


def _inverted(rng: Rng, places: int) -> np.ndarray:
    low, high = rng.integers(0, 256, (2, places, 32)).astype(np.uint32)
    return low | high << np.uint32(16)


# Arguments that are not of any kind, by statement and place.
GIVEN: dict[str, dict[int, Callable[[Rng, int], np.ndarray]]] = {
    "packed.lower_bits": {0: _bytes_below(64), 1: _bytes_below(64)},
    "packed.upper_bits": {0: _bytes_below(64), 1: _bytes_below(64)},
    "packed.codes_of_six": {1: _whole(0, 1 << 16)},
    "packed.bit_planes": {0: _bytes_below(16)},
    "eights.joined": {2: _fixed(1, -1)},
    "eights.inverses_of": {2: lambda rng, places: np.uint32(0x01010101) * _whole(65, 255)(rng, places)},
    "eights.scales_of": {2: lambda rng, places: np.uint32(0x01010101) * _whole(1, 191)(rng, places)},
    "eights.value_numbers": {2: _short_float, 4: _fixed(2**23)},
    **{f"eights.{name}": {0: _between(-9, 9)} for name in ("smallest", "largest")},
    **{f"eights.{name}_each": {0: _between(-9, 9), 1: _between(-9, 9)} for name in ("smaller", "larger")},
    **{f"float32.{name}": {0: _between(-9, 9), 1: _between(-9, 9)} for name in ("smaller", "larger")},
    "eights.low_codes": {0: _between(-9, 9), 1: _between(0.9, 14), 2: _fixed(NEAREST + 128), 3: _fixed(NEAREST + 255)},
    "eights.high_codes": {0: _between(-8, 9), 1: _fixed(1), 2: _fixed(NEAREST + 8), 3: _fixed(NEAREST + 15)},
    "eights.value_codes": dict(enumerate([_between(-3, 20)] * 4 + [_fixed(-3), _fixed(11, 3.7)])),
    "eights.key_numbers": {2: _fixed(2**23 + 2048 - 128), 3: _between(0.001, 1), 5: _fixed(2**23)},
    "plane_row.row_word": {1: _bases, 2: _late},
    "plane_row.row_word_above": {1: _bases, 2: _late},
    "plane_row.late_of": {0: _nibbles},
    "plane_row.late_codes": dict(enumerate([_kept] * 4)),
    "plane_row.first_codes": {0: _distances},
    "plane_row.distances": {0: _inverted, 1: _shifted_bases},
    "eights.smaller_each": {0: _with_nan, 1: _with_nan},
    "eights.larger_each": {0: _with_nan, 1: _with_nan},
    "eights.smallest": {0: _with_nan},
    "eights.largest": {0: _with_nan},
    "float32.smaller": {0: _with_nan, 1: _with_nan},
    "float32.larger": {0: _with_nan, 1: _with_nan},
    "float32.half_down": {0: _between(-65504, 65504)},
    "float32.half_up": {0: _between(0, 70)},
    "float32.whole": {0: _whole(0, 1 << 24)},
    "float32.over": {1: _between(0.1, 300)},
}  # fmt: skip


def _drawn(name: str, letters: str, rng: Rng) -> list[np.ndarray]:
    made = []
    for at, letter in enumerate(letters):
        usual = _any_float if letter in "ef" else _whole(0, 1 << 32)
        made.append(GIVEN.get(name, {}).get(at, usual)(rng, PLACES.get(letter, 1)))
    return made


def _executed(function: Any, drawn: list[np.ndarray], *, shared: bool = False, before: bool = False) -> np.ndarray:
    """(places, 32) words that a text leaves, or the one ``before`` it; ``shared``: results are in registers of arguments, as a
    compiler may put them."""
    text, _, result = function.ptx
    if before:
        text = function.ptx_before
    count = PLACES.get(result, 1)
    registers = {f"${count + at}": row for at, row in enumerate(row for each in drawn for row in each)}
    first = count if shared else 0
    own = re.sub(r"\$(\d+)", lambda found: f"${first + int(found[1])}" if int(found[1]) < count else found[0], text)
    machine = Machine(registers)
    machine.run(own)
    return np.stack([machine.registers[f"${first + at}"] for at in range(count)])


def _arguments(letters: str, drawn: list[np.ndarray], lane: int) -> list[Any]:
    made: list[Any] = []
    for letter, rows in zip(letters, drawn, strict=True):
        column = floats(rows[:, lane]) if letter in "ef" else rows[:, lane].tolist()
        made.append(tuple(column) if letter in PLACES else column[0])
    return made


@pytest.mark.parametrize("name", STATEMENTS)
def test_a_statement_does_what_its_body_says(name: str) -> None:
    function = STATEMENTS[name]
    _, letters, result = function.ptx
    rng = np.random.default_rng(len(name))
    for _ in range(6):
        drawn = _drawn(name, letters, rng)
        made = _executed(function, drawn)
        assert (made == _executed(function, drawn, before=True)).all(), "a GPU before 9.0 does something else"
        if sum(map(len, drawn)) >= len(made):
            assert (made == _executed(function, drawn, shared=True)).all(), "a result came before all arguments were read"
        for lane in LANES:
            body = function(*_arguments(letters, drawn, lane))
            wanted = words(body) if result in ("e", "f") else np.array(body, np.uint64).astype(np.uint32)
            assert (made[:, lane] == wanted.ravel()).all(), (lane, made[:, lane], wanted)


def test_lanes_trade() -> None:
    rng = np.random.default_rng(1)
    given = rng.integers(0, 1 << 32, (8, 32)).astype(np.uint32)
    word = given[:1]
    summed = _executed(warp_words.summed, [word, LANES[None].astype(np.uint32)])
    assert (summed[0] == np.cumsum(word[0], dtype=np.uint32)).all()
    flip = np.full((1, 32), 8, np.uint32)
    assert (_executed(eights.from_lane, [given, flip]) == given[:, LANES ^ 8]).all()


def test_marked_halves_lie_one_behind_another() -> None:
    """Of each lane by itself, and nothing else changes; what comes back has 0 where nothing is marked."""
    rng, unit = np.random.default_rng(5), 64
    given = rng.integers(0, 1 << 32, (8, 32)).astype(np.uint32)
    marks = rng.integers(0, 1 << 32, 32).astype(np.uint32) & np.uint32(0x55555555)
    marks[:3] = 0, 0x55555555, 0x40000001
    memory = rng.integers(0, 1 << 16, (32, unit)).astype(np.uint16)
    wanted = memory.copy()
    first = memory.ctypes.data + 2 * unit * LANES.astype(np.uint64)
    for lane in LANES:
        at = wanted.ctypes.data + 2 * unit * int(lane)
        marked.put_marked(given[:, lane].tolist(), int(marks[lane]), at + 8, at + 64)
    registers = {f"${at}": row for at, row in enumerate([*given, marks, first + np.uint64(8), first + np.uint64(64)])}
    Machine(dict(registers)).run(marked.put_marked.ptx[0])
    assert (memory == wanted).all()
    own = [[r for r in range(8) if marks[1 + lane] >> 2 * r & 1] for lane in range(31)]
    for lane, rows in enumerate(own, 1):
        assert memory[lane, 4 : 4 + len(rows)].tolist() == (given[rows, lane] & 0xFFFF).tolist()
    machine = Machine(dict(registers))
    machine.run(marked.get_marked.ptx[0])
    back = np.stack([machine.registers[f"${at}"] for at in range(8)])
    both = np.arange(0, 16, 2, dtype=np.uint32)[:, None]
    low, high = marks >> both & 1, marks >> (16 + both) & 1
    assert (back == given & (low * np.uint32(0xFFFF) | high * np.uint32(0xFFFF0000))).all()
    given_back = [marks[None], registers["$9"][None], registers["$10"][None]]
    assert (back == _executed(marked.get_marked, given_back, shared=True)).all(), "a result came before all arguments were read"
    for lane in LANES:
        found = marked.get_marked(int(marks[lane]), int(first[lane]) + 8, int(first[lane]) + 64)
        assert list(found) == back[:, lane].tolist()


def test_four_words_go_to_shared_memory_at_once() -> None:
    given = np.random.default_rng(6).integers(0, 1 << 32, (4, 32)).astype(np.uint32)
    memory = np.zeros((32, 8), np.uint32)
    first = memory.ctypes.data + 32 * LANES.astype(np.uint64)
    Machine({f"${at}": row for at, row in enumerate([first, *given])}).run(ahead.put16.ptx[0])
    assert (memory[:, :4] == given.T).all() and not memory[:, 4:].any()
    other = np.zeros(8, np.uint32)
    ahead.put16(other.ctypes.data, given[:, 3].tolist())
    assert (other == memory[3]).all()


def test_lanes_find_scales_together() -> None:
    """A quarter of the codes in each of four lanes, and all of them in all; NaN and what is too large have codes above 255."""
    rng = np.random.default_rng(2)
    for turn in range(8):
        most = _any_float(rng, 8) & np.uint32(0x7FFFFFFF)
        near = rng.integers(LEAST_SCALE, 159, (8, 32)) << 23 | rng.choice(ROOTS, (8, 32))
        most = np.where(rng.random((8, 32)) < 0.5, most, near + rng.integers(-1, 2, (8, 32))).astype(np.uint32)
        most[turn, 4 * turn] = [0x7FC00000, 0x7F800000, 0x4F5744FD, 0x4F5744FE][turn % 4]
        lanes = LANES[None].astype(np.uint32)
        made = _executed(eights.scale_codes, [most, lanes])
        numbers = floats(most).reshape(8, 4, 8)  # number, of four lanes, each of eight
        largest = np.maximum.reduce(numbers, axis=1)
        codes = np.array([[np.count_nonzero(~(scales() >= largest[k, lane])) for lane in range(8)] for k in range(8)])
        for lane in LANES:
            pair = codes[2 * (lane >> 3) :, lane & 7][:2]
            seen = np.array([made[0, lane] & 0xFFFF, made[0, lane] >> 16])
            assert (np.minimum(seen, 256) == pair).all()
        low, high = _executed(eights.gathered, [made, lanes])
        for lane in LANES:
            all_codes = np.array([low[lane], high[lane]]).view(np.uint8)
            assert (all_codes == codes[:, lane & 7])[codes[:, lane & 7] < 256].all()


def test_what_is_packed_comes_back() -> None:
    rng = np.random.default_rng(3)
    for end, pack, back in ((16, _fours, packed.codes_of_four), (64, _sixes, packed.codes_of_six)):
        codes = _bytes_below(end)(rng, 8)
        for lane in LANES:
            own = codes[:, lane].tolist()
            assert list(back(*pack(own))) == own
    codes = _bytes_below(8)(rng, 8)
    for lane in LANES:
        planes = packed.bit_planes(tuple(codes[:, lane].tolist()))
        assert list(packed.codes_of_planes(planes)) == codes[:, lane].tolist() and planes[3] == 0


def _fours(codes: list[int]) -> list[tuple[int, ...]]:
    return [tuple(packed.lower_bits(codes[2 * k], codes[2 * k + 1]) for k in range(4))]


def _sixes(codes: list[int]) -> list[tuple[int, ...]]:
    return [*_fours(codes), tuple(packed.upper_bits(codes[2 * k], codes[2 * k + 1]) for k in range(4))]


def _on_a_warp(function: Any, *arguments: Any) -> dict[str, Any]:
    """The registers that a statement leaves; arguments are (32,) or numbers, 64 bits wide where their letter says so."""
    text, letters, result = function.ptx
    count = {"d": 2, "": 0}.get(result, 1)
    kinds = {"l": np.uint64, "r": np.uint32}
    given = [np.broadcast_to(np.array(each, kinds[letter]), 32) for each, letter in zip(arguments, letters, strict=True)]
    machine = Machine({f"${count + at}": row for at, row in enumerate(given)})
    machine.run(text)
    return machine.registers


@pytest.mark.parametrize("how", ["add_up", "settle", "settle alone"])
def test_sums_of_a_warp_come_to_memory_once(how: str) -> None:
    rng = np.random.default_rng(2)
    first, second = rng.integers(0, 1 << 64, (2, 32), np.uint64)
    cells = rng.integers(0, 1 << 64, 4, np.uint64)
    before, alone = cells.copy(), [how == "settle alone"] * (how != "add_up")
    _on_a_warp(getattr(digest, how.split()[0]), cells.ctypes.data + 8, first, second, LANES, *alone)
    sums = np.array([first.sum(), second.sum()])  # modulo 2**64
    wanted = sums if any(alone) else sums + before[1:3]
    assert (cells[1:3] == wanted).all() and (cells[[0, 3]] == before[[0, 3]]).all()


def test_numbers_of_digests() -> None:
    rng = np.random.default_rng(3)
    word, other = rng.integers(0, 1 << 32, (2, 32), np.uint32)
    total = rng.integers(0, 1 << 64, 32, np.uint64)
    plus = _on_a_warp(digest._plus_product, word, other, total)["$0"].tolist()
    assert plus == [digest._plus_product(*each) for each in zip(word.tolist(), other.tolist(), total.tolist(), strict=True)]
    turned = _on_a_warp(digest._turned, word)["$0"].tolist()
    assert turned == [digest._turned(each) for each in word.tolist()] == word.byteswap().tolist()
    table = rng.integers(0, 1 << 64, 64, np.uint64)
    pair = _on_a_warp(digest._pair, table.ctypes.data + 16 * LANES)
    assert (np.stack([pair["$0"], pair["$1"]], 1).reshape(-1) == table).all()


@pytest.mark.parametrize("count", [1, 16])
@pytest.mark.parametrize("asker", [0, 32])
def test_one_lane_asks_for_shares_or_none(asker: int, count: int) -> None:
    """0: each lane is itself, and the first one asks; 32: they are dealt out."""
    counter = np.array([7, 41, 9], np.uint32)
    who, at = LANES if asker == 0 else np.full(32, asker), counter.ctypes.data + 4
    arguments = (at, who, 1000 + LANES) if count == 1 else (at, who, count, 1000 + LANES)
    found = _on_a_warp(shares._ask if count == 1 else shares._ask_for, *arguments)["$0"]
    assert found[0] == (41 if asker == 0 else 1000) and (found[1:] == 1001 + np.arange(31)).all()
    assert counter.tolist() == [7, 41 + count if asker == 0 else 41, 9]
