"""What an engine's keys are by each scheme, and what it makes of them."""

from __future__ import annotations

import numpy as np
import pytest

from kvortex.config import KVortexConfig
from kvortex.devices import Device
from kvortex.engine import KVortexEngine
from kvortex.errors import ArgumentError, ConfigError
from kvortex.keys import SCHEMES, VllmKeys, adopt
from tests.naive_keys import sha256_cbor, vllm_hashes
from tests.pages import PagedCache, assert_same

TOKENS = np.arange(64)


def seed_of(scheme: str) -> str | None:
    return None if scheme == "kvortex" else "0"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_blocks_are_found_again_by_every_scheme(device: Device, scheme: str) -> None:
    cache = PagedCache.plain(device)
    with cache.engine(key_scheme=scheme, key_seed=seed_of(scheme)) as engine:
        before = cache.randomize()
        keys = engine.block_keys(TOKENS)
        assert engine.save_blocks(keys, [3, 1, 4, 5]).wait().all()
        poisoned = cache.randomize()
        assert engine.check_blocks(keys).all()
        assert engine.check_blocks(list(map(bytes, keys))).all()
        assert engine.load_blocks(keys[1:3], [7, 8]).wait().all()
        assert_same(cache.memory(), cache.expected(poisoned, before, [(1, 7), (4, 8)]))
        others = engine.block_keys(TOKENS, salt="x"), engine.block_keys(TOKENS, lora="l=p"), engine.block_keys(TOKENS + 1)
        for other in others:
            assert not engine.check_blocks(other).any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_sequence_is_continued_by_every_scheme(device: Device, scheme: str) -> None:
    cache = PagedCache.plain(device)
    with cache.engine(key_scheme=scheme, key_seed=seed_of(scheme)) as engine:
        for about in ({}, {"lora": "l=p"}, {"salt": "x"}):
            whole = engine.block_keys(TOKENS, **about)
            assert np.array_equal(engine.block_keys(TOKENS[32:], whole[1], **about), whole[2:])
            sequence = engine.key_sequence(**about)
            assert np.array_equal(np.concatenate([sequence.extend(TOKENS[:37]), sequence.extend(TOKENS[37:])]), whole)


def test_vllms_hashes_are_keys_as_they_are(device: Device) -> None:
    """A block that vLLM has named is found by its tokens, and the other way round."""
    cache = PagedCache.plain(device)
    hashes = vllm_hashes(TOKENS.tolist(), 16, sha256_cbor("0"))
    with cache.engine(key_scheme="vllm", key_seed="0") as engine:
        assert engine.save_blocks(hashes[:2], [0, 1]).wait().all()
        assert engine.check_blocks(engine.block_keys(TOKENS)).tolist() == [True, True, False, False]
        with pytest.raises(ArgumentError, match=r"keys\[0\] and keys\[2\] are the same key"):
            engine.save_blocks([hashes[2], hashes[3], hashes[2]], [0, 1, 2])
        pictured = engine.block_keys(TOKENS, multimodal=[("image", 20, 3)])
        assert (pictured[0] == engine.block_keys(TOKENS)[0]).all() and not engine.check_blocks(pictured[1:]).any()


@pytest.mark.parametrize(
    "options", [{"model": "n"}, {"dtype": "f"}, {"rank": 1}, {"world_size": 3}, {"lora": "l=p"}, {"salt": "t"}], ids=str
)
def test_the_pool_has_them_in_its_own_namespace(device: Device, options: dict) -> None:
    """vLLM's hashes name content only; under what is stored, and shared by tiers, is what tells engines apart."""
    cache = PagedCache.plain(device)
    common = {"model": "m", "world_size": 2, "key_scheme": "vllm"}
    with cache.engine(**common) as one, cache.engine(**(common | options)) as other:
        hashes = one.block_keys(TOKENS, lora="", salt="")
        assert np.array_equal(hashes, other.block_keys(TOKENS, lora="", salt=""))
        assert not (one.scheme.stored(hashes) == other.scheme.stored(hashes)).all(axis=1).any()
        assert np.array_equal(one.scheme.stored(hashes), adopt(one.namespace, hashes))
        one.save_blocks(hashes, [0, 1, 2, 3]).wait()
        assert one._index.lookup(adopt(one.namespace, hashes)).all() and not one._index.lookup(hashes).any()


def test_an_engine_by_the_scheme_kvortex_takes_adopted_keys(device: Device) -> None:
    cache = PagedCache.plain(device)
    with cache.engine() as engine:
        keys = adopt(engine.namespace, VllmKeys(engine.namespace, seed="0").block_keys(TOKENS))
        engine.save_blocks(keys, [0, 1, 2, 3]).wait()
        assert engine.check_blocks(keys).all() and engine._index.lookup(keys).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_scheme": "vllm-0.15"}, "key_seed = None: vllm-0.15"),
        ({"key_scheme": "kvortex", "key_seed": "0"}, "key_seed = '0'"),
        ({"key_scheme": "vllm", "lora": "sql"}, "lora = 'sql'"),
    ],
)
def test_a_scheme_that_cannot_be_is_told_before_memory_is_taken(
    options: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvortex.engine.Parts", lambda *_: pytest.fail("took memory"))
    with pytest.raises(ConfigError, match=message):
        KVortexEngine.create(KVortexConfig(device="host", max_block_bytes=4096, **options))


def test_schemes_come_from_the_environment() -> None:
    config = KVortexConfig.from_env({"KVORTEX_KEY_SCHEME": "vllm-0.15", "KVORTEX_KEY_SEED": "0"})
    assert (config.key_scheme, config.key_seed) == ("vllm-0.15", "0")
