"""The secondary tier that vLLM loads: one of kvortex's tiers below vLLM's own pinned pool (vLLM 0.26 and newer)."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import vllm
from vllm.v1.kv_offload import base as offload
from vllm.v1.kv_offload.tiering import base

from kvortex.errors import ConfigError, shown, shown_tiers
from kvortex.integrations.vllm.below import Chunks, Job, TierSide
from kvortex.keys import Namespace
from kvortex.tiers.record import RecordFormat
from kvortex.tiers.urls import open_tier

if not hasattr(offload, "LookupResult"):
    raise ImportError("this vLLM's secondary tiers have an interface of before 0.26, which kvortex does not serve")
SOURCE = "secondary_tiers"
_RESULTS = {"hit": offload.LookupResult.HIT, "miss": offload.LookupResult.MISS, "retry": offload.LookupResult.RETRY}
_SAYS = {entry.name for entry in dataclasses.fields(base.JobResult)}  # newer versions take more of a job's end


class KvortexTier(base.SecondaryTierManager):  # type: ignore[misc]
    """Stores chunks of vLLM's pool in one of kvortex's tiers, and brings them back.

    Parameters
    ----------
    offloading_spec, primary_kv_view, tier_type, backpressure_detector
        By vLLM.
    url
        Of the tier, as in :class:`kvortex.KVortexConfig`.
    locality
        vLLM's word for where the store is: ``"LOCAL"`` or ``"REMOTE"``.
    salt, tier_pool_share
        As in :class:`kvortex.KVortexConfig`; the share is of vLLM's pool, of chunks that wait to be stored.
    options
        What could stand in the URL.

    Raises
    ------
    ConfigError
        An option has a wrong name or value, or the tier cannot be opened.
    """

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        *,
        url: str | None = None,
        locality: str | None = None,
        salt: str = "",
        tier_pool_share: float = 0.25,
        **options: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        if not isinstance(url, str):
            raise ConfigError(f"{SOURCE}: url = {shown_tiers(url)}: must be given, as disk:/folder?capacity=100GiB or redis://host:6379/0")
        is_share = isinstance(tier_pool_share, (int, float)) and not isinstance(tier_pool_share, bool)
        if not is_share or not 0 < tier_pool_share <= 0.5:
            raise ConfigError(f"{SOURCE}: tier_pool_share = {shown(tier_pool_share)}: must be above 0 and up to 0.5")
        self.locality = _locality(locality)
        chunks = _chunks_of(primary_kv_view)
        namespace = _namespace_of(offloading_spec.config, chunks, salt)
        try:
            opened = open_tier({"url": url, **options}, RecordFormat(namespace.seed, chunks.nbytes))
        except ConfigError as error:
            raise ConfigError(f"{SOURCE}: {error}") from None
        if opened.tier.name == "disk":
            self.medium = offload.Medium.STORAGE
            if source := getattr(getattr(base, "CacheHitSource", None), "DISK", None):
                self.cache_hit_source = source
        try:
            self.side = TierSide(opened, namespace, chunks, tier_pool_share)
        except BaseException:
            opened.tier.close()
            raise

    def lookup(self, key: Any, req_context: Any) -> Any:
        """Whether a chunk is there; asks, and knows in a later step."""
        return _RESULTS[self.side.lookup(key, req_context.req_id)]

    def submit_store(self, job_metadata: Any) -> None:
        """Starts to store chunks."""
        self.side.store(_job_of(job_metadata, loads=False))

    def submit_load(self, job_metadata: Any) -> None:
        """Starts to load chunks."""
        self.side.load(_job_of(job_metadata, loads=True))

    def get_finished_jobs(self) -> Iterable[Any]:
        """Jobs that have ended."""
        return [_result_of(job) for job in self.side.finished()]

    def on_new_request(self, req_context: Any) -> Any:
        """Chunks are stored as they are computed."""
        return offload.RequestOffloadingContext()

    def on_request_finished(self, req_context: Any) -> None:
        """Its answers are needed no longer."""
        self.side.forget(req_context.req_id)

    def on_schedule_end(self, context: Any) -> None:
        """Asks the tier what requests wanted to know."""
        self.side.step()

    def drain_jobs(self) -> None:
        """Waits until no job touches vLLM's pool."""
        self.side.drain()

    def shutdown(self) -> None:
        """Ends the tier; what it holds stays."""
        self.side.close()


def _chunks_of(view: memoryview) -> Chunks:
    """Where vLLM's pool is. Keeps no hold of the view, which vLLM wants to give back."""
    pool = np.asarray(view)
    if pool.ndim != 2 or not pool.flags.c_contiguous:
        raise ConfigError(f"vLLM's pool has the shape {pool.shape}, strides {pool.strides}; known is one of (chunks, bytes)")
    return Chunks(int(pool.ctypes.data), pool.shape[0], int(pool.strides[0]))


def _namespace_of(config: Any, chunks: Chunks, salt: str) -> Namespace:
    """What a chunk of vLLM's is of: of all ranks, in the layout of this version and model."""
    parallel = dataclasses.asdict(config.parallel)
    for name in ("rank", "data_parallel_index", "data_parallel_size", "data_parallel_rank_local"):
        parallel.pop(name, None)  # replicas have the same chunks
    said = {
        "vllm": str(vllm.__version__),
        "groups": [[group.tokens_per_block, *group.layer_names] for group in config.groups],
        "block_bytes": config.worker_kv_bytes_per_block,
        "chunk_bytes": chunks.nbytes,
        "cache": dataclasses.asdict(config.cache),
        "parallel": parallel,
        "layout": getattr(config, "kv_cache_layout", None),
        "canonical": getattr(config, "canonical_layout", False),
        "replicated": getattr(config, "replicated_layout", False),
    }
    fingerprint = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).digest()
    tokens = config.cache.tokens_per_hash
    return Namespace(
        model=str(config.model.name), dtype=str(config.model.dtype), layout=fingerprint, block_size=tokens, salt=salt
    )


def _locality(name: str | None) -> Any:
    if name is None:
        return None
    known = {entry.value: entry for entry in getattr(offload, "Locality", ())}
    if not isinstance(name, str) or name not in known:
        names = ", ".join(known) or "none that this vLLM knows"
        raise ConfigError(f"{SOURCE}: locality = {shown(name)}: must be one of {names}")
    return known[name]


def _job_of(metadata: Any, *, loads: bool) -> Job:
    return Job(metadata.job_id, loads, list(metadata.keys), np.asarray(metadata.chunk_ids, np.int64))


def _result_of(job: Job) -> Any:
    good = bool(job.good.all())
    more: dict[str, Any] = {"transfer_time": job.seconds, "transfer_bytes": job.nbytes}
    if job.loads and not good and job.good.any():
        more["successful_keys"] = tuple(itertools.compress(job.names, job.good.tolist()))
    return base.JobResult(job.number, good, **{name: value for name, value in more.items() if name in _SAYS})
