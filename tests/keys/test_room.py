"""Blocks whose messages are longest: that their buffers have room for them, and what if they had not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvortex.errors import KVortexError
from kvortex.keys import Namespace, VllmKeys, _loops, _sha_ni
from kvortex.keys.vllm import VERSIONS
from tests.naive_keys import sha256_cbor, vllm_hashes, vllm_request, walked

NONE_HASH = sha256_cbor("0")
WIDEST = 2**63 - 1  # 9 bytes


def scheme(version: str, block_size: int, ahead: int = 0) -> VllmKeys:
    return VllmKeys(Namespace(block_size=block_size), version, seed="0", ahead=ahead)


def rows(keys: np.ndarray) -> list[bytes]:
    return [row.tobytes() for row in keys]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("block_size", [1, 300])
def test_blocks_whose_messages_are_as_long_as_can_be(version: str, block_size: int) -> None:
    """Many inputs, offsets of many bytes, wide embeddings and wide tokens; what left its buffer would be refused."""
    begin = 70200
    tokens = [WIDEST] * (2 * block_size + 40)
    many = [("i", 0, begin + 1)] * 400  # all end in one block, whose offsets take 5 bytes each
    extras = walked(version, range(0, begin + 2 * block_size, block_size), block_size, many)[begin // block_size :]
    assert len(extras[0]) == 400
    made = scheme(version, block_size)
    expected = vllm_hashes(tokens[: 2 * block_size], block_size, NONE_HASH, extras)
    assert rows(made.block_keys(tokens[: 2 * block_size], NONE_HASH, start=begin, multimodal=many)) == expected
    about: dict[str, Any] = {"lora": ("l" * 70000, "p" * 70000), "salt": "s" * 70000}
    for ahead in (0, 40) if version == "vllm" else (0,):
        made = scheme(version, block_size, ahead)
        for embeds in (None, np.ones((2 * block_size + 40, 2000), np.uint8)):
            expected = vllm_request(version, tokens, block_size, NONE_HASH, ahead, prompt_embeds=embeds, **about)
            assert rows(made.block_keys(tokens, prompt_embeds=embeds, **about)) == expected


@pytest.mark.parametrize("what", ["tokens", "inputs", "texts", "embeddings", "digest", "ahead"])
def test_a_block_longer_than_its_buffer_is_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the room was counted from: nothing is written behind it."""
    size, ahead = 40, 50 if what == "ahead" else 0
    text = b"x" * 600 if what == "texts" else b""
    spans = np.array([[0, 1]] * 600 if what == "inputs" else [], np.int64).reshape(-1, 2)
    ends = np.full(3 + len(spans), len(text), np.int64)
    embeds = np.ones((size, 15 if what in ("embeddings", "digest") else 0), np.uint8)
    content = _loops.Content(_loops.bytes_of(text), ends, spans, embeds)
    rules = _loops.Rules(True, what != "embeddings", 0, ahead)
    tokens = np.full(size + ahead, WIDEST)
    keys, parent = np.zeros((1, 32), np.uint8), _loops.bytes_of(bytes(32))
    room, buffers = 0 if what == "tokens" else 32 + 9 * (size + 4), []

    def guarded(count: int, dtype: Any) -> np.ndarray:
        """An array with others' bytes behind it."""
        buffers.append(np.full(count + 1000, 77, dtype))
        return buffers[-1][:count]

    def hash_placed(function: Any, room: int) -> None:
        function(tokens, 0, size, parent, content, rules, room, keys, _sha_ni.available())

    hash_placed(_loops.hash_placed, room + 1000)
    assert keys.any()
    keys[:] = 0
    monkeypatch.setattr(_loops, "np", SimpleNamespace(empty=guarded, uint8=np.uint8, uint32=np.uint32))
    with pytest.raises(KVortexError, match="longer than the buffer"):
        hash_placed(_loops.hash_placed.py_func, room)  # type: ignore[attr-defined]
    assert not keys.any() and buffers and all((buffer[-1000:] == 77).all() for buffer in buffers)
    with pytest.raises(KVortexError, match="longer than the buffer"):
        hash_placed(_loops.hash_placed, room)
    assert not keys.any()
