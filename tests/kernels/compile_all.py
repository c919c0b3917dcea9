"""``python -m tests.kernels.compile_all FOLDER``: every kernel for every architecture, in the order of their test."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import conftest  # noqa: F401  (makes kvortex.kernels importable)
from kvortex.errors import BuildError
from kvortex.kernels import build
from tests.kernels.beside import file_of
from tests.kernels.compiled import ARCHITECTURES, compiled


def main(folder: Path) -> None:
    for name in build.KERNELS:
        for capability in ARCHITECTURES:
            try:
                cubin = compiled(name, capability)
            except BuildError:  # which its test will come to by itself
                continue
            new = folder / "new"
            new.write_bytes(pickle.dumps(cubin))
            new.replace(folder / file_of(name, capability))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
