"""How vLLM names blocks, the slow and obvious way: hashlib and cbor2, one block after another."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import cbor2
import numpy as np

Inputs = Sequence[tuple[str, int, int]]


def sha256_cbor(value: Any) -> bytes:
    return hashlib.sha256(cbor2.dumps(value, canonical=True)).digest()


def vllm_hashes(tokens: Sequence[int], block_size: int, parent: bytes, extras: Sequence[Any] | None = None) -> list[bytes]:
    """A hash for each full block; ``extras`` has what is hashed beside each block's tokens, None for nothing."""
    found = []
    for at in range(len(tokens) // block_size):
        block = tuple(tokens[at * block_size : (at + 1) * block_size])
        parent = sha256_cbor((parent, block, None if extras is None else extras[at]))
        found.append(parent)
    return found


def extra_keys(
    version: str,
    begin: int,
    end: int,
    *,
    lora: tuple[str, str] | None = None,
    salt: str = "",
    multimodal: Inputs = (),
    prompt_embeds: np.ndarray | None = None,
) -> tuple[Any, ...] | None:
    """What vLLM hashes beside the tokens from ``begin`` to ``end``, for inputs of which none lies inside another."""
    tagged, offsets, digests = {
        "vllm": (True, True, True),
        "vllm-0.29": (False, True, True),
        "vllm-0.20": (False, True, True),
        "vllm-0.17": (False, False, True),
        "vllm-0.15": (False, False, False),
    }[version]
    found: list[Any] = []
    if lora:
        found.append(("lora", *lora) if tagged else lora[0])
    for identifier, offset, length in multimodal:
        if offset < end and begin < offset + length:
            pair = (identifier, offset - begin)
            found.append(("mm", *pair) if tagged else pair if offsets else identifier)
    if salt and begin == 0:
        found.append(("cache_salt", salt) if tagged else salt)
    if prompt_embeds is not None:
        raw = prompt_embeds[begin:end].tobytes()
        what = hashlib.sha256(raw).digest() if digests else raw
        found.append(("prompt_embeds", what) if tagged else what)
    return tuple(found) or None


def walked(version: str, begins: Sequence[int], block_size: int, inputs: Inputs) -> list[Any]:
    """What vLLM hashes for inputs of which some may lie inside another: it goes on from where it was at the block before,
    and stops at the first one that goes on itself."""
    late = version in ("vllm-0.15", "vllm-0.17")  # where one that ends at the first token counts, unless it was left behind
    extras: list[Any] = []
    left = list(inputs)
    for begin in begins:
        end, found = begin + block_size, []
        last = inputs[-1][1] + inputs[-1][2]
        while left and left[0][1] < end and (begin <= last if late else begin < last):
            identifier, offset, length = left[0]
            if begin < offset + length or (late and begin == offset + length):
                found.append((identifier, offset - begin))
                if offset + length > end:
                    break
            del left[0]
        names = [("mm", *pair) if version == "vllm" else pair[0] if late else pair for pair in found]
        extras.append(tuple(names) or None)
    return extras


def vllm_request(
    version: str, tokens: Sequence[int], block_size: int, none_hash: bytes, ahead: int = 0, **about: Any
) -> list[bytes]:
    """The hashes of a request; with ``ahead``, of blocks whose hash covers so many tokens behind them too."""
    extras: list[Any] = []
    blocks = max(0, len(tokens) - ahead) // block_size
    for begin in range(0, blocks * block_size, block_size):
        end = begin + block_size
        keys = extra_keys(version, begin, end + ahead, **about)
        extras.append((keys, *tokens[end : end + ahead]) if ahead else keys)
    return vllm_hashes(tokens[: blocks * block_size], block_size, none_hash, extras)
