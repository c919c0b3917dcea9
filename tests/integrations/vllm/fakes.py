"""vLLM's modules as far as the adapters import them: the classes and signatures of 0.15.1 ("old") and of 0.32 ("new")."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import importlib.machinery
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

PLUGINS = "kvortex.integrations.vllm"


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = []
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)  # type: ignore[attr-defined]
    vars(module).update(content)
    return module


class Role(enum.Enum):
    SCHEDULER = 0
    WORKER = 1


class Metadata:
    pass


class SecondaryTier:
    """What vLLM's base class does of its own."""

    def __init__(self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str, detector: Any = None) -> None:
        self.tier_type, self.medium, self.cache_hit_source, self.locality = tier_type, None, "unknown", None


@dataclasses.dataclass
class JobResult:
    job_id: int
    success: bool
    successful_keys: Any = None
    transfer_time: float | None = None
    transfer_bytes: int | None = None


@dataclasses.dataclass
class Stats:
    data: dict[str, Any] = dataclasses.field(default_factory=dict)


class ConnectorBase:
    """What both versions' base classes do for their own."""

    def _begin(self, vllm_config: Any, role: Role) -> None:
        self._connector_metadata, self._vllm_config, self._role = None, vllm_config, role

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        self._connector_metadata = connector_metadata


class OldConnector(ConnectorBase):
    def __init__(self, vllm_config: Any, role: Role, kv_cache_config: Any = None) -> None:
        self._begin(vllm_config, role)


class NewConnector(ConnectorBase):
    def __init__(self, vllm_config: Any, role: Role, kv_cache_config: Any) -> None:
        self._begin(vllm_config, role)


class OldManager:
    def lookup(self, block_hashes: Any) -> int | None:
        raise NotImplementedError


class OldSpec:
    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        self.vllm_config, self.kv_cache_config = vllm_config, kv_cache_config
        self.extra_config = vllm_config.kv_transfer_config.kv_connector_extra_config
        self.gpu_block_size = vllm_config.cache_config.block_size
        self.offloaded_block_size = int(self.extra_config.get("block_size", self.gpu_block_size))


class NewSpec:
    def __init__(self, config: Any) -> None:
        self.config = config

    def get_worker(self, kv_caches: Any) -> Any:
        raise NotImplementedError


@dataclasses.dataclass
class OldStores:
    block_hashes_to_store: list[bytes]
    store_spec: Any
    block_hashes_evicted: list[bytes]


@dataclasses.dataclass
class NewStores:
    keys_to_store: list[bytes]
    store_spec: Any
    evicted_keys: list[bytes]


@dataclasses.dataclass
class TransferResult:
    job_id: int
    success: bool
    transfer_size: int | None = None
    transfer_time: float | None = None


def _event(**what: Any) -> SimpleNamespace:
    return SimpleNamespace(**what)


def _plain() -> type:
    return type("Base", (), {})


def modules(form: str) -> dict[str, ModuleType]:
    """All of them, by name."""
    v1, offload = "vllm.distributed.kv_transfer.kv_connector.v1", "vllm.v1.kv_offload"
    connector = OldConnector if form == "old" else NewConnector
    base = _module(f"{v1}.base", KVConnectorBase_V1=connector, KVConnectorMetadata=Metadata, KVConnectorRole=Role)
    if form == "new":
        vars(base)["KVConnectorWorkerMetadata"] = _plain()
    made = [base, _module(v1, base=base), _module(f"{v1}.metrics", KVConnectorStats=Stats)]
    if form == "old":
        abstract = _module(
            f"{offload}.abstract", OffloadingManager=OldManager, LoadStoreSpec=_plain(), PrepareStoreOutput=OldStores,
            OffloadingEvent=_event,
        )  # fmt: skip
        mediums = _module(f"{offload}.mediums", GPULoadStoreSpec=_plain())
        spec, worker = _module(f"{offload}.spec", OffloadingSpec=OldSpec), _module(f"{offload}.worker.worker")
        abstract.OffloadingSpec = OldSpec  # type: ignore[attr-defined]
        vars(worker)["OffloadingHandler"] = _plain()
        top = _module(offload, abstract=abstract, mediums=mediums, spec=spec)
        made += [abstract, mediums, spec, worker, _module(f"{offload}.worker", worker=worker), top]
    else:
        new = _module(
            f"{offload}.base", OffloadingSpec=NewSpec, OffloadingManager=_plain(), OffloadingWorker=_plain(),
            LoadStoreSpec=_plain(), PrepareStoreOutput=NewStores, TransferResult=TransferResult, OffloadingEvent=_event,
            LookupResult=enum.Enum("LookupResult", "MISS HIT HIT_PENDING RETRY"),
            RequestOffloadingContext=_plain(),
        )  # fmt: skip
        vars(new)["Locality"] = enum.Enum("Locality", {"LOCAL": "LOCAL", "REMOTE": "REMOTE"})
        vars(new)["Medium"] = enum.Enum("Medium", "CPU STORAGE")
        below = _module(f"{offload}.tiering.base", SecondaryTierManager=SecondaryTier, JobResult=JobResult)
        vars(below)["CacheHitSource"] = enum.Enum("CacheHitSource", "DISK EXTERNAL_UNSPECIFIED")
        made += [new, _module(offload, base=new), below, _module(f"{offload}.tiering", base=below)]
    made += [_module("vllm", __version__="0.0"), _module("vllm.v1")]
    made += [_module("vllm.distributed"), _module("vllm.distributed.kv_transfer")]
    made.append(_module("vllm.distributed.kv_transfer.kv_connector"))
    return {module.__name__: module for module in made}


@contextmanager
def installed(form: str) -> Iterator[ModuleType]:
    """The adapters, over one of the two; everything is as before at the end."""
    before = {name: sys.modules.pop(name) for name in [*sys.modules] if _is_over_vllm(name)}
    sys.modules.update(modules(form))
    try:
        yield importlib.import_module(PLUGINS)
    finally:
        for name in filter(_is_over_vllm, [*sys.modules]):
            del sys.modules[name]
        sys.modules.update(before)


def _is_over_vllm(name: str) -> bool:
    ours = {f"{PLUGINS}.{each}" for each in ("connector", "spec", "spec_new", "spec_old", "tier")}
    return name == "vllm" or name.startswith("vllm.") or name in ours


def vllm_config(extra: dict[str, Any], block_size: int = 4, engine: str = "engine", **transfer: Any) -> Any:
    """A VllmConfig of one worker."""
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=extra, engine_id=engine, **transfer),
        parallel_config=SimpleNamespace(rank=0, world_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto", block_size=block_size),
        model_config=SimpleNamespace(model="m", dtype="torch.bfloat16"),
        compilation_config=SimpleNamespace(static_forward_context={}),
        kv_events_config=SimpleNamespace(enable_kv_cache_events=True),
    )


def cache_config(num_blocks: int, layers: int, page_bytes: int, block_size: int = 4, groups: int = 1) -> Any:
    """A KVCacheConfig."""
    spec = SimpleNamespace(page_size_bytes=page_bytes, block_size=block_size)
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=[f"layers.{at}" for at in range(layers)])
    return SimpleNamespace(num_blocks=num_blocks, kv_cache_groups=[group] * groups)
