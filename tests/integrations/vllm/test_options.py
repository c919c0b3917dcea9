"""``kv_connector_extra_config``: kvortex's own names, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from kvortex.errors import ConfigError
from kvortex.integrations.vllm.options import OF_VLLM, Identity, prompts_only, read_options, slots_for

WHO = Identity("a/model", "bfloat16", 32, 1, 2, "engine")


def test_values_are_read_as_everywhere_and_vllm_says_the_rest() -> None:
    config = read_options({"cpu_pool_size_bytes": "1 GiB", "eviction_policy": "s3fifo", "salt": "x"}, WHO)
    assert (config.cpu_pool_size_bytes, config.eviction_policy, config.salt) == (1 << 30, "s3fifo", "x")
    assert (config.model, config.dtype, config.block_size, config.rank, config.world_size) == ("a/model", "bfloat16", 32, 1, 2)
    assert read_options(None, WHO).cpu_pool_size_bytes == 1 << 30


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"cpu_pool_bytes": 1}, "kv_connector_extra_config: unknown option 'cpu_pool_bytes'; known are admit_after, "),
        ({"model": "other"}, "'model': vLLM says that itself"),
        ({"codec": "plane"}, "codec = 'plane': vLLM's blocks are not coded yet"),
        ({"rank": 0, "world_size": 1}, "'rank', 'world_size': vLLM says that itself"),
        ({"block_size": 16}, "'block_size': vLLM says that itself"),
        ({"spec_name": "X"}, "'spec_name' is an option of vLLM's OffloadingConnector"),
        ({"tiers": ["disk:/x"]}, "'tiers': kvortex keeps vLLM's blocks in RAM here"),
        ({"eviction_policy": "mru"}, "eviction_policy = 'mru'"),
        ({"cpu_pool_size_bytes": "much"}, "cpu_pool_size_bytes: 'much' is no size"),
    ],
)
def test_a_wrong_option_is_refused_by_name(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_options(extra, WHO)


def test_a_spec_leaves_vllms_own_names_alone_and_no_others() -> None:
    extra = {"spec_name": "KvortexOffloadingSpec", "spec_module_path": "kvortex.integrations.vllm", "block_size": 64}
    assert read_options(extra, WHO, OF_VLLM).block_size == 32
    with pytest.raises(ConfigError, match="unknown option 'cpu_bytes_to_use'"):
        read_options({**extra, "cpu_bytes_to_use": 1}, WHO, OF_VLLM)


def test_vllms_word_for_prompts_alone_is_read_with_its_default() -> None:
    assert prompts_only({}) and prompts_only({"offload_prompt_only": True}) and not prompts_only({"offload_prompt_only": False})
    with pytest.raises(ConfigError, match="offload_prompt_only = 'yes': must be true or false"):
        prompts_only({"offload_prompt_only": "yes"})


def test_slots_are_whole_ones_of_4_kib() -> None:
    config = read_options({"cpu_pool_size_bytes": 10 * 8192 + 1}, WHO)
    assert (slots_for(config, 8000), slots_for(config, 8192, 3), slots_for(config, 8193)) == (10, 3, 6)
    with pytest.raises(ConfigError, match="does not hold one block, which takes 90112 bytes"):
        slots_for(config, 90000)
