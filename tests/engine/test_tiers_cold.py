"""Nothing is left to be compiled, or loaded from a cache, once an engine with tiers is there: that would take seconds of a
deadline, and a breaker would count it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
import json, sys
from numba.core.registry import CPUDispatcher
from kvortex.devices import HostDevice
from tests.pages import PagedCache, keys_of

def loaded():
    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith("kvortex") and module is not None]
    functions = [item for module in modules for item in vars(module).values() if isinstance(item, CPUDispatcher)]
    return {f"{each.py_func.__module__}.{each.py_func.__name__}": len(each.overloads) for each in functions}

cache = PagedCache.plain(HostDevice())
with cache.engine(slots=4, tiers=(sys.argv[1],), digests=sys.argv[2] == "True") as engine:
    before = loaded()
    for at in range(8):
        assert engine.save_blocks(keys_of(at), [at]).wait().all() and engine.flush()
    engine.prefetch(keys_of(0)).wait(60)
    assert engine.load_blocks(keys_of(0, 1, 2), [10, 11, 12]).wait().all()
    engine.check_blocks(keys_of(1, 99), timeout=1)
    engine.get_stats()
    after = loaded()
print(json.dumps([name for name in after if after[name] != before.get(name)]))
"""


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_all_is_loaded_when_the_engine_is_there(kind: str, digests: bool, tmp_path: Path) -> None:
    url = f"disk:{tmp_path}?capacity=1MiB" if kind == "disk" else "memory:cold"
    command = [sys.executable, "-c", _SCRIPT, f"{url}{'&' if '?' in url else '?'}read_timeout_s=60", str(digests)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2], check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == []
