"""``kvortex calibrate --tables``: what codecs learn from a sample of a model's KV, as a file for ``codec_tables``."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import numpy as np

from kvortex.cli import console
from kvortex.codecs import CODECS, RecordShape, Tables, calibrate, make_codec
from kvortex.codecs.base import Bytes
from kvortex.codecs.samples import read_sample, records_of
from kvortex.errors import ArgumentError, CodecError, shown

_ENOUGH_TOKENS = 1500  # for means, from which codecs with loss profit
_SHOWN = [name for name in CODECS if name not in ("raw", "cachegen")]  # what an engine takes
_MOST_TRIED = 64  # blocks that are coded to say how long they become


def run(arguments: argparse.Namespace) -> int:
    """The command. 0.

    Raises
    ------
    KVortexError
        The sample is none, or the file cannot be written.
    """
    if not arguments.sample or not arguments.tables:
        raise ArgumentError("--tables names a file to write, and needs --sample: files of numpy.save with the model's KV")
    if os.path.realpath(arguments.tables) in map(os.path.realpath, arguments.sample):
        raise ArgumentError(f"--tables {shown(arguments.tables)} is a file of --sample: name another, or the sample is lost")
    parts, shape = [], None
    for path in arguments.sample:
        records, seen = records_of(read_sample(path), arguments.order, arguments.block_size, arguments.skip)
        if shape is not None and seen != shape:
            raise CodecError(f"{path} is of other records than {arguments.sample[0]}: {seen} beside {shape}")
        parts.append(records)
        shape = seen
    assert shape is not None
    records = np.concatenate(parts)
    tables = calibrate(records, shape)
    tables.save(arguments.tables, shape)
    tokens = len(records) * shape.tokens
    if tokens < _ENOUGH_TOKENS:
        console.note(f"kvortex: learnt from {tokens} tokens, which do for plane; for codecs with loss take {_ENOUGH_TOKENS} or "
                     "more, of several texts")
    facts = {"file": arguments.tables, "digest": tables.digest.hex(), "tokens": tokens, **_described(shape)}
    codecs = {name: _codec(name, shape, tables, records) for name in _SHOWN}
    if arguments.json:
        print(json.dumps({**facts, "codecs": codecs}, indent=2))
        return 0
    console.table("tables", [(name, str(value)) for name, value in facts.items()])
    console.table("codecs", [(name, _line(found)) for name, found in codecs.items()])
    return 0


def _described(shape: RecordShape) -> dict[str, Any]:
    names = ("layers", "heads", "head_dim", "order", "parts")
    return {"block_size": shape.tokens, **{name: getattr(shape, name) for name in names}, "block_bytes": shape.raw_bytes}


def _codec(name: str, shape: RecordShape, tables: Tables, records: Bytes) -> dict[str, Any]:
    """What a codec makes of blocks of the sample; or why it cannot."""
    try:
        codec = make_codec(name, shape, tables)
    except CodecError as error:
        return {"refused": str(error)}
    some = records[np.linspace(0, len(records) - 1, min(len(records), _MOST_TRIED)).astype(np.int64)]
    sizes = codec.encode_into(some, np.zeros((len(some), codec.slot_bytes), np.uint8))
    ratio = shape.raw_bytes / float(np.abs(sizes).mean())
    return {"slot_bytes": codec.slot_bytes, "ratio": ratio, "tried": len(some), "too_long": int((sizes < 0).sum())}


def _line(found: dict[str, Any]) -> str:
    if "refused" in found:
        return str(found["refused"])
    line = f"a slot of {console.amount(found['slot_bytes'])}; records x{found['ratio']:.2f} shorter"
    return line + (f"; {found['too_long']} of {found['tried']} do not fit" if found["too_long"] else "")
