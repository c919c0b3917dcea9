"""Traces in the Mooncake format: one JSON object a line, whose block ids say what prompts have in common."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.errors import ArgumentError

BLOCK_TOKENS = 512
_MAX_ID = 2**64 - 1


def read_trace(path: str | os.PathLike[str], limit: int | None = None) -> list[list[int]]:
    """The ids of each request's full blocks.

    Parameters
    ----------
    path
        JSON lines with ``timestamp`` (milliseconds), ``input_length`` and ``output_length`` (tokens) and ``hash_ids``,
        one for each 512 tokens of the prompt. An id names a block and all that is before it. Empty lines, and other
        fields, are passed over.
    limit
        Read this many requests at most; lines behind them are not looked at.

    Returns
    -------
    list of list of int
        Without the id of a last block that is not full, which a cache of full blocks does not hold.

    Raises
    ------
    ArgumentError
        The file cannot be read, or a line is no request; the message names line and field.
    """
    requests: list[list[int]] = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if limit is not None and len(requests) >= limit:
                    break
                if line.strip():
                    requests.append(_full_blocks(line, f"{os.fspath(path)}: line {number}"))
    except OSError as error:
        raise ArgumentError(f"{os.fspath(path)}: {error.strerror or error}") from None
    if not requests:
        raise ArgumentError(f"{os.fspath(path)}: no requests in it")
    return requests


def _full_blocks(line: bytes, where: str) -> list[int]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError too
        raise ArgumentError(f"{where}: no JSON: {error}") from None
    if not isinstance(record, dict):
        raise ArgumentError(f"{where}: must be a JSON object with hash_ids and so on; seen: {type(record).__name__}")
    _number(record, "timestamp", where, (int, float))
    tokens = _number(record, "input_length", where, (int,))
    _number(record, "output_length", where, (int,))
    ids = _field(record, "hash_ids", where)
    if not isinstance(ids, list):
        raise ArgumentError(f"{where}: hash_ids must be a list of integers; seen: {_short(ids)}")
    for place, one in enumerate(ids):
        if type(one) is not int or not 0 <= one <= _MAX_ID:
            raise ArgumentError(f"{where}: hash_ids[{place}] must be an integer from 0 to {_MAX_ID}; seen: {_short(one)}")
    full = tokens // BLOCK_TOKENS
    needed = -(-tokens // BLOCK_TOKENS)
    if not full <= len(ids) <= needed:
        raise ArgumentError(
            f"{where}: hash_ids has {len(ids)} ids, and input_length = {_short(tokens)} needs {_short(needed)}, "
            f"one for each {BLOCK_TOKENS} tokens"
        )
    return ids[:full]


def _number(record: dict[str, Any], name: str, where: str, kinds: tuple[type, ...]) -> Any:
    value = _field(record, name, where)
    if type(value) not in kinds or not 0 <= value < float("inf"):  # a bool is an int, and no length
        kind = "an integer" if kinds == (int,) else "a number"
        raise ArgumentError(f"{where}: {name} must be {kind} of at least 0; seen: {_short(value)}")
    return value


def _field(record: dict[str, Any], name: str, where: str) -> Any:
    if name not in record:
        raise ArgumentError(f"{where}: {name} is missing")
    return record[name]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def tokens_of(ids: list[int]) -> npt.NDArray[np.uint32]:
    """Tokens of blocks: all the same for the same id, and different ones for different ids; (512 n,)."""
    tokens = np.zeros((len(ids), BLOCK_TOKENS), "<u4")
    tokens[:, :2] = np.array(ids, "<u8").view("<u4").reshape(-1, 2)
    return tokens.reshape(-1)
