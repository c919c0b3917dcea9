"""What this machine has. Each probe gives names and values, or raises: ``doctor`` shows why."""

from __future__ import annotations

import importlib
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from kvortex.cli.profiles import facts
from kvortex.config import KVortexConfig
from kvortex.devices import cuda_available
from kvortex.devices.cuda import CudaDevice
from kvortex.devices.driver import api, check
from kvortex.errors import hidden
from kvortex.transfer.profiles.profile import guess

Facts = dict[str, Any]
COMPILER_LIBRARIES = ("nvvm", "nvrtc", "nvJitLink")

_PCI, _NODES, _HUGE = (
    Path("/sys/bus/pci/devices"),
    Path("/sys/devices/system/node"),
    Path("/sys/kernel/mm/transparent_hugepage/enabled"),
)
# GT/s of a lane, which is what sysfs says, to the generation that people say.
_GENERATIONS = {"2.5": 1, "5.0": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}


def driver() -> Facts:
    """Whether a GPU can be used, the kernel driver, and the newest CUDA that it runs."""
    available, reason = cuda_available()
    if not available:
        return {"usable": False, "reason": reason, "nvidia_gpus_on_the_bus": _gpus_on_the_bus()}
    version = int(check(api().cuDriverGetVersion(), "cuDriverGetVersion"))
    return {"usable": True, "version": CudaDevice(0).describe()["driver"], "cuda": f"{version // 1000}.{version % 1000 // 10}"}


def _gpus_on_the_bus() -> int:
    """NVIDIA's display and 3D controllers, which are there even where no driver is."""
    found = 0
    for folder in _PCI.glob("*") if _PCI.is_dir() else ():
        vendor, kind = ((folder / name).read_text().strip() for name in ("vendor", "class"))
        found += vendor == "0x10de" and kind.startswith("0x03")
    return found


def gpu_count() -> int:
    """GPUs that can be used."""
    return int(check(api().cuDeviceGetCount(), "cuDeviceGetCount")) if cuda_available()[0] else 0


def gpu(ordinal: int) -> Facts:
    """One GPU and its link."""
    found = CudaDevice(ordinal).describe()
    folder = _PCI / found["pci_bus_id"]
    return {
        "name": found["gpu"],
        "compute_capability": found["compute_capability"],
        "multiprocessors": found["multiprocessors"],
        "memory_bytes": found["memory_bytes"],
        "pci_bus_id": found["pci_bus_id"],
        "pcie_now": _link(folder, "current"),  # an idle GPU may show less than it can
        "pcie_most": _link(folder, "max"),
        "numa_node": found["numa_node"],
    }


def transfers(ordinal: int) -> Facts:
    """The profile that engines on a GPU work with: measured on a GPU of this kind, or guessed."""
    device = CudaDevice(ordinal)
    profile_store = importlib.import_module("kvortex.transfer.profiles.store")
    stored = profile_store.load(device)
    profile = stored if stored is not None else guess(device.link_rate, device.multiprocessors)
    told = "yes" if stored is not None else "no: guessed from the link; run kvortex calibrate"
    return {"calibrated": told, "file": str(profile_store.path_of(device)) if stored is not None else None, **facts(profile)}


def _link(folder: Path, which: str) -> str:
    try:
        speed, width = ((folder / f"{which}_link_{name}").read_text().strip() for name in ("speed", "width"))
    except OSError as error:
        return f"unknown: {error.strerror}"
    generation = _GENERATIONS.get(speed.split(" ")[0])
    return f"generation {generation} x{width}" if generation else f"{speed} x{width}"


def compiler() -> Facts:
    """The libraries that turn kernels into machine code, wherever cuda-python finds them."""
    load = importlib.import_module("cuda.pathfinder").load_nvidia_dynamic_lib
    found: Facts = {}
    for name in COMPILER_LIBRARIES:
        try:
            found[name] = load(name).abs_path
        except Exception as error:  # the finder has errors of its own, and the loader's
            found[name] = None
            found[f"{name}_reason"] = (str(error).splitlines() or [type(error).__name__])[0]
    return found


def nvjitlink_version() -> tuple[int, int]:
    """CUDA version of the linker that makes cubins."""
    major, minor = importlib.import_module("cuda.bindings.nvjitlink").version()
    return int(major), int(minor)


def memory() -> Facts:
    """RAM, NUMA nodes, huge pages, and how much may be locked."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    nodes = sorted(entry.name for entry in _NODES.glob("node[0-9]*")) if _NODES.is_dir() else []
    return {
        "available_bytes": int(fields["MemAvailable"].split()[0]) << 10,
        "total_bytes": int(fields["MemTotal"].split()[0]) << 10,
        "numa_nodes": len(nodes) or 1,
        "memlock_soft": None if soft == resource.RLIM_INFINITY else soft,
        "memlock_hard": None if hard == resource.RLIM_INFINITY else hard,
        "transparent_huge_pages": _chosen(_HUGE),
        "reserved_huge_pages": int(fields.get("HugePages_Total", "0")),
    }


def _chosen(path: Path) -> str:
    """The bracketed word of ``always [madvise] never``."""
    try:
        words = path.read_text().split()
    except OSError as error:
        return f"unknown: {error.strerror}"
    return next((word[1:-1] for word in words if word.startswith("[")), " ".join(words))


def cache() -> Facts:
    """The folder of compiled kernels, and what is in it."""
    folder: Path = importlib.import_module("kvortex.kernels.cache").cache_folder()
    cubins = sorted(path.name for path in folder.glob("*.cubin")) if folder.is_dir() else []
    return {"folder": str(folder), "writable": _writable(folder), "cubins": cubins}


def _writable(folder: Path) -> bool:
    """By writing: modes say little about containers and read-only mounts. Leaves nothing, no folder either."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there):
            return True
    except OSError:
        return False


def build(compute_capability: tuple[int, int]) -> Facts:
    """Compiles every kernel, past the cache."""
    module = importlib.import_module("kvortex.kernels.build")
    found: Facts = {"compute_capability": ".".join(map(str, compute_capability))}
    for name in module.KERNELS:
        began = time.perf_counter()
        try:
            size = len(module.compile_kernel(name, compute_capability).code)
        except Exception as error:  # one kernel that fails must not hide another that does not
            found[name] = " ".join(f"failed: {error}".split())
        else:
            found[name] = f"{size} bytes in {time.perf_counter() - began:.1f} s"
    return found


def tiers() -> Facts:
    """Whether the tiers that the environment names (``KVORTEX_TIERS``) work; empty where it names none."""
    text = os.environ.get("KVORTEX_TIERS", "")
    named = KVortexConfig.from_mapping({"tiers": text}).tiers if text else ()
    tools = importlib.import_module("kvortex.tiers.tools")
    tables = os.environ.get("KVORTEX_CODEC_TABLES")
    return {hidden(str(entry)): tools.probe(entry, tables) for entry in named}


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))
