"""vLLM keeps its KV blocks in kvortex: by a connector, behind vLLM's own OffloadingConnector, or in tiers below vLLM's pool.

vLLM is told so in ``--kv-transfer-config``: ``"kv_connector": "KvortexConnector"`` and ``"kv_connector_module_path"``; or, in
the extra config of its own connector, ``"spec_name": "KvortexOffloadingSpec"`` and ``"spec_module_path"``; or, among the
secondary tiers of its own spec, ``"type": "KvortexTier"`` and ``"module_path"``. The name of this module is the path;
docs/vllm.md has whole commands. Neither vLLM nor torch is imported before vLLM asks for one of them.
"""

from __future__ import annotations

import importlib
from typing import Any

_PLUGINS = {"KvortexConnector": "connector", "KvortexOffloadingSpec": "spec", "KvortexTier": "tier"}


def __getattr__(name: str) -> Any:
    if name in _PLUGINS:
        return getattr(importlib.import_module(f"{__name__}.{_PLUGINS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
