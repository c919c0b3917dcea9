"""vLLM's TieringOffloadingSpec on a machine without a GPU: its manager, its pool and its tiers, with copies by the host.

vLLM's own worker copies with CUDA alone, and its spec refuses CPUs. Loaded by vLLM 0.32, for ``live_tier.py``; models with one
group of layers, chunks of one block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.kv_offload.base import GPULoadStoreSpec, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class HostWorker(OffloadingWorker):
    """Copies pages at once."""

    def __init__(self, caches: Any, region: Any) -> None:
        self._region, self._done = region, []
        self._pages = [each.tensor.view(torch.int8).numpy() for each in caches.tensors]
        self._chunks = [region.create_next_worker_view(each.page_size_bytes).numpy() for each in caches.tensors]

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Pages into chunks."""
        return self._move(job_id, self._pages, src_spec, self._chunks, dst_spec)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any, expedited: bool = False) -> bool:
        """Chunks into pages."""
        return self._move(job_id, self._chunks, src_spec, self._pages, dst_spec)

    def _move(self, job_id: int, sources: Any, source: Any, targets: Any, target: Any) -> bool:
        assert isinstance(source, GPULoadStoreSpec) or isinstance(target, GPULoadStoreSpec)
        assert len(source.block_ids) == len(target.block_ids)
        for one, other in zip(sources, targets, strict=True):
            other[np.asarray(target.block_ids)] = one[np.asarray(source.block_ids)]
        self._done.append(TransferResult(job_id, True))
        return True

    def get_finished(self) -> list[Any]:
        """All that was asked for."""
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Nothing runs."""

    def shutdown(self) -> None:
        """Gives the pool back."""
        self._pages = self._chunks = []
        self._region.cleanup()


class HostTieringSpec(TieringOffloadingSpec):
    """vLLM's, with another worker."""

    def get_worker(self, kv_caches: Any) -> Any:
        """Over vLLM's own shared region."""
        assert self.blocks_per_chunk == 1 and len(self.config.groups) == 1
        region = SharedOffloadRegion(
            engine_id=self._engine_id, num_chunks=self.num_chunks, rank=self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk, cpu_page_size=self.cpu_page_size_per_worker,
        )  # fmt: skip
        return HostWorker(kv_caches, region)
