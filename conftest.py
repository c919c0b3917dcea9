"""Makes ``kvortex.kernels`` importable from the checkout, installed or not.

It lies in ``kernels/``, and only an installation maps it into the package. ``python -m pytest`` puts the checkout first
on the path, where ``kvortex/`` hides an installed copy and has no ``kernels`` of its own; and where another checkout is
installed, its kernels would be taken for this one's.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import kvortex


def _map_kernels(folder: Path) -> None:
    name = "kvortex.kernels"
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kvortex.kernels = module


_HERE = Path(__file__).resolve().parent
_found = importlib.util.find_spec("kvortex.kernels")
_of_here = Path(str(kvortex.__file__)).resolve().parents[1] == _HERE
if _found is None or (_of_here and Path(str(_found.origin)).resolve().parent != _HERE / "kernels"):
    _map_kernels(_HERE / "kernels")
