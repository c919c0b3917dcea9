"""What vLLM calls of a secondary tier, without vLLM: its jobs become kvortex's, and back; options are refused by name."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvortex.errors import ConfigError
from tests.integrations.vllm import fakes

CHUNKS, NBYTES = 8, 4096


@dataclasses.dataclass
class Cache:
    tokens_per_hash: int = 4
    blocks_per_chunk: int = 1


@dataclasses.dataclass
class Parallel:
    rank: int = 0
    world_size: int = 2
    data_parallel_index: int = 0


def spec(**more: Any) -> Any:
    config = dict(
        groups=(SimpleNamespace(tokens_per_block=4, layer_names=("a", "b")),), worker_kv_bytes_per_block=2048, cache=Cache(),
        parallel=Parallel(), model=SimpleNamespace(name="m", dtype="bfloat16"), kv_cache_layout="LBHNC",
    )  # fmt: skip
    return SimpleNamespace(config=SimpleNamespace(**(config | more)))


@pytest.fixture
def plugin() -> Iterator[Any]:
    with fakes.installed("new") as made:
        yield made


@pytest.fixture
def pool() -> np.ndarray:
    memory = np.empty(CHUNKS * NBYTES + 4096, np.int8)
    shift = -memory.ctypes.data % 4096
    made = memory[shift : shift + CHUNKS * NBYTES].reshape(CHUNKS, NBYTES)
    made[:] = np.random.default_rng(5).integers(-128, 128, made.shape, np.int8)
    return made


def start(plugin: Any, pool: np.ndarray, folder: Path, given: Any = None, **options: Any) -> Any:
    url = f"disk:{folder}?capacity=1MiB"
    return plugin.KvortexTier(spec() if given is None else given, memoryview(pool), "KvortexTier", None, url=url, **options)


def job(number: int, names: list[bytes], chunks: list[int]) -> Any:
    return SimpleNamespace(job_id=number, keys=names, chunk_ids=np.array(chunks, np.int32))


def ended(tier: Any) -> Any:
    deadline = time.monotonic() + 30
    while not (found := tier.get_finished_jobs()):
        assert time.monotonic() < deadline
        time.sleep(1e-3)
    (result,) = found
    return result


def looked(tier: Any, name: bytes) -> str:
    deadline, context = time.monotonic() + 30, SimpleNamespace(req_id="r")
    while (found := tier.lookup(name, context).name) == "RETRY":
        tier.on_schedule_end(None)
        assert time.monotonic() < deadline
        time.sleep(1e-3)
    tier.on_request_finished(context)
    return str(found)


def test_chunks_go_down_and_come_back_and_what_is_missing_is_told(plugin: Any, pool: np.ndarray, tmp_path: Path) -> None:
    view, names, url = memoryview(pool), [bytes([at] * 36) for at in range(3)], f"disk:{tmp_path}?capacity=1MiB"
    tier = plugin.KvortexTier(spec(), view, "KvortexTier", None, url=url, locality="LOCAL", tier_pool_share=0.5)
    assert (tier.medium.name, tier.cache_hit_source.name, tier.locality.value) == ("STORAGE", "DISK", "LOCAL")
    tier.submit_store(job(1, names[:2], [0, 1]))
    result = ended(tier)
    assert (result.job_id, result.success, result.transfer_bytes) == (1, True, 2 * NBYTES) and result.transfer_time > 0
    assert [looked(tier, name) for name in names] == ["HIT", "HIT", "MISS"]
    tier.submit_load(job(2, names, [4, 5, 6]))
    result = ended(tier)
    assert (result.job_id, result.success, result.successful_keys) == (2, False, tuple(names[:2]))
    assert (pool[4:6] == pool[:2]).all()
    tier.drain_jobs()
    tier.shutdown()
    view.release()  # BufferError, if anybody held vLLM's view


def test_another_model_layout_salt_or_version_finds_nothing(plugin: Any, pool: np.ndarray, tmp_path: Path) -> None:
    import vllm

    def fingerprint(given: Any = None, **options: Any) -> bytes:
        tier = start(plugin, pool, tmp_path / str(time.monotonic_ns()), given, **options)
        tier.shutdown()
        return bytes(tier.side._namespace.seed)

    first = fingerprint()
    assert first == fingerprint(spec(parallel=Parallel(rank=1, data_parallel_index=3)))  # replicas share
    others = [
        fingerprint(spec(model=SimpleNamespace(name="n", dtype="bfloat16"))), fingerprint(spec(kv_cache_layout="LBNHC")),
        fingerprint(spec(parallel=Parallel(world_size=4))), fingerprint(salt="x"), fingerprint(spec(cache=Cache(8))),
    ]  # fmt: skip
    vars(vllm)["__version__"] = "0.1"
    assert len({first, *others, fingerprint()}) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capasity": 1}, "secondary_tiers: tier disk:.*: unknown option 'capasity'"),
        ({"url": None}, "secondary_tiers: url = None: must be given"),
        ({"url": "tape:/x"}, "secondary_tiers: tier tape:/x: unknown scheme"),
        ({"locality": "near"}, "secondary_tiers: locality = 'near': must be one of LOCAL, REMOTE"),
        ({"locality": ["LOCAL"]}, "secondary_tiers: locality = .'LOCAL'.: must be one of LOCAL, REMOTE"),
        ({"url": ["redis://kv:hidden@host/0"]}, r"secondary_tiers: url = .'redis://kv:\*\*\*@host/0'.: must be given"),
        ({"tier_pool_share": 0.9}, "secondary_tiers: tier_pool_share = 0.9: must be above 0 and up to 0.5"),
        ({"salt": 5}, "salt = 5: must be str"),
        ({"mode": "back"}, "mode = 'back'"),
    ],
)
def test_wrong_options_are_refused_by_name_and_nothing_stays(
    plugin: Any, pool: np.ndarray, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    given = {"url": f"disk:{tmp_path}?capacity=1MiB"} | options
    with pytest.raises(ConfigError, match=message):
        plugin.KvortexTier(spec(), memoryview(pool), "KvortexTier", None, **given)
    start(plugin, pool, tmp_path).shutdown()  # the folder has no owner


def test_a_pool_of_another_shape_is_refused(plugin: Any, pool: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="known is one of"):
        start(plugin, pool[:, ::2], tmp_path)
    with pytest.raises(ConfigError, match="tiers need multiples of 4096"):
        start(plugin, pool.reshape(-1, 1000)[:1] if pool.size % 1000 == 0 else pool.reshape(2 * CHUNKS, -1), tmp_path)
