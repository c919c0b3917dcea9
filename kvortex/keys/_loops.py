"""All blocks of a sequence in one call without the GIL, in each of the ways in which blocks are named."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvortex.errors import KVortexError
from kvortex.jit import njit
from kvortex.keys._cbor import ARRAY, BYTES, LONGEST_HEAD, NULL, UNSIGNED, copy, write_head, write_integer
from kvortex.keys._sha256 import PADDING, Bytes, State, compress, digest, digest_in_place, start, write_padding, write_state

Tokens = npt.NDArray[np.int64]
Spans = npt.NDArray[np.int64]
KEY = 32
LORA, SALT, EMBEDS, FIRST_INPUT = range(4)  # parts of a Content's text; from FIRST_INPUT on its inputs
# Functions are compiled anew for each literal that they are called with.
_ZERO, _TRIPLE, _KEY = np.int64(0), np.int64(3), np.int64(KEY)


class Content(NamedTuple):
    """What a vLLM request has beside its tokens.

    ``text`` (bytes,) uint8 holds pieces of CBOR one behind another, and ``ends`` (parts,) int64 where each ends: the whole
    extra key of the LoRA and of the salt, what stands before the embeddings and before an input's offset. ``spans``
    (inputs, 2) int64 has the first token and the number of tokens of each multimodal input, ``embeds`` (tokens, bytes)
    uint8 the prompt's embeddings. What is empty is not there.
    """

    text: Bytes
    ends: npt.NDArray[np.int64]
    spans: npt.NDArray[np.int64]
    embeds: Bytes


class Rules(NamedTuple):
    """What else differs between versions of vLLM."""

    offsets: bool  # an input's offset is hashed too
    digests: bool  # of embeddings, their digest
    late: int  # tokens for which an input counts behind its end
    ahead: int  # tokens behind a block that its hash covers too


@njit(nogil=True)
def extremes(tokens: Tokens) -> tuple[int, int]:
    """The smallest and the largest, and 0 among them."""
    low = high = 0
    for token in tokens:
        low = min(low, token)
        high = max(high, token)
    return low, high


@njit(nogil=True)
def hash_chain(tokens: Tokens, block_size: int, parent: Bytes, out: Bytes, hardware: bool) -> None:
    """``out[i] = SHA-256(out[i - 1] || block i as little-endian uint32)`` for as many blocks as ``out`` (n, 32) has rows."""
    length = KEY + 4 * block_size
    buffer, state, keys = np.empty(length + PADDING, np.uint8), np.empty(8, np.uint32), out.reshape(-1)
    words = buffer[KEY:length].view(np.uint32)
    blocks = write_padding(buffer, _ZERO, length, length)
    write_bytes(buffer, _ZERO, parent)
    for row in range(len(out)):
        for t in range(block_size):
            words[t] = tokens[row * block_size + t]
        start(state)
        compress(state, buffer, _ZERO, blocks, hardware)
        write_state(state, buffer, _ZERO)
        write_state(state, keys, KEY * row)


@njit(nogil=True)
def hash_rows(prefix: Bytes, rows: Bytes, out: Bytes, hardware: bool) -> None:
    """``out[i] = SHA-256(prefix || rows[i])``."""
    first, length = len(prefix), len(prefix) + rows.shape[1]
    buffer, state, keys = np.empty(length + PADDING, np.uint8), np.empty(8, np.uint32), out.reshape(-1)
    blocks = write_padding(buffer, _ZERO, length, length)
    write_bytes(buffer, _ZERO, prefix)
    for row in range(len(rows)):
        for k in range(rows.shape[1]):
            buffer[first + k] = rows[row, k]
        start(state)
        compress(state, buffer, _ZERO, blocks, hardware)
        write_state(state, keys, KEY * row)


@njit(nogil=True)
def hash_alike(
    tokens: Tokens, block_size: int, parent: Bytes, extras: Bytes, split: int, ahead: int, out: Bytes, hardware: bool
) -> None:
    """``out[i] = SHA-256(CBOR((out[i - 1], block i, extra keys)))`` for as many blocks as ``out`` (n, 32) has rows.

    The extra keys are given as CBOR: ``extras[:split]`` those of the first block here, ``extras[split:]`` of all others.
    """
    # Two arrays of them would be counted references, in every turn of the loop.
    room = KEY + LONGEST_HEAD * (block_size + ahead + 6) + len(extras)
    buffer, state, keys = np.empty(room + PADDING, np.uint8), np.empty(8, np.uint32), out.reshape(-1)
    head = write_parent(buffer, parent)
    require(buffer, head + KEY, LONGEST_HEAD * (block_size + ahead + 2) + max(split, len(extras) - split))
    for row in range(len(out)):
        first, behind = row * block_size, (row + 1) * block_size
        at = write_tokens(buffer, write_head(buffer, head + KEY, ARRAY, block_size), tokens, first, behind)
        if ahead:
            at = write_head(buffer, at, ARRAY, 1 + ahead)
        begin, end = (split, len(extras)) if row else (_ZERO, split)
        copy(buffer, at, extras, begin, end)
        at += end - begin
        if ahead:
            at = write_tokens(buffer, at, tokens, behind, behind + ahead)
        digest_in_place(buffer, _ZERO, at, state, keys, KEY * row, hardware)
        write_state(state, buffer, head)


@njit(nogil=True)
def hash_placed(
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
    """As :func:`hash_alike`, with extra keys that depend on a block's place.

    ``begin`` is the place of ``tokens[0]`` in its sequence, a multiple of ``block_size``; ``room`` the bytes that the
    CBOR of a block may take. KVortexError for a block that takes more.
    """
    buffer, scratch = np.empty(room + PADDING, np.uint8), np.empty(128, np.uint8)
    state, keys, place = np.empty(8, np.uint32), out.reshape(-1), _ZERO
    require(buffer, _ZERO, KEY + LONGEST_HEAD * (block_size + 4))
    head = write_parent(buffer, parent)
    if len(content.spans):  # behind the last one nothing changes any more
        for first in range(0, min(begin, content.spans[-1, 0] + content.spans[-1, 1] + rules.late), block_size):
            place = behind_inputs(content.spans, rules, first, first + block_size, place)
    for row in range(len(out)):
        first, behind = row * block_size, (row + 1) * block_size
        at = write_tokens(buffer, write_head(buffer, head + KEY, ARRAY, block_size), tokens, first, behind)
        if rules.ahead:
            at = write_head(buffer, at, ARRAY, 1 + rules.ahead)
        limit = begin + behind + rules.ahead
        at = write_extra_keys(buffer, at, content, rules, begin + first, limit, place, scratch, state, hardware)
        require(buffer, at, LONGEST_HEAD * rules.ahead)
        at = write_tokens(buffer, at, tokens, behind, behind + rules.ahead)
        digest_in_place(buffer, _ZERO, at, state, keys, KEY * row, hardware)
        write_state(state, buffer, head)
        place = behind_inputs(content.spans, rules, begin + first, begin + behind, place)


@njit(nogil=True)
def require(buffer: Bytes, at: int, count: int) -> None:
    """Raises rather than let ``count`` bytes at ``at``, and what a message ends in behind them, leave the buffer.

    A head or an offset between two of these calls needs none of its own: ``PADDING`` is more than they take.
    """
    if at + count + PADDING > len(buffer):
        raise KVortexError("a block's message is longer than the buffer made for it: a defect of kvortex, please report it")


@njit(nogil=True)
def write_parent(buffer: Bytes, parent: Bytes) -> int:
    """The beginning of a block's CBOR, up to the hash of the block before; gives the place of that hash."""
    head = write_head(buffer, write_head(buffer, _ZERO, ARRAY, _TRIPLE), BYTES, _KEY)
    write_bytes(buffer, head, parent)
    return head  # type: ignore[no-any-return,unused-ignore]


