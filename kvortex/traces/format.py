"""Traces in the Mooncake format: one JSON object a line, whose block ids say what prompts have in common."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.errors import ArgumentError
from kvortex.keys import KEY_BYTES, KeyArray

BLOCK_TOKENS = 512  # of a block, where a line does not say it
_MAX_ID = 2**64 - 1


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in their order, one behind another in flat arrays.

    Attributes
    ----------
    ids : (n,) uint64
        Of the full blocks of all requests.
    starts : (r + 1,) int64
        Request ``i`` has ``ids[starts[i]:starts[i + 1]]``, all different, maybe none.
    stored : (r,) bool
        Which of them are no requests, but stored without being asked for: blocks that a model generated. They count in no rate.
    block_tokens
        Tokens of one block.
    dropped
        Calls that a recording lost because its writer fell behind; 0 for a whole trace.
    torn
        Whether the file ends within a line, as that of a process that was killed may; it is not in the trace.
    """

    ids: npt.NDArray[np.uint64]
    starts: npt.NDArray[np.int64]
    stored: npt.NDArray[np.bool_]
    block_tokens: int = BLOCK_TOKENS
    dropped: int = 0
    torn: bool = False

    def __len__(self) -> int:
        """Requests, and what was stored without one."""
        return len(self.starts) - 1

    @property
    def asked(self) -> int:
        """Requests."""
        return len(self) - int(self.stored.sum())

    @property
    def references(self) -> int:
        """Blocks that requests ask for, one counted as often as it is asked for."""
        return self.within(len(self.ids))

    @cached_property
    def keys(self) -> KeyArray:
        """(n, 32) uint8: a key for each id, different for different ids."""
        words = np.zeros((len(self.ids), KEY_BYTES // 8), np.uint64)
        words[:, 0] = self.ids
        return words.view(np.uint8)

    @cached_property
    def numbers(self) -> npt.NDArray[np.int64]:
        """(n,) int64: the ids, numbered from 0 without gaps."""
        _, numbers = np.unique(self.ids, return_inverse=True)
        return numbers.astype(np.int64).reshape(-1)

    @cached_property
    def distinct(self) -> int:
        """Different blocks."""
        return int(self.numbers.max()) + 1 if len(self.numbers) else 0

    @property
    def longest(self) -> int:
        """Blocks of the longest request."""
        return int(np.diff(self.starts).max(initial=0))

    def within(self, pool_blocks: int) -> int:
        """References that are left when each request is cut to its first ``pool_blocks`` blocks."""
        return int(np.minimum(np.diff(self.starts), pool_blocks)[~self.stored].sum())

    def requests(self) -> list[list[int]]:
        """The ids of each request, and of what was stored without one."""
        return [part.tolist() for part in np.split(self.ids, self.starts[1:-1])] if len(self) else []

    @classmethod
    def of(
        cls,
        requests: list[list[int]],
        block_tokens: int = BLOCK_TOKENS,
        dropped: int = 0,
        stored: Sequence[bool] | None = None,
    ) -> Trace:
        """From the ids of each request, which must all be different within it."""
        starts = np.zeros(len(requests) + 1, np.int64)
        np.cumsum([len(ids) for ids in requests], out=starts[1:])
        flags = np.zeros(len(requests), bool) if stored is None else np.array(stored, bool)
        return cls(np.array([one for ids in requests for one in ids], np.uint64), starts, flags, block_tokens, dropped)


def read_trace(path: str | os.PathLike[str], limit: int | None = None) -> Trace:
    """The full blocks of each request.

    Parameters
    ----------
    path
        JSON lines with ``timestamp`` (milliseconds), ``input_length`` and ``output_length`` (tokens) and ``hash_ids``,
        one for each 512 tokens of the prompt, or as many as ``block_size`` says, which kvortex writes into its own
        recordings. An id names a block and all that is before it. A line with ``"stored": true`` is no request: its blocks were
        stored without being asked for. One with ``dropped`` and without ``hash_ids`` only says how many calls are missing.
        Empty lines, and other fields, are passed over.
    limit
        Read this many requests at most, and what was stored before and between them; lines behind them are not looked at.

    Returns
    -------
    Trace
        Without the id of a last block that is not full, which a cache of full blocks does not hold.

    Raises
    ------
    ArgumentError
        The file cannot be read, or a line is no request, but for a last one that was cut off; the message names line and field.
    """
    requests: list[list[int]] = []
    stored: list[bool] = []
    block_tokens, dropped, torn = BLOCK_TOKENS, 0, False
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if limit is not None and len(requests) - sum(stored) >= limit:
                    break
                if not line.strip():
                    continue
                where = f"{os.fspath(path)}: line {number}"
                try:
                    record = _record(line, where)
                except ArgumentError:
                    torn = not line.endswith(b"\n") and number > 1  # the last one then
                    if not torn:
                        raise
                    break
                tokens = _block_tokens(record, where)
                if requests and tokens != block_tokens:
                    raise ArgumentError(f"{where}: blocks of {tokens} tokens, and of {block_tokens} before it; play them apart")
                block_tokens = tokens
                if "dropped" in record:
                    dropped += _number(record, "dropped", where, (int,))
                    if "hash_ids" not in record:  # the last line of a recording, which lost calls at its end
                        continue
                requests.append(_full_blocks(record, tokens, where))
                stored.append(_flag(record, "stored", where))
    except OSError as error:
        raise ArgumentError(f"{os.fspath(path)}: {error.strerror or error}") from None
    except ValueError as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(f"{os.fspath(path)!r}: {error}") from None  # a path with a NUL
    if all(stored):
        missing = f", and {dropped} calls are missing" if dropped else ""
        raise ArgumentError(f"{os.fspath(path)}: no requests in it{missing}")
    return replace(Trace.of(requests, block_tokens, dropped, stored), torn=torn)


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError too
        raise ArgumentError(f"{where}: no JSON: {error}") from None
    if not isinstance(record, dict):
        raise ArgumentError(f"{where}: must be a JSON object with hash_ids and so on; seen: {type(record).__name__}")
    return record


def _block_tokens(record: dict[str, Any], where: str) -> int:
    if "block_size" not in record:
        return BLOCK_TOKENS
    tokens = _number(record, "block_size", where, (int,))
    if not tokens:
        raise ArgumentError(f"{where}: block_size must be at least 1; seen: 0")
    return int(tokens)


def _full_blocks(record: dict[str, Any], block_tokens: int, where: str) -> list[int]:
    _number(record, "timestamp", where, (int, float))
    tokens = _number(record, "input_length", where, (int,))
    _number(record, "output_length", where, (int,))
    ids = _field(record, "hash_ids", where)
    if not isinstance(ids, list):
        raise ArgumentError(f"{where}: hash_ids must be a list of integers; seen: {_short(ids)}")
    for place, one in enumerate(ids):
        if type(one) is not int or not 0 <= one <= _MAX_ID:
            raise ArgumentError(f"{where}: hash_ids[{place}] must be an integer from 0 to {_MAX_ID}; seen: {_short(one)}")
    full = tokens // block_tokens
    needed = -(-tokens // block_tokens)
    if not full <= len(ids) <= needed:
        raise ArgumentError(
            f"{where}: hash_ids has {len(ids)} ids, and input_length = {_short(tokens)} needs {_short(needed)}, "
            f"one for each {block_tokens} tokens"
        )
    if len(set(ids)) != len(ids):
        first, second = _twice(ids)
        raise ArgumentError(
            f"{where}: hash_ids[{first}] and hash_ids[{second}] are both {ids[first]}; an id names a block and all "
            "that is before it, so none comes twice in a request"
        )
    return ids[:full]


def _twice(ids: list[int]) -> tuple[int, int]:
    """Two places of the same id."""
    seen: dict[int, int] = {}
    for place, one in enumerate(ids):
        if one in seen:
            return seen[one], place
        seen[one] = place
    raise AssertionError("all ids are different")


def _number(record: dict[str, Any], name: str, where: str, kinds: tuple[type, ...]) -> Any:
    value = _field(record, name, where)
    if type(value) not in kinds or not 0 <= value < float("inf"):  # a bool is an int, and no length
        kind = "an integer" if kinds == (int,) else "a number"
        raise ArgumentError(f"{where}: {name} must be {kind} of at least 0; seen: {_short(value)}")
    return value


def _flag(record: dict[str, Any], name: str, where: str) -> bool:
    value = record.get(name, False)
    if type(value) is not bool:
        raise ArgumentError(f"{where}: {name} must be true or false; seen: {_short(value)}")
    return value


def _field(record: dict[str, Any], name: str, where: str) -> Any:
    if name not in record:
        raise ArgumentError(f"{where}: {name} is missing")
    return record[name]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
