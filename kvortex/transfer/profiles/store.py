"""Profiles on disk: one for each kind of GPU, link and driver, in the cache folder, as JSON behind a checked header."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import pathlib
import re
import time
from collections.abc import Iterator

from kvortex import __version__
from kvortex.devices.cuda import CudaDevice
from kvortex.kernels import cache
from kvortex.transfer.executor import poll
from kvortex.transfer.profiles.profile import Profile, from_plain, to_plain

_MAGIC, _VERSION = b"KVXPROFL", 9  # another version where what is measured, or how, changes
_LONGEST_WAIT_S = 60.0


def path_of(device: CudaDevice) -> pathlib.Path:
    """The file for a GPU. GPUs of one kind with like links share it, here and where the folder is copied to."""
    facts = device.describe()
    kind = {name: facts[name] for name in ("gpu", "compute_capability", "multiprocessors", "memory_bytes", "driver")}
    kind |= {"cuda": facts["cuda_driver_api"], "link": device.link_rate, "kvortex": __version__}
    digest = hashlib.sha256(json.dumps(kind, sort_keys=True).encode()).hexdigest()
    name = re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()).strip("-")
    folder: pathlib.Path = cache.cache_folder()
    return folder / f"profile-{name[:60]}-{digest[:24]}.kvx"


def load(device: CudaDevice) -> Profile | None:
    """The profile that was measured on a GPU of this kind; None where there is none, or none that is whole."""
    body = cache.read(path_of(device), _MAGIC, _VERSION)
    try:
        return None if body is None else from_plain(json.loads(body))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def save(device: CudaDevice, profile: Profile) -> pathlib.Path | None:
    """Keeps a profile, in place of an older one; None where the folder cannot be written."""
    path = path_of(device)
    return path if cache.write(path, _MAGIC, _VERSION, json.dumps(to_plain(profile)).encode()) else None


@contextlib.contextmanager
def alone(device: CudaDevice) -> Iterator[None]:
    """Keeps processes from measuring at the same time, which would tell each of them about the others.

    Where the folder cannot be written, or after a minute, they do. A process that ends lets go in any case.
    """
    path = path_of(device).with_suffix(".lock")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("wb"))

            def locked() -> bool:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
                return True

            poll(locked, time.monotonic() + _LONGEST_WAIT_S)
        yield