@njit(nogil=True)
def write_bytes(buffer: Bytes, at: int, data: Bytes) -> int:
    """All of ``data``, as it is."""
    copy(buffer, at, data, _ZERO, len(data))
    return at + len(data)


@njit(nogil=True)
def write_tokens(buffer: Bytes, at: int, tokens: Tokens, begin: int, end: int) -> int:
    """``tokens[begin:end]``, without the head of an array."""
    for t in range(begin, end):
        at = write_head(buffer, at, UNSIGNED, tokens[t])
    return at


@njit(nogil=True)
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
    has_lora, has_embeds = content.ends[LORA] > 0, content.embeds.size > 0
    has_salt = begin == 0 and content.ends[SALT] > content.ends[LORA]
    inputs, _ = count_inputs(content.spans, rules.late, begin, end, place)
    count = has_lora + inputs + has_salt + has_embeds
    if not count:
        buffer[at] = NULL
        return at + 1
    at = write_part(buffer, write_head(buffer, at, ARRAY, count), content, LORA)
    while inputs:
        if begin < content.spans[place, 0] + content.spans[place, 1] + rules.late:
            at = write_part(buffer, at, content, FIRST_INPUT + place)
            if rules.offsets:
                at = write_integer(buffer, at, content.spans[place, 0] - begin)
            inputs -= 1
        place += 1
    if has_salt:
        at = write_part(buffer, at, content, SALT)
    if has_embeds:
        at = write_part(buffer, at, content, EMBEDS)
        at = write_embeds(buffer, at, content.embeds, rules, begin, end, scratch, state, hardware)
    return at


