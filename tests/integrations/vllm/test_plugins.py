"""What vLLM calls, in the form of 0.15.1 and in that of 0.32, over pages of the host and without vLLM."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvortex.devices import open_device
from kvortex.errors import ConfigError
from kvortex.integrations.vllm import links
from tests.integrations.vllm import fakes
from tests.integrations.vllm.tensors import Backend, FakeRequest, caches_of, output_of
from tests.pages import PagedCache, assert_same

BS = 4
PROMPT = list(range(100, 100 + 5 * BS + 2))
PAGES = [1, 2, 3, 4, 5, 6]
BLOCKS, POOL = 40, 16


class World:
    """Both connectors of one engine, and pages."""

    def __init__(self, form: str, plugin: Any, extra: dict[str, Any] | None = None) -> None:
        self.form = form
        self.cache = PagedCache.plain(open_device("host"), blocks=BLOCKS)
        self.before = self.cache.randomize()
        page = self.cache.layout.record_bytes // 2
        pool = {"cpu_pool_size_bytes": POOL * 2 * page, **(extra or {})}
        config = fakes.vllm_config(pool, kv_load_failure_policy="recompute")
        layer = SimpleNamespace(get_attn_backend=lambda: Backend((2, "B", "N", "H", "D")))
        config.compilation_config.static_forward_context = {f"layers.{at}": layer for at in range(2)}
        caches = fakes.cache_config(BLOCKS, 2, page, BS)
        self.side = plugin.KvortexConnector(config, fakes.Role.SCHEDULER, caches)
        self.worker = plugin.KvortexConnector(config, fakes.Role.WORKER, caches)
        self.worker.register_kv_caches(caches_of(self.cache))

    def step(self, output: Any) -> Any:
        """A step of vLLM, in the order of its version; what its connectors say of it."""
        metadata = self.side.build_connector_meta(output)
        if self.form == "new":
            self.worker.handle_preemptions(metadata)
        else:
            self.worker.handle_preemptions(set())
        self.worker.bind_connector_metadata(metadata)
        self.worker.start_load_kv(None)
        self.worker.wait_for_layer_load("layers.0")
        self.worker.save_kv_layer("layers.0", None, None)
        self.worker.wait_for_save()
        self.worker._worker.store.wait([*self.worker._worker._jobs])
        _, received = self.worker.get_finished(set())
        said = SimpleNamespace(
            finished_recving=received,
            invalid_block_ids=self.worker.get_block_ids_with_load_errors(),
            kv_connector_stats=self.worker.get_kv_connector_stats(),
            kv_connector_worker_meta=self.worker.build_connector_worker_meta() if self.form == "new" else None,
        )
        self.side.update_connector_output(said)
        return said

    def ask(self, name: str, pages: list[int]) -> tuple[int, Any]:
        request = FakeRequest(name, PROMPT, BS)
        tokens, later = self.side.get_num_new_matched_tokens(request, 0)
        assert later == (tokens > 0)
        self.side.update_state_after_alloc(request, SimpleNamespace(get_block_ids=lambda: (pages,)), tokens)
        if tokens:
            return tokens, self.step(output_of())
        return 0, self.step(output_of(new=[(name, pages, 0, len(PROMPT))]))


@pytest.fixture(params=["old", "new"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def plugin(form: str) -> Iterator[Any]:
    with fakes.installed(form) as made:
        yield made


@pytest.fixture
def world(form: str, plugin: Any) -> Iterator[World]:
    made = World(form, plugin)
    yield made
    made.worker.shutdown()
    made.worker.shutdown()
    made.side.shutdown()


def test_a_connector_saves_and_loads(world: World) -> None:
    tokens, said = world.ask("a", PAGES)
    assert tokens == 0 and said.finished_recving is None
    assert said.kv_connector_stats.data["saved_blocks"] == 5 and "report" not in said.kv_connector_stats.data
    assert not world.side.has_pending_push_work()
    assert world.side.request_finished(FakeRequest("a", PROMPT, BS), []) == (False, None)
    tokens, said = world.ask("b", [11, 12, 13, 14, 15, 16])
    assert tokens == 5 * BS and said.finished_recving == {"b"} and said.invalid_block_ids == set()
    assert said.kv_connector_stats.reduce()["loaded_blocks"] == 5
    moves = [(1 + i, 11 + i) for i in range(5)]
    assert_same(world.cache.memory(), world.cache.expected(world.before, world.before, moves))
    assert world.worker.get_kv_connector_stats() is None


def test_a_connector_tells_vllm_which_pages_to_compute(world: World) -> None:
    world.ask("a", PAGES)
    store = world.worker._worker.store
    slot = world.side._side.ledger.slot_of(FakeRequest("a", PROMPT, BS).block_hashes[1])
    (there,) = store.engine._index.acquire(store._keys[[slot]])
    store.engine._index.release([there])
    store.engine._parts.arena.view(int(there))[7] ^= 1
    _, said = world.ask("b", [11, 12, 13, 14, 15, 16])
    assert said.finished_recving == {"b"} and said.invalid_block_ids == {12}
    assert world.side.get_num_new_matched_tokens(FakeRequest("c", PROMPT, BS), 0) == (BS, True)


def test_metadata_and_reports_travel_between_processes(form: str, plugin: Any) -> None:
    from kvortex.integrations.vllm.messages import Report

    module = sys.modules[f"{fakes.PLUGINS}.connector"] if plugin.KvortexConnector else None
    assert module is not None
    one, two = module.KvortexStats(data={"report": Report({1: (1, (2,))}), "a": 1}), module.KvortexStats(
        data={"report": Report({1: (1, (3,)), 4: (1, ())}), "a": 2, "b": 5}
    )
    both = pickle.loads(pickle.dumps(one)).aggregate(pickle.loads(pickle.dumps(two)))
    assert both.data["report"].ended == {1: (2, (2, 3)), 4: (1, ())} and both.reduce() == {"a": 3, "b": 5}
    assert module.KvortexStats(data={}).is_empty() and not both.is_empty()
    both.reset()
    assert both.is_empty() and plugin.KvortexConnector.build_kv_connector_stats({"a": 1}).data == {"a": 1}
    if form == "new":
        meta = module.KvortexWorkerMetadata(Report({1: (1, ())}))
        assert meta.aggregate(module.KvortexWorkerMetadata(Report({1: (1, (0,))}))).report.ended == {1: (2, (0,))}


def test_a_connector_resets(world: World) -> None:
    world.ask("a", PAGES)
    assert world.side.reset_cache() is True
    assert world.side.get_num_new_matched_tokens(FakeRequest("b", PROMPT, BS), 0) == (0, False)


def test_wrong_options_and_models_are_refused_at_start(plugin: Any, caplog: pytest.LogCaptureFixture) -> None:
    def start(extra: dict[str, Any], cache: Any = None, **transfer: Any) -> None:
        caches = fakes.cache_config(BLOCKS, 2, 4096) if cache is None else cache
        plugin.KvortexConnector(fakes.vllm_config(extra, **transfer), fakes.Role.SCHEDULER, caches)

    with pytest.raises(ConfigError, match="kv_connector_extra_config: unknown option 'cpu_pool'"):
        start({"cpu_pool": 1})
    with pytest.raises(ConfigError, match="the KV cache has 2 groups"):
        start({}, fakes.cache_config(BLOCKS, 2, 4096, groups=2))
    with caplog.at_level(logging.WARNING):
        start({}, kv_load_failure_policy="recompute")
        assert not caplog.records
        start({}, kv_load_failure_policy="fail")
        assert "their requests fail" in caplog.text


def test_one_tensor_of_all_layers_is_taken(form: str, plugin: Any) -> None:
    from tests.integrations.vllm.tensors import FakeTensor
    from tests.pages import Tensor

    cache = PagedCache(open_device("host"), [Tensor(open_device("host"), (BLOCKS, 2, 2, BS, 2, 16))], 0)
    size = cache.layout.record_bytes
    config = fakes.vllm_config({"cpu_pool_size_bytes": 64 << 10}, kv_load_failure_policy="recompute")
    worker = plugin.KvortexConnector(config, fakes.Role.WORKER, fakes.cache_config(BLOCKS, 2, size // 2, BS))
    backend = Backend((2, "B", "N", "H", "D"), (2, 0, 1, 3, 4, 5))
    worker.register_cross_layers_kv_cache(FakeTensor(cache.tensors[0]), backend)
    assert worker._worker.store.engine.layout.record_bytes == size
    worker.shutdown()


class SpecWorld:
    """Manager and worker of a spec, in either form, by the same three words."""

    def __init__(self, form: str, plugin: Any, chunk: int = 1) -> None:
        self.form, self.context = form, SimpleNamespace(req_id="r")
        self.cache = PagedCache.plain(open_device("host"), blocks=BLOCKS)
        self.before = self.cache.randomize()
        page = self.cache.layout.record_bytes // 2
        extra: dict[str, Any] = {"spec_name": "KvortexOffloadingSpec", "spec_module_path": fakes.PLUGINS}
        extra["cpu_pool_size_bytes"] = POOL * 2 * page
        if form == "old":
            config = fakes.vllm_config({**extra, "block_size": BS * chunk}, BS)
            spec = plugin.KvortexOffloadingSpec(config, fakes.cache_config(BLOCKS, 2, page, BS))
            backends = dict.fromkeys(("layers.0", "layers.1"), Backend((2, "B", "N", "H", "D")))
            saves, loads = spec.get_handlers(caches_of(self.cache), backends)
            assert (saves[1].medium(), loads[0].medium()) == ("KVORTEX", "KVORTEX")
            self.saves, self.loads = saves[2], loads[2]
        else:
            spec = plugin.KvortexOffloadingSpec(
                SimpleNamespace(
                    groups=[SimpleNamespace(tokens_per_block=BS)], worker_kv_bytes_per_block=2 * page, extra_config=extra,
                    enable_kv_cache_events=True, engine_id="engine", model=SimpleNamespace(name="m", dtype="bfloat16"),
                    cache=SimpleNamespace(tokens_per_hash=BS, blocks_per_chunk=chunk),
                    parallel=SimpleNamespace(rank=0, world_size=1),
                )
            )  # fmt: skip
            tensors = [
                SimpleNamespace(tensor=tensor, page_size_bytes=page) for tensor in caches_of(self.canonical()).values()
            ]
            self.worker = spec.get_worker(SimpleNamespace(tensors=tensors))
        self.manager = spec.get_manager()
        (self.linked,) = links.workers()

    def canonical(self) -> PagedCache:
        """(blocks, bytes) tensors over the same memory would need blocks first: these are others."""
        from tests.pages import Tensor

        device, page = open_device("host"), self.cache.layout.record_bytes // 2
        self.cache = PagedCache(device, [Tensor(device, (BLOCKS, page), 1) for _ in range(2)], 0)
        self.before = self.cache.randomize()
        return self.cache

    def hits(self, names: list[bytes]) -> list[bool]:
        if self.form == "old":
            return [self.manager.lookup(iter([name])) == 1 for name in names]
        return [self.manager.lookup(name, self.context).name == "HIT" for name in names]

    def save(self, names: list[bytes], pages: list[int]) -> None:
        if self.form == "old":
            made = self.manager.prepare_store(iter(names))
            assert made.block_hashes_to_store == names
            assert self.saves.transfer_async(1, (SimpleNamespace(block_ids=np.array(pages)), made.store_spec))
            self.saves.wait({1})
            assert (self.loads.get_finished(), self.saves.get_finished()) == ([], [(1, True)])
            self.manager.complete_store(iter(names))
        else:
            made = self.manager.prepare_store(names, self.context)
            assert made.keys_to_store == names
            pages_spec = SimpleNamespace(block_ids=np.array(pages, np.int32), group_sizes=[len(pages)], block_indices=[0])
            assert self.worker.submit_store(1, pages_spec, pickle.loads(pickle.dumps(made.store_spec)))
            self.worker.wait({1})
            (result,) = self.worker.get_finished()
            assert (result.job_id, result.success) == (1, True) and result.transfer_size > 0
            self.manager.complete_store(set(names), self.context)

    def load(self, names: list[bytes], pages: list[int]) -> bool:
        if self.form == "old":
            place = self.manager.prepare_load(iter(names))
            assert self.loads.transfer_async(2, (place, SimpleNamespace(block_ids=np.array(pages))))
            self.loads.wait({2})
            assert self.saves.get_finished() == []
            ((_, good),) = self.loads.get_finished()
            self.manager.complete_load(iter(names))
        else:
            place = self.manager.prepare_load(names, self.context)
            pages_spec = SimpleNamespace(block_ids=np.array(pages, np.int32), group_sizes=[len(pages)], block_indices=[0])
            assert self.worker.submit_load(2, place, pages_spec, expedited=True)
            self.worker.wait({2})
            (result,) = self.worker.get_finished()
            good = result.success
            self.manager.complete_load(set(names), self.context)
        return bool(good)


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_spec_saves_loads_and_never_promises_what_is_damaged(form: str, plugin: Any, chunk: int) -> None:
    world = SpecWorld(form, plugin, chunk)
    names = [bytes([i] * 36) for i in range(3)]
    pages = list(range(1, 1 + 3 * chunk))
    assert world.hits(names) == [False] * 3
    world.save(names, pages)
    assert world.hits(names) == [True] * 3
    assert world.load(names, [20 + page for page in pages])
    moves = [(page, 20 + page) for page in pages]
    assert_same(world.cache.memory(), world.cache.expected(world.before, world.before, moves))
    store = world.linked.store
    slot = world.manager._manager.ledger.slot_of(names[1])
    (there,) = store.engine._index.acquire(store._keys[[slot * chunk]])
    store.engine._index.release([there])
    store.engine._parts.arena.view(int(there))[7] ^= 1
    assert world.hits(names) == [True, False, True]
    world.manager.touch(*([iter(names)] if form == "old" else [names, world.context]))
    removed = [event.removed for event in world.manager.take_events()]
    assert removed == [False, True]
    store.close()


def test_a_spec_that_vllm_would_feed_other_bytes_is_refused(plugin: Any, form: str) -> None:
    if form == "old":
        with pytest.raises(ConfigError, match="unknown option 'cpu_bytes_to_use'"):
            plugin.KvortexOffloadingSpec(fakes.vllm_config({"cpu_bytes_to_use": 1}), fakes.cache_config(BLOCKS, 2, 4096))
        return
    config = SimpleNamespace(
        groups=[SimpleNamespace(tokens_per_block=BS)], extra_config={}, canonical_layout=True, engine_id="e",
        model=SimpleNamespace(name="m", dtype="d"), parallel=SimpleNamespace(rank=0, world_size=1),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="'canonical_layout'"):
        plugin.KvortexOffloadingSpec(config)


def test_an_interface_between_the_two_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with fakes.installed("new") as plugin:
        monkeypatch.delattr(fakes.NewSpec, "get_worker")
        with pytest.raises(ImportError, match="between 0.17 and 0.26"):
            plugin.KvortexOffloadingSpec  # noqa: B018


def test_vllm_finds_the_plugins_by_name_and_nothing_else(plugin: Any) -> None:
    assert plugin.KvortexConnector.__name__ == "KvortexConnector"
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        plugin.Other  # noqa: B018


def test_the_connectors_class_is_found_without_loading_numba_or_torch() -> None:
    """vLLM 0.32 on a CPU stumbles over llvmlite if that is loaded before its own start."""
    root = Path(__file__).resolve().parents[3]
    code = f"import sys; sys.path.insert(0, {str(root)!r})\n"
    code += "from tests.integrations.vllm import fakes\n"
    code += "with fakes.installed('new') as plugin: plugin.KvortexConnector\n"
    code += "print(sorted({'numba', 'llvmlite', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=root)
    assert done.stdout.strip() == "[]", done.stderr
