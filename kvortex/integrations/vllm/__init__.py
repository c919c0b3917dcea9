"""vLLM keeps its KV blocks in kvortex: as a connector, or as the store behind vLLM's own OffloadingConnector.

In ``--kv-transfer-config`` either ``{"kv_connector": "KvortexConnector", "kv_connector_module_path": "kvortex.integrations.vllm"}``,
or ``{"spec_name": "KvortexOffloadingSpec", "spec_module_path": "kvortex.integrations.vllm"}`` in the extra config of vLLM's own;
docs/vllm.md has whole commands. Neither vLLM nor torch is imported before vLLM asks for one of the two.
"""

from __future__ import annotations

import importlib
from typing import Any

_PLUGINS = {"KvortexConnector": "connector", "KvortexOffloadingSpec": "spec"}


def __getattr__(name: str) -> Any:
    if name in _PLUGINS:
        return getattr(importlib.import_module(f"{__name__}.{_PLUGINS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
