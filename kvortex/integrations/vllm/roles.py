"""The connector's two halves, made from what vLLM hands to its constructor."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from kvortex.integrations.vllm import asking, layouts, links, options
from kvortex.integrations.vllm.ledger import Ledger
from kvortex.integrations.vllm.messages import Report
from kvortex.integrations.vllm.scheduler import SchedulerSide
from kvortex.integrations.vllm.store import Store
from kvortex.integrations.vllm.worker import WorkerSide

log = logging.getLogger(__name__)


class Roles:
    """What both halves must agree on.

    Raises
    ------
    ConfigError
        An option has a wrong name or value, the pool holds no block, or the model's cache has several groups.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        self._vllm_config = vllm_config
        self._caches = asking.cache_of(kv_cache_config)
        self._identity = asking.identity_of(vllm_config, self._caches.block_size)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config or {}
        self._config = options.read_options(extra, self._identity, (options.PROMPTS_ONLY,))
        self._prompts_only = options.prompts_only(extra)
        self._slots = options.slots_for(self._config, self._caches.block_bytes)

    def scheduler(self) -> SchedulerSide:
        """The half beside the scheduler."""
        asking.warn_of_policy(self._vllm_config.kv_transfer_config)
        config, identity = self._config, self._identity
        ledger = Ledger(self._slots, config.eviction_policy, config.admit_after, options.ledger_namespace(config))
        return SchedulerSide(
            ledger, identity.block_size, identity.world_size, self._ask, prompts_only=self._prompts_only
        )

    def worker(self, caches: Mapping[str, Any], backend: Any) -> WorkerSide:
        """The half beside a model runner, with its pool.

        Parameters
        ----------
        caches
            Tensors by layer, or one of all layers.
        backend
            Attention backend of that one; None where each layer is asked for its own.
        """
        backends = dict.fromkeys(caches, backend)
        if backend is None:
            backends = asking.backends_of(self._vllm_config, list(caches))
        layout = layouts.layout_of(caches, layouts.block_axes(caches, backends), self._caches.num_blocks)
        first = next(iter(caches.values()))
        store = Store(self._config, layout, self._slots)
        worker = WorkerSide(store, lambda: layouts.current_stream(first))
        links.register(self._identity.engine_id, worker)
        log.info("kvortex: %s; %s", layout.describe(), store.engine)
        return worker

    def _ask(self) -> Report | None:
        worker: WorkerSide | None = links.worker_of(self._identity.engine_id, self._identity.world_size)
        return worker.take_report() if worker is not None else None
