"""Keys: the chain against hashlib one block at a time, and what must never share a key."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvortex.errors import ArgumentError, ConfigError
from kvortex.keys import KEY_BYTES, Namespace, as_keys, block_keys
from tests.naive import chain

NAMESPACE = Namespace(model="m", dtype="bfloat16", layout=b"\x01\x02", block_size=4, rank=1, world_size=2, lora="a", salt="s")


def rows(keys: np.ndarray) -> list[bytes]:
    return [row.tobytes() for row in keys]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(1, 9))
def test_block_keys_is_the_chain_over_full_blocks(tokens: list[int], block_size: int) -> None:
    namespace = dataclasses.replace(NAMESPACE, block_size=block_size)
    keys = block_keys(namespace, tokens)
    assert keys.dtype == np.uint8 and keys.shape == (len(tokens) // block_size, KEY_BYTES)
    assert keys.flags.c_contiguous and keys.flags.writeable
    assert rows(keys) == chain(namespace.seed, tokens, block_size)


def test_block_keys_are_these_bytes_for_ever() -> None:
    """Keys outlive the process in lower tiers, so a change of the format needs a new domain tag and new numbers here."""
    assert NAMESPACE.seed.hex() == "993dcc1775229c42a0ec6fb7ac079efb1c1275be6bb8d8920600d3617d7a53c3"
    second = block_keys(NAMESPACE, range(8))[1]
    assert second.tobytes().hex() == "7b06156a9c262491eb34d1769ed9c5fe8c22bb3c7074d53628408d06e7fd81fa"


@pytest.mark.parametrize(
    "tokens",
    [
        list(range(9)),
        tuple(range(9)),
        range(9),
        np.arange(9),
        np.arange(9, dtype=np.uint8),
        np.arange(9, dtype=">i4"),
        np.arange(9, dtype=np.uint64),
        np.arange(18)[::2] // 2,
        [np.int32(i) for i in range(9)],
        memoryview(np.arange(9)),
        memoryview(np.arange(9, dtype=np.uint16)),
    ],
)
def test_every_integer_sequence_gives_the_same_keys(tokens: object) -> None:
    assert rows(block_keys(NAMESPACE, tokens)) == chain(NAMESPACE.seed, list(range(9)), 4)


def test_empty_and_short_sequences_have_no_keys() -> None:
    for tokens in ([], (), range(0), range(3), np.arange(0)):
        assert block_keys(NAMESPACE, tokens).shape == (0, KEY_BYTES)


@pytest.mark.parametrize("as_bytes", [True, False])
def test_parent_continues_a_sequence(as_bytes: bool) -> None:
    whole = block_keys(NAMESPACE, range(20))
    parent = whole[1].tobytes() if as_bytes else whole[1]
    assert np.array_equal(block_keys(NAMESPACE, range(8, 20), parent), whole[2:])


def test_a_changed_token_changes_its_block_and_all_behind() -> None:
    tokens = np.arange(20)
    before = block_keys(NAMESPACE, tokens)
    tokens[9] += 1
    after = block_keys(NAMESPACE, tokens)
    assert (before == after).all(axis=1).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("tokens", "seen"),
    [
        ([1, 2, 3, True], "bool"),
        ([1, 2.0, 3, 4], "float"),
        ([1, None, 3, 4], "NoneType"),
        ([[1, 2], [3, 4]], "list"),
        (np.ones(4, bool), "bool"),
        ([np.True_, 1, 1, 1], "bool"),
        (np.ones(4), "float64"),
        (np.ones((2, 2), int), r"\(2, 2\)"),
        (np.int64(3), r"shape \(\)"),
        (np.array([1, 2, 3, 4], object), "object"),
        ([-1, 2, 3, 4], "-1 to 4"),
        ([1, 2, 3, 2**32], str(2**32)),
        (np.array([1, 2, 3, 2**63], np.uint64), str(2**63)),
        ([1, 2, 3, 2**64], "64 bits"),
        ([0, 0, 0, 0, -1], "-1"),  # in the part that makes no full block
        (b"abcd", "bytes"),
        (bytearray(b"abcd"), "bytearray"),
        (memoryview(b"abcd"), "memoryview"),
        (memoryview(np.ones((2, 2), int)), r"shape \(2, 2\)"),
        (memoryview(np.ones(4)), "float64"),
        (np.ma.array([1, 2, 3, 4], mask=[0, 1, 0, 0]), "masked array"),
        (np.ma.array([1, 2, 3, 4]), "masked array"),
        ([1, np.ma.masked, 3, 4], "MaskedConstant"),
        ("1234", "str"),
        ({1, 2, 3, 4}, "object"),
    ],
)
def test_bad_tokens_are_refused(tokens: object, seen: str) -> None:
    with pytest.raises(ArgumentError, match=seen):
        block_keys(NAMESPACE, tokens)


@pytest.mark.parametrize("parent", [b"", b"x" * 31, "x" * 32, np.zeros((1, 32), np.uint8), np.zeros(32), 7, np.array(5),
                                    np.ma.zeros(32, np.uint8), "x" * 10**6, 10**5000],
                         ids=lambda parent: type(parent).__name__)  # fmt: skip
def test_bad_parents_are_refused(parent: object) -> None:
    with pytest.raises(ArgumentError, match="parent") as caught:
        block_keys(NAMESPACE, range(8), parent)
    assert len(str(caught.value)) < 300


def test_seed_changes_with_every_field() -> None:
    other = dict(model="n", dtype="f", layout=b"\x01", block_size=8, rank=0, world_size=3, lora="", salt="t")
    assert set(other) == {field.name for field in dataclasses.fields(Namespace)}
    seeds = {NAMESPACE.seed} | {dataclasses.replace(NAMESPACE, **{name: value}).seed for name, value in other.items()}
    assert len(seeds) == len(other) + 1


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=6), st.data())
def test_moving_characters_between_fields_changes_the_seed(text: str, data: st.DataObject) -> None:
    names = ("model", "dtype", "lora", "salt")
    cuts = st.lists(st.integers(0, len(text)), min_size=3, max_size=3).map(sorted)

    def split() -> dict[str, str]:
        edges = [0, *data.draw(cuts), len(text)]
        return {name: text[edges[i] : edges[i + 1]] for i, name in enumerate(names)}

    one, two = split(), split()
    assert (Namespace(**one).seed == Namespace(**two).seed) == (one == two)


def test_text_and_bytes_of_neighbouring_fields_do_not_run_together() -> None:
    assert Namespace(dtype="ab", layout=b"c").seed != Namespace(dtype="a", layout=b"bc").seed
    assert Namespace(block_size=11, rank=2, world_size=3).seed != Namespace(block_size=1, rank=12, world_size=13).seed
    assert Namespace(rank=1, world_size=11).seed != Namespace(rank=11, world_size=12).seed


def test_seed_is_stable_across_processes_and_takes_any_text() -> None:
    code = "from kvortex.keys import Namespace; print(Namespace(model='ü', salt='x').seed.hex())"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert seen == Namespace(model="ü", salt="x").seed.hex()
    assert Namespace(model="\udcff").seed != Namespace(model="\udcfe").seed


def test_namespace_is_frozen_and_compares_by_value() -> None:
    assert dataclasses.replace(NAMESPACE) == NAMESPACE and hash(NAMESPACE) == hash(dataclasses.replace(NAMESPACE))
    _ = NAMESPACE.seed
    assert dataclasses.replace(NAMESPACE) == NAMESPACE
    with pytest.raises(dataclasses.FrozenInstanceError):
        NAMESPACE.model = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", 3),
        ("dtype", None),
        ("layout", "text"),
        ("block_size", 0),
        ("block_size", 1 << 63),
        ("block_size", True),
        ("rank", -1),
        ("rank", 2),
        ("world_size", 1.0),
        ("lora", b"a"),
        ("salt", 0),
    ],
)
def test_bad_namespace_fields_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        dataclasses.replace(NAMESPACE, **{name: value})


def test_as_keys_passes_a_fitting_array_through() -> None:
    keys = np.arange(96, dtype=np.uint8).reshape(3, 32)
    assert as_keys(keys) is keys or np.shares_memory(as_keys(keys), keys)
    assert np.shares_memory(as_keys(keys[1:]), keys)
    strided = np.arange(192, dtype=np.uint8).reshape(6, 32)[::2]
    assert as_keys(strided).flags.c_contiguous and np.array_equal(as_keys(strided), strided)


def test_as_keys_takes_bytes_in_sequences() -> None:
    names = [hashlib.sha256(bytes([i])).digest() for i in range(3)]
    for given_keys in (names, tuple(names)):
        keys = as_keys(given_keys)
        assert rows(keys) == names and keys.flags.writeable and keys.flags.c_contiguous
    for nothing in ([], (), np.empty((0, 32), np.uint8)):
        assert as_keys(nothing).shape == (0, KEY_BYTES) and as_keys(nothing).dtype == np.uint8


@pytest.mark.parametrize(
    ("keys", "seen"),
    [
        (np.zeros((2, 31), np.uint8), r"\(2, 31\)"),
        (np.ma.zeros((2, 32), np.uint8), "masked array"),
        (np.array(5, np.uint8), r"shape \(\)"),
        (np.zeros(32, np.uint8), r"\(32,\)"),
        (np.zeros((2, 32), np.int8), "int8"),
        (np.zeros((2, 4), np.uint64), "uint64"),
        (b"x" * 32, "one bytes"),
        ("x" * 32, "one str"),
        (None, "NoneType"),
        ({b"x" * 32}, "set"),
        ([b"x" * 31, b"x" * 33], r"keys\[0\].*length 31"),
        ([b"x" * 32, "x" * 32], r"keys\[1\].*str"),
        ([7], "int"),
    ],
)
def test_as_keys_refuses_and_says_what_it_saw(keys: object, seen: str) -> None:
    with pytest.raises(ArgumentError, match=seen):
        as_keys(keys)


def test_importing_keys_does_not_import_numba() -> None:
    code = "import sys, kvortex.keys; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


class Endless(Sequence[Any]):
    """Says that it has three items, and goes on for ever."""

    def __init__(self, item: Any) -> None:
        self._item = item

    def __len__(self) -> int:
        return 3

    def __getitem__(self, at: Any) -> Any:
        return self._item


class Short(Endless):
    def __getitem__(self, at: Any) -> Any:
        if at > 1:
            raise IndexError
        return self._item


@pytest.mark.parametrize("kind", [Endless, Short])
def test_sequences_that_do_not_know_their_length(kind: type[Endless]) -> None:
    with pytest.raises(ArgumentError, match="keys have a length of 3, and give another number of keys"):
        as_keys(kind(bytes(32)))
    with pytest.raises(ArgumentError, match="token_ids has a length of 3, and gives another number of integers"):
        block_keys(NAMESPACE, kind(7))


def test_keys_that_come_one_by_one_are_refused_unread() -> None:
    """They may never end."""
    for keys in (itertools.repeat(bytes(32)), (bytes(32) for _ in range(3)), {bytes(32)}):
        with pytest.raises(ArgumentError, match="keys must be an"):
            as_keys(keys)  # type: ignore[arg-type]
