"""Foreign hashes in a namespace."""

from __future__ import annotations

import dataclasses
import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvortex.errors import ArgumentError
from kvortex.keys import KEY_BYTES, Namespace, VllmKeys, _sha_ni, adopt, block_keys

NAMESPACE = Namespace(model="m", dtype="bfloat16", layout=b"\x01\x02", block_size=4, rank=1, world_size=2, lora="a", salt="s")
OTHERS = {"model": "n", "dtype": "f", "layout": b"\x01", "block_size": 8, "rank": 0, "world_size": 3, "lora": "", "salt": "t"}


def adopted(namespace: Namespace, name: bytes) -> bytes:
    """The definition, restated."""
    fields = [b"kvortex-adopted-keys-1"]
    for field in dataclasses.fields(namespace):
        value = getattr(namespace, field.name)
        fields.append(value if isinstance(value, bytes) else str(value).encode())
    seed = hashlib.sha256(b"".join(struct.pack("<Q", len(part)) + part for part in fields)).digest()
    return hashlib.sha256(seed + name).digest()


@given(st.integers(1, 100).flatmap(lambda width: st.lists(st.binary(min_size=width, max_size=width), max_size=12)))
def test_names_of_any_length(names: list[bytes]) -> None:
    keys = adopt(NAMESPACE, names)
    assert keys.shape == (len(names), KEY_BYTES) and keys.flags.writeable and keys.flags.c_contiguous
    assert [key.tobytes() for key in keys] == [adopted(NAMESPACE, name) for name in names]
    if names:
        array = np.frombuffer(b"".join(names), np.uint8).reshape(len(names), -1)
        assert np.array_equal(adopt(NAMESPACE, array), keys)
        assert np.array_equal(adopt(NAMESPACE, np.repeat(array, 2, axis=0)[::2]), keys)


def test_both_ways_of_hashing_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = np.random.default_rng(0).integers(0, 256, (500, 32), np.uint8)
    keys = adopt(NAMESPACE, hashes)
    monkeypatch.setattr(_sha_ni, "available", lambda: False)
    assert np.array_equal(adopt(NAMESPACE, hashes), keys)


def test_these_bytes_for_ever() -> None:
    """Keys outlive the process in lower tiers."""
    assert adopt(NAMESPACE, [bytes(32)]).tobytes().hex() == "78cb7e138d00077e139cff40c9bd62ffbfde28916c2d8b742fe54d7572ee5080"


def test_namespaces_that_differ_in_one_field_share_no_key() -> None:
    assert set(OTHERS) == {field.name for field in dataclasses.fields(Namespace)}
    namespaces = [NAMESPACE, *(dataclasses.replace(NAMESPACE, **{name: value}) for name, value in OTHERS.items())]
    hashes = VllmKeys(NAMESPACE, seed="0", version="vllm-0.15").block_keys(range(64))
    seen = {key.tobytes() for namespace in namespaces for key in adopt(namespace, hashes)}
    assert len(seen) == len(namespaces) * len(hashes)


def test_no_key_of_a_chain_is_an_adopted_one() -> None:
    """A block of 8 tokens is 32 bytes, as a hash is; only the seed tells one message from the other."""
    namespace = dataclasses.replace(NAMESPACE, block_size=8)
    tokens = np.arange(8, dtype=np.uint32)
    assert not np.array_equal(block_keys(namespace, tokens), adopt(namespace, tokens.view(np.uint8).reshape(1, 32)))


@pytest.mark.parametrize(
    ("hashes", "seen"),
    [
        ([b"x" * 32, b"x" * 31], r"hashes\[1\] must be bytes of length 32; seen: bytes of length 31"),
        ([b"x", "y"], r"hashes\[1\].*str"),
        ([b""], r"hashes\[0\].*length 0"),
        ([7], r"hashes\[0\].*int"),
        (b"x" * 32, "hashes must be an .* sequence of bytes of one length; seen: one bytes"),
        (np.zeros((2, 0), np.uint8), r"shape \(2, 0\)"),
        (np.zeros(32, np.uint8), r"shape \(32,\)"),
        (np.zeros((1, 4), np.uint64), "uint64"),
        (np.ma.zeros((1, 32), np.uint8), "masked"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_hash(hashes: object, seen: str) -> None:
    with pytest.raises(ArgumentError, match=seen):
        adopt(NAMESPACE, hashes)