@njit(nogil=True)
def behind_inputs(spans: Spans, rules: Rules, begin: int, end: int, place: int) -> int:
    """The first input that may count for the block behind ``begin`` to ``end``, if ``place`` is that for this one."""
    _, place = count_inputs(spans, rules.late, begin, end + rules.ahead, place)
    while rules.ahead and place > 0 and spans[place - 1, 0] + spans[place - 1, 1] > end:
        place -= 1
    return place


@njit(nogil=True)
def count_inputs(spans: Spans, late: int, begin: int, end: int, place: int) -> tuple[int, int]:
    """Multimodal inputs of the block from ``begin`` to ``end``, ``place`` and later ones, and the first that is left behind it.

    Goes through them as vLLM does, which matters where one lies inside another.
    """
    last, count = len(spans) - 1, 0
    if last < 0 or begin >= spans[last, 0] + spans[last, 1] + late:
        return 0, place
    while place <= last and spans[place, 0] < end:
        behind = spans[place, 0] + spans[place, 1]
        if begin < behind + late:
            count += 1
            if end < behind:
                break
        place += 1
    return count, place


@njit(nogil=True)
def write_embeds(
    buffer: Bytes, at: int, embeds: Bytes, rules: Rules, begin: int, end: int, scratch: Bytes, state: State, hardware: bool
) -> int:
    """The embeddings of tokens ``begin`` to ``end``, as far as the prompt goes, or their digest."""
    rows, width = embeds.shape
    data, first, last = embeds.reshape(-1), min(begin, rows) * width, min(end, rows) * width
    length = KEY if rules.digests else last - first
    require(buffer, at, LONGEST_HEAD + length)
    at = write_head(buffer, at, BYTES, length)
    if rules.digests:
        digest(data, first, last - first, scratch, state, buffer, at, hardware)
    else:
        copy(buffer, at, data, first, last)
    return at + length


@njit(nogil=True)
def write_part(buffer: Bytes, at: int, content: Content, part: int) -> int:
    """One piece of a Content's text."""
    begin = content.ends[part - 1] if part else 0
    require(buffer, at, content.ends[part] - begin)
    copy(buffer, at, content.text, begin, content.ends[part])
    return at + content.ends[part] - begin  # type: ignore[no-any-return,unused-ignore]


def bytes_of(data: bytes) -> Any:
    """Bytes as an array of the one kind that the functions above are compiled for: it can be written."""
    return np.frombuffer(bytearray(data), np.uint8)
