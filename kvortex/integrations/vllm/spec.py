"""The OffloadingSpec that vLLM loads, in the form that this vLLM has."""

from __future__ import annotations

import importlib
import importlib.util

_NEW, _OLD = "vllm.v1.kv_offload.base", "vllm.v1.kv_offload.abstract"


def _form() -> str:
    if importlib.util.find_spec(_NEW) is not None:
        spec = importlib.import_module(_NEW).OffloadingSpec
        if hasattr(spec, "get_worker"):
            return "spec_new"
    elif importlib.util.find_spec(_OLD) is not None:
        found = importlib.import_module(_OLD).OffloadingManager.lookup.__code__.co_varnames
        if found[1:2] == ("block_hashes",):
            return "spec_old"
    raise ImportError(
        "this vLLM's offloading interface is one of those between 0.17 and 0.26, which kvortex does not serve; "
        "use KvortexConnector, which it does"
    )


KvortexOffloadingSpec = importlib.import_module(f"kvortex.integrations.vllm.{_form()}").KvortexOffloadingSpec
