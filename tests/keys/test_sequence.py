"""Keys of a sequence that grows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvortex.errors import ArgumentError
from kvortex.keys import KeyScheme, KvortexKeys, Namespace, VllmKeys


def schemes(block_size: int) -> list[KeyScheme]:
    namespace = Namespace(block_size=block_size)
    return [KvortexKeys(namespace), VllmKeys(namespace, seed="0"), VllmKeys(namespace, ahead=2)]


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=9), max_size=30), st.integers(1, 7))
def test_tokens_in_any_portions(parts: list[list[int]], block_size: int) -> None:
    tokens = [token for part in parts for token in part]
    for scheme in schemes(block_size):
        sequence = scheme.sequence(salt="s")
        found = np.concatenate([sequence.extend(part) for part in parts] or [np.empty((0, 32), np.uint8)])
        assert np.array_equal(found, scheme.block_keys(tokens, salt="s"))
        assert np.array_equal(sequence.keys, found) and sequence.num_tokens == len(tokens)


def test_only_new_blocks_are_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvortex.keys import _loops

    hashed: list[int] = []
    hash_chain = _loops.hash_chain

    def counted(tokens: np.ndarray, size: int, parent: np.ndarray, keys: np.ndarray, hardware: bool) -> None:
        hashed.append(len(keys))
        hash_chain(tokens, size, parent, keys, hardware)

    monkeypatch.setattr(_loops, "hash_chain", counted)
    sequence = KvortexKeys(Namespace(block_size=4)).sequence()
    for token in range(21):
        sequence.extend([token])
    assert hashed == [1] * 5


def test_a_call_that_raises_takes_nothing() -> None:
    sequence = KvortexKeys(Namespace(block_size=4)).sequence()
    before = sequence.extend(range(6))
    for bad in ([1, 2, -1], [1.5], "ab", [2**40]):
        with pytest.raises(ArgumentError, match="token_ids"):
            sequence.extend(bad)
    assert sequence.num_tokens == 6
    sequence.extend([6, 7])
    assert np.array_equal(sequence.keys, KvortexKeys(Namespace(block_size=4)).block_keys(range(8)))
    assert np.array_equal(sequence.keys[:1], before)


def test_what_is_given_is_the_callers() -> None:
    """Neither the tokens that were handed in nor the keys that came out are looked at again."""
    sequence, tokens = KvortexKeys(Namespace(block_size=4)).sequence(), np.arange(6)
    given_keys, kept = sequence.extend(tokens), sequence.keys
    tokens[:], given_keys[:], kept[:] = 0, 0, 0
    sequence.extend([6, 7])
    assert np.array_equal(sequence.keys, KvortexKeys(Namespace(block_size=4)).block_keys(range(8)))


@pytest.mark.parametrize("version", ["vllm", "vllm-0.15"])
def test_embeddings_that_are_given_are_the_callers(version: str) -> None:
    scheme = VllmKeys(Namespace(block_size=4), version, seed="0")
    for embeds in (np.ones((8, 3), np.uint8), np.ones((8, 3), np.float32), np.ones((3, 8)).T, np.ones((8, 2, 2), np.float16)):
        expected = scheme.block_keys([0] * 8, prompt_embeds=embeds)
        sequence = scheme.sequence(prompt_embeds=embeds)
        sequence.extend([0] * 4)
        embeds[:] = 0
        sequence.extend([0] * 4)
        assert np.array_equal(sequence.keys, expected)


def test_unknown_things_about_a_sequence_are_refused() -> None:
    with pytest.raises(TypeError, match="multimodal"):
        KvortexKeys(Namespace()).sequence(multimodal=[("a", 0, 1)])
