"""All blocks of a sequence in one call without the GIL, in each of the ways in which blocks are named."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from kvortex.keys._cbor import ARRAY, BYTES, NULL, TEXT, UNSIGNED, write_head, write_integer, write_string
from kvortex.keys._sha256 import PADDING, Bytes, State, compress, digest, digest_in_place, start, write_padding, write_state

Tokens = npt.NDArray[np.int64]
KEY = 32
# Parts of a Content's text; from FIRST_INPUT on the identifiers of its inputs.
LORA_TAG, INPUT_TAG, SALT_TAG, EMBEDS_TAG, LORA, LORA_PATH, SALT, FIRST_INPUT = range(8)


class Content(NamedTuple):
    """What a vLLM request has beside its tokens.

    ``text`` (bytes,) uint8 holds UTF-8 strings one behind another, ``ends`` (parts,) int64 where each ends, ``spans``
    (inputs, 2) int64 the first token and the number of tokens of each multimodal input, ``embeds`` (tokens, bytes)
    uint8 the prompt's embeddings. What is empty is not there.
    """

    text: Bytes
    ends: npt.NDArray[np.int64]
    spans: npt.NDArray[np.int64]
    embeds: Bytes


class Rules(NamedTuple):
    """How a version of vLLM writes them; see :mod:`kvortex.keys.vllm`."""

    tagged: bool
    offsets: bool
    digests: bool
    late: int  # tokens for which an input counts behind its end
    ahead: int  # tokens behind a block that its hash covers too


@njit(nogil=True, cache=True)
def extremes(tokens: Tokens) -> tuple[int, int]:
    """The smallest and the largest, and 0 among them."""
    low = high = 0
    for token in tokens:
        low = min(low, token)
        high = max(high, token)
    return low, high


@njit(nogil=True, cache=True)
def hash_chain(tokens: Tokens, block_size: int, parent: Bytes, out: Bytes, hardware: bool) -> None:
    """``out[i] = SHA-256(out[i - 1] || block i as little-endian uint32)`` for as many blocks as ``out`` (n, 32) has rows."""
    length = KEY + 4 * block_size
    buffer, state, keys = np.empty(length + PADDING, np.uint8), np.empty(8, np.uint32), out.reshape(-1)
    words = buffer[KEY:length].view(np.uint32)
    blocks = write_padding(buffer, 0, length, length)
    buffer[:KEY] = parent
    for row in range(len(out)):
        for t in range(block_size):
            words[t] = tokens[row * block_size + t]
        start(state)
        compress(state, buffer, 0, blocks, hardware)
        write_state(state, buffer, 0)
        write_state(state, keys, KEY * row)


@njit(nogil=True, cache=True)
def hash_rows(prefix: Bytes, rows: Bytes, out: Bytes, hardware: bool) -> None:
    """``out[i] = SHA-256(prefix || rows[i])``."""
    first, length = len(prefix), len(prefix) + rows.shape[1]
    buffer, state, keys = np.empty(length + PADDING, np.uint8), np.empty(8, np.uint32), out.reshape(-1)
    blocks = write_padding(buffer, 0, length, length)
    buffer[:first] = prefix
    for row in range(len(rows)):
        for k in range(rows.shape[1]):
            buffer[first + k] = rows[row, k]
        start(state)
        compress(state, buffer, 0, blocks, hardware)
        write_state(state, keys, KEY * row)


@njit(nogil=True, cache=True)
def hash_text(text: Bytes, out: Bytes, hardware: bool) -> None:
    """SHA-256 of the CBOR of a string, given as UTF-8."""
    buffer = np.empty(len(text) + 16 + PADDING, np.uint8)
    end = write_string(buffer, 0, TEXT, text, 0, len(text))
    digest_in_place(buffer, 0, end, np.empty(8, np.uint32), out, 0, hardware)


@njit(nogil=True, cache=True)
def hash_vllm(
    tokens: Tokens,
    begin: int,
    block_size: int,
    parent: Bytes,
    content: Content,
    rules: Rules,
    room: int,
    out: Bytes,
    hardware: bool,
) -> None:
    """``out[i] = SHA-256(CBOR((out[i - 1], block i, extra keys)))`` for as many blocks as ``out`` (n, 32) has rows.

    ``begin`` is the place of ``tokens[0]`` in its sequence, a multiple of ``block_size``; ``room`` the bytes that the
    CBOR of a block may take.
    """
    buffer, scratch, extra = np.empty(room + PADDING, np.uint8), np.empty(128, np.uint8), np.empty(room, np.uint8)
    state, keys = np.empty(8, np.uint32), out.reshape(-1)
    head = write_head(buffer, write_head(buffer, 0, ARRAY, 3), BYTES, KEY)
    buffer[head : head + KEY] = parent
    same, known, place = not len(content.spans) and not content.embeds.size, 0, 0
    for first in range(0, begin, block_size):
        place = behind_inputs(content, rules, first, first + block_size, place)
    for row in range(len(out)):
        first, behind = row * block_size, (row + 1) * block_size
        at = write_tokens(buffer, write_head(buffer, head + KEY, ARRAY, block_size), tokens, first, behind)
        if rules.ahead:
            at = write_head(buffer, at, ARRAY, 1 + rules.ahead)
        for k in range(known):
            buffer[at + k] = extra[k]
        at += known
        if not known:
            limit, before = begin + behind + rules.ahead, at
            at = write_extra_keys(buffer, at, content, rules, begin + first, limit, place, scratch, state, hardware)
            if same and begin + first:  # all blocks behind the first, with its salt, have the same
                known = at - before
                extra[:known] = buffer[before:at]
        at = write_tokens(buffer, at, tokens, behind, behind + rules.ahead)
        digest_in_place(buffer, 0, at, state, keys, KEY * row, hardware)
        write_state(state, buffer, head)
        if not same:
            place = behind_inputs(content, rules, begin + first, begin + behind, place)


@njit(nogil=True, cache=True)
def write_tokens(buffer: Bytes, at: int, tokens: Tokens, begin: int, end: int) -> int:
    """``tokens[begin:end]``, without the head of an array."""
    for t in range(begin, end):
        at = write_head(buffer, at, UNSIGNED, tokens[t])
    return at


@njit(nogil=True, cache=True)
def behind_inputs(content: Content, rules: Rules, begin: int, end: int, place: int) -> int:
    """The first input that may count for the block behind ``begin`` to ``end``, if ``place`` is that for this one."""
    if not len(content.spans):
        return place
    _, _, place = write_inputs(content.text, 0, content, rules, begin, end + rules.ahead, place, False)
    while rules.ahead and place > 0 and content.spans[place - 1, 0] + content.spans[place - 1, 1] > end:
        place -= 1
    return place


@njit(nogil=True, cache=True)
def write_extra_keys(
    buffer: Bytes,
    at: int,
    content: Content,
    rules: Rules,
    begin: int,
    end: int,
    place: int,
    scratch: Bytes,
    state: State,
    hardware: bool,
) -> int:
    """The extra keys of the block from token ``begin`` to ``end``, or null where it has none."""
    has_lora, has_embeds = content.ends[LORA] > content.ends[LORA - 1], content.embeds.shape[1] > 0
    has_salt = begin == 0 and content.ends[SALT] > content.ends[SALT - 1]
    _, inputs, _ = write_inputs(buffer, at, content, rules, begin, end, place, False)
    count = has_lora + inputs + has_salt + has_embeds
    if not count:
        buffer[at] = NULL
        return at + 1
    at = write_head(buffer, at, ARRAY, count)
    if has_lora:
        if rules.tagged:
            at = write_part(buffer, write_head(buffer, at, ARRAY, 3), content, LORA_TAG)
        at = write_part(buffer, at, content, LORA)
        if rules.tagged:
            at = write_part(buffer, at, content, LORA_PATH)
    at, _, _ = write_inputs(buffer, at, content, rules, begin, end, place, True)
    if has_salt:
        if rules.tagged:
            at = write_part(buffer, write_head(buffer, at, ARRAY, 2), content, SALT_TAG)
        at = write_part(buffer, at, content, SALT)
    if has_embeds:
        if rules.tagged:
            at = write_part(buffer, write_head(buffer, at, ARRAY, 2), content, EMBEDS_TAG)
        at = write_embeds(buffer, at, content.embeds, rules, begin, end, scratch, state, hardware)
    return at


@njit(nogil=True, cache=True)
def write_inputs(
    buffer: Bytes, at: int, content: Content, rules: Rules, begin: int, end: int, place: int, writing: bool
) -> tuple[int, int, int]:
    """The multimodal inputs of a block; the place behind, how many they are, and the first one that is left.

    Goes through them as vLLM does, which matters where one lies inside another.
    """
    spans, count = content.spans, 0
    last = len(spans) - 1
    if last < 0 or begin >= spans[last, 0] + spans[last, 1] + rules.late:
        return at, 0, place
    while place <= last and spans[place, 0] < end:
        behind = spans[place, 0] + spans[place, 1]
        if begin < behind + rules.late:
            count += 1
            if writing:
                at = write_input(buffer, at, content, rules, begin, place)
            if end < behind:
                break
        place += 1
    return at, count, place


@njit(nogil=True, cache=True)
def write_input(buffer: Bytes, at: int, content: Content, rules: Rules, begin: int, place: int) -> int:
    """One multimodal input, as seen from the block that begins at token ``begin``."""
    if rules.tagged:
        at = write_part(buffer, write_head(buffer, at, ARRAY, 3), content, INPUT_TAG)
    elif rules.offsets:
        at = write_head(buffer, at, ARRAY, 2)
    at = write_part(buffer, at, content, FIRST_INPUT + place)
    return write_integer(buffer, at, content.spans[place, 0] - begin) if rules.offsets else at


@njit(nogil=True, cache=True)
def write_embeds(
    buffer: Bytes, at: int, embeds: Bytes, rules: Rules, begin: int, end: int, scratch: Bytes, state: State, hardware: bool
) -> int:
    """The embeddings of tokens ``begin`` to ``end``, as far as the prompt goes, or their digest."""
    rows, width = embeds.shape
    data, first, last = embeds.reshape(-1), min(begin, rows) * width, min(end, rows) * width
    if not rules.digests:
        return write_string(buffer, at, BYTES, data, first, last)  # type: ignore[no-any-return,unused-ignore]
    at = write_head(buffer, at, BYTES, KEY)
    digest(data, first, last - first, scratch, state, buffer, at, hardware)
    return at + KEY


@njit(nogil=True, cache=True)
def write_part(buffer: Bytes, at: int, content: Content, part: int) -> int:
    """One string of a Content's text."""
    begin = content.ends[part - 1] if part else 0
    return write_string(buffer, at, TEXT, content.text, begin, content.ends[part])  # type: ignore[no-any-return,unused-ignore]


def bytes_of(data: bytes) -> Any:
    """Bytes as an array of the one kind that the functions above are compiled for: it can be written."""
    return np.frombuffer(bytearray(data), np.uint8)
