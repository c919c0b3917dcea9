"""``kv_connector_extra_config`` as a kvortex config."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from kvortex.config import KVortexConfig
from kvortex.errors import ConfigError, shown
from kvortex.keys import Namespace
from kvortex.memory.arena import SLOT_ALIGNMENT

SOURCE = "kv_connector_extra_config"
# Options that vLLM itself reads from the same dictionary, where a spec is plugged in.
PROMPTS_ONLY = "offload_prompt_only"
OF_VLLM = {
    "spec_name", "spec_module_path", "block_size", "blocks_per_chunk", PROMPTS_ONLY, "self_describing_kv_events",
    "sync_load_budget_bytes",
}  # fmt: skip
# Of an engine that finds blocks by their own keys. Here it finds them by slots that one process counts: below RAM nobody would.
BELOW = {"tiers", "tier_pool_share"}
# What vLLM knows, and nobody else should say.
FROM_VLLM = {"model", "dtype", "lora", "rank", "world_size", "max_block_bytes", "key_scheme", "key_seed"}


@dataclasses.dataclass(frozen=True)
class Identity:
    """What vLLM says of an engine: model and dtype of its cache, tokens in a block, which worker of how many this is."""

    model: str
    dtype: str
    block_size: int
    rank: int
    world_size: int
    engine_id: str


def read_options(extra: Mapping[str, Any] | None, identity: Identity, beside: Collection[str] = ()) -> KVortexConfig:
    """A config from the options that a user gave.

    Parameters
    ----------
    extra
        Options by kvortex's own names.
    identity
    beside
        Names that vLLM reads itself.

    Raises
    ------
    ConfigError
        A name is unknown, or of what vLLM says itself; a value is impossible.
    """
    given = {name: value for name, value in (extra or {}).items() if name not in beside}
    taken = sorted(FROM_VLLM.intersection(given) | ({"block_size"} & set(given)))
    if taken:
        raise ConfigError(f"{SOURCE}: {', '.join(map(shown, taken))}: vLLM says that itself; leave it out")
    for name in given:
        if name in BELOW:
            raise ConfigError(
                f"{SOURCE}: {shown(name)}: kvortex keeps vLLM's blocks in RAM here. Tiers below RAM are plugged into vLLM's "
                "TieringOffloadingSpec, as KvortexTier"
            )
        if name in OF_VLLM:
            raise ConfigError(f"{SOURCE}: {shown(name)} is an option of vLLM's OffloadingConnector, which this is not")
    said = {
        "model": identity.model, "dtype": identity.dtype, "block_size": identity.block_size,
        "rank": identity.rank % identity.world_size, "world_size": identity.world_size,
    }  # fmt: skip
    config = KVortexConfig.from_mapping({**given, **said}, source=SOURCE)
    if config.codec != "raw":
        raise ConfigError(f"{SOURCE}: codec = {shown(config.codec)}: vLLM's blocks are not coded yet; leave it out")
    return config


def prompts_only(extra: Mapping[str, Any]) -> bool:
    """vLLM's ``offload_prompt_only``, which the connector reads too, and with vLLM's default.

    What decoding computed for a token differs in its last bits from what a prefill computes. So answers are those of a run
    without kvortex, also after preemptions, only while no blocks of generated tokens are loaded.

    Raises
    ------
    ConfigError
        It is neither true nor false.
    """
    value = extra.get(PROMPTS_ONLY, True)
    if not isinstance(value, bool):
        raise ConfigError(f"{SOURCE}: {PROMPTS_ONLY} = {shown(value)}: must be true or false")
    return value


def slots_for(config: KVortexConfig, block_bytes: int, blocks_per_slot: int = 1) -> int:
    """How many slots the scheduler may count on, of so many blocks each, in every rank's pool.

    Raises
    ------
    ConfigError
        The pool holds none.
    """
    each = -(-block_bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT * blocks_per_slot
    slots = config.cpu_pool_size_bytes // each
    if slots < 1:
        size = config.cpu_pool_size_bytes
        raise ConfigError(f"{SOURCE}: cpu_pool_size_bytes = {size}: does not hold one block, which takes {each} bytes")
    return slots


def ledger_namespace(config: KVortexConfig) -> Namespace:
    """What the scheduler's names are of; it knows nothing of ranks and layouts."""
    return Namespace(model=config.model, dtype=config.dtype, block_size=config.block_size, salt=config.salt)
