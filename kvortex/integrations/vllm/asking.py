"""What is asked of vLLM's configs and layers, which versions keep in different places."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from kvortex.errors import ConfigError
from kvortex.integrations.vllm.options import SOURCE, Identity

log = logging.getLogger(__name__)


class Caches(NamedTuple):
    """Of a KV cache with one group: blocks, tokens in each, and bytes of each over all layers of a worker."""

    num_blocks: int
    block_size: int
    block_bytes: int


def cache_of(config: Any) -> Caches:
    """From vLLM's ``KVCacheConfig``.

    Raises
    ------
    ConfigError
        There is none, or its groups are several (models of several kinds of attention, with the hybrid allocator).
    """
    if config is None:
        raise ConfigError("this vLLM gives its connectors no kv_cache_config; kvortex needs it")
    groups = config.kv_cache_groups
    if len(groups) != 1:
        raise ConfigError(
            f"the KV cache has {len(groups)} groups; kvortex's connector serves one. Use KvortexOffloadingSpec, or vLLM's "
            "--disable-hybrid-kv-cache-manager"
        )
    spec = groups[0].kv_cache_spec
    layers = 1 if hasattr(spec, "kv_cache_specs") else len(groups[0].layer_names)  # a spec of specs counts all its layers
    return Caches(config.num_blocks, spec.block_size, spec.page_size_bytes * layers)


def identity_of(config: Any, block_size: int) -> Identity:
    """From vLLM's config. ``block_size`` is what one worker's pages hold; vLLM counts in those of all that share a context."""
    parallel, cache = config.parallel_config, config.cache_config
    spread = getattr(parallel, "decode_context_parallel_size", 1) * getattr(parallel, "prefill_context_parallel_size", 1)
    dtype = config.model_config.dtype if cache.cache_dtype == "auto" else cache.cache_dtype
    return Identity(
        model=str(config.model_config.model),
        dtype=str(dtype).removeprefix("torch."),
        block_size=block_size * spread,
        rank=parallel.rank,
        world_size=parallel.world_size,
        engine_id=str(config.kv_transfer_config.engine_id),
    )


def backends_of(config: Any, names: list[str]) -> dict[str, Any]:
    """Attention backends by layer, as far as they are told."""
    layers = getattr(config.compilation_config, "static_forward_context", {})
    found = {}
    for name in names:
        get = getattr(layers.get(name), "get_attn_backend", None)
        if get is not None:
            found[name] = get()
    return found


def warn_of_policy(config: Any) -> None:
    """Says what becomes of a load that fails, where vLLM would fail its request."""
    if getattr(config, "kv_load_failure_policy", "recompute") != "recompute":
        log.warning(
            'with "kv_load_failure_policy": "recompute" beside %s vLLM computes blocks that kvortex finds damaged; as it is '
            "now, their requests fail",
            SOURCE,
        )
