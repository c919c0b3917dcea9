"""The connector that vLLM loads. Versions differ in what they call; what is here is told by their signatures, not by a number.

vLLM imports this while it reads its options, long before it makes a connector; so Numba is loaded only when one is made
(vLLM 0.32 on a CPU looks through all modules in between, and stumbles over LLVM's).
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

from kvortex.errors import ConfigError
from kvortex.integrations.vllm.messages import Orders, Report

if TYPE_CHECKING:
    from kvortex.integrations.vllm.roles import Roles
    from kvortex.integrations.vllm.scheduler import SchedulerSide
    from kvortex.integrations.vllm.worker import WorkerSide

# Where workers can send the scheduler something of their own, they do; before, it travels with the statistics.
_HAS_WORKER_META = hasattr(base, "KVConnectorWorkerMetadata")
_REPORT = "report"


@dataclasses.dataclass
class KvortexMetadata(base.KVConnectorMetadata):  # type: ignore[misc]
    """Orders of a step, from the scheduler to its workers."""

    orders: Orders


if _HAS_WORKER_META:

    @dataclasses.dataclass
    class KvortexWorkerMetadata(base.KVConnectorWorkerMetadata):  # type: ignore[misc]
        """A step's report, from workers to the scheduler."""

        report: Report

        def aggregate(self, other: Any) -> Any:
            """What both workers say."""
            self.report.merge(other.report)
            return self


class KvortexStats(KVConnectorStats):  # type: ignore[misc]
    """Blocks and bytes that moved in an interval, summed over workers."""

    def reset(self) -> None:
        """Begins anew."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: Any) -> Any:
        """Adds what another worker, or another interval, counted."""
        for name, value in other.data.items():
            if name == _REPORT:
                mine = self.data.setdefault(_REPORT, Report())
                mine.merge(value)
            else:
                self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """As a line of the log."""
        return {name: value for name, value in self.data.items() if name != _REPORT}

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not self.data


class KvortexConnector(base.KVConnectorBase_V1):  # type: ignore[misc]
    """Loads blocks that kvortex has instead of computing them, and saves those that were computed.

    Loads are asynchronous: a request waits for its blocks while others are computed. A block that is damaged or gone is
    reported, and vLLM computes it where ``kv_load_failure_policy`` is ``"recompute"``.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        takes = inspect.signature(base.KVConnectorBase_V1.__init__).parameters
        super().__init__(vllm_config, role, *([kv_cache_config] if "kv_cache_config" in takes else []))
        from kvortex.integrations.vllm.roles import Roles

        self._roles: Roles = Roles(vllm_config, kv_cache_config)
        is_scheduler = role == base.KVConnectorRole.SCHEDULER
        self._scheduler: SchedulerSide | None = self._roles.scheduler() if is_scheduler else None
        self._worker: WorkerSide | None = None

    # -- worker

    @property
    def prefer_cross_layer_blocks(self) -> bool:
        """One tensor of all layers, where vLLM can have it: its blocks are fewer and longer fragments."""
        return True

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Takes the pool and gets to know the tensors, by layer."""
        self._worker = self._roles.worker(kv_caches, None)

    def register_cross_layers_kv_cache(self, kv_cache: Any, attn_backend: Any) -> None:
        """The same where one tensor holds all layers."""
        self._worker = self._roles.worker({"all layers": kv_cache}, attn_backend)

    def handle_preemptions(self, what: Any) -> None:
        """Ahead of a step. Newer versions hand in the step's metadata; older ones names, of which nothing must be known."""
        if isinstance(what, KvortexMetadata) and self._worker is not None:
            self._worker.fence(what.orders)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """Ahead of a step's forward pass, in all versions."""
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            self._worker.fence(connector_metadata.orders)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Starts the step's loads; their requests are not in this step's forward pass."""
        if self._worker is not None:
            self._worker.load(self._connector_metadata.orders)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: no request of a forward pass still waits for blocks."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: blocks are saved when all layers are computed."""

    def wait_for_save(self) -> None:
        """Starts the step's saves, and does not wait: whoever gets their pages next does."""
        if self._worker is not None:
            self._worker.save(self._connector_metadata.orders)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose loads have ended, well or not."""
        received = self._worker.take_received() if self._worker is not None else set()
        return None, received or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Pages that must be computed after all."""
        return self._worker.take_bad_pages() if self._worker is not None else set()

    def build_connector_worker_meta(self) -> Any:
        """What the scheduler is to know, in versions that ask."""
        report = self._worker.take_report() if self._worker is not None else None
        return KvortexWorkerMetadata(report) if report is not None else None

    def get_kv_connector_stats(self) -> Any:
        """What moved since the last call."""
        if self._worker is None:
            return None
        data: dict[str, Any] = self._worker.take_counts()
        if not _HAS_WORKER_META and (report := self._worker.take_report()) is not None:
            data[_REPORT] = report
        return KvortexStats(data=data) if data else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        """Statistics as they arrive at vLLM's log."""
        return KvortexStats(data=data or {})

    # -- scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that can be loaded behind those that vLLM has."""
        tokens = self._side.matched(request, num_computed_tokens)
        return tokens, tokens > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Pages are there: a load can start with the next orders."""
        self._side.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """Orders for the step."""
        return KvortexMetadata(self._side.orders(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        """What workers said of a step."""
        stats = getattr(connector_output, "kv_connector_stats", None)
        if stats is not None and _REPORT in stats.data:
            self._side.absorb(stats.data.pop(_REPORT))  # it is nobody else's
        meta = getattr(connector_output, "kv_connector_worker_meta", None)
        if meta is not None:
            self._side.absorb(meta.report)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """vLLM may free the pages: who gets them next waits for transfers that still use them."""
        self._side.finished(request.request_id)
        return False, None

    def has_pending_push_work(self) -> bool:
        """Whether steps are needed for workers to say that transfers have ended."""
        return self._scheduler is not None and self._scheduler.busy

    @property
    def requires_kv_delivery(self) -> bool:
        """A block that was not saved is a miss, and no harm."""
        return False

    def reset_cache(self) -> bool:
        """Forgets all blocks."""
        self._side.reset()
        return True

    def shutdown(self) -> None:
        """Waits for transfers, and frees the pool."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.store.close()

    @property
    def _side(self) -> SchedulerSide:
        if self._scheduler is None:
            raise ConfigError("a worker's connector was asked what only the scheduler's knows")
        return self._scheduler
