"""``kvortex doctor``: what is here, what would run, and what is missing with the command that cures it."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from typing import Any

from kvortex.cli import console, probes
from kvortex.cli.versions import REQUIRED, versions

Report = dict[str, Any]
_TRANSFERS = "transfers_"  # and the name of a GPU: a section


def run(arguments: argparse.Namespace) -> int:
    """The command. Always 0: a machine without a GPU is no failure, and a probe that fails says so in its place."""
    report = examine(arguments.build)
    if arguments.json:
        print(json.dumps(report, indent=2))
        return 0
    for title, facts in report.items():
        if title == "missing":
            continue
        if isinstance(facts, dict):
            console.table(title.replace("_", " "), [(name.replace("_", " "), _shown(name, facts[name])) for name in facts])
        else:
            console.table(title.replace("_", " "), [("", str(facts))])
    rows = [(item["what"], item["cure"]) for item in report["missing"]]
    console.table("missing", rows or [("nothing", "all that this machine can run will run")])
    return 0


def examine(build: bool = False) -> Report:
    """All facts, by section; a section whose probe failed is the text ``"unknown: reason"``.

    Parameters
    ----------
    build
        Compile the kernels too.
    """
    report: Report = {"versions": _probe(versions), "driver": _probe(probes.driver)}
    count = _probe(probes.gpu_count)
    for ordinal in range(count if isinstance(count, int) else 0):
        report[f"cuda:{ordinal}"] = _probe(functools.partial(probes.gpu, ordinal))
        report[f"{_TRANSFERS}cuda:{ordinal}"] = _probe(functools.partial(probes.transfers, ordinal))
    report["compiler"] = _probe(probes.compiler)
    report["memory"] = _probe(probes.memory)
    report["kernel_cache"] = _probe(probes.cache)
    tiers = _probe(probes.tiers)
    if tiers:  # only where some are configured
        report["tiers"] = tiers
    if build:
        capability = str(_get(report, "cuda:0", "compute_capability") or "9.0")
        major, _, minor = capability.partition(".")
        report["kernels"] = _probe(functools.partial(probes.build, (int(major), int(minor))))
    report["would_run"] = _would_run(report)
    report["missing"] = _missing(report)
    return report


def _probe(look: Callable[[], Any]) -> Any:
    try:
        return look()
    except Exception as error:  # whatever it is, it is what the doctor came to find out
        return f"unknown: {type(error).__name__}: {error}"


def _get(report: Report, section: str, name: str) -> Any:
    """A fact, or None where its probe failed."""
    facts = report.get(section)
    return facts.get(name) if isinstance(facts, dict) else None


def _would_run(report: Report) -> Report:
    cores = _probe(probes.cores)
    result: Report = {"host": f"yes: copies between RAM and RAM by threads, {cores} cores"}
    gpus = [name for name in report if name.startswith("cuda:")]
    for name in gpus:
        result[name] = "yes: kernels and DMA, by routes that are chosen for each transfer (transfer_route)"
    if not gpus:
        result["cuda"] = f"no: {_get(report, 'driver', 'reason') or report['driver']}"
    elif not isinstance(report["kernel_cache"], dict):
        result.update(dict.fromkeys(gpus, "no: kvortex.kernels is not installed"))
    elif not _compiles(report) and not report["kernel_cache"]["cubins"]:
        result.update(dict.fromkeys(gpus, "no: the kernels cannot be compiled here, and none are cached"))
    result["device auto means"] = "cuda:0" if gpus else "host"
    return result


def _compiles(report: Report) -> bool:
    return all(_get(report, "compiler", name) for name in probes.COMPILER_LIBRARIES)


def _missing(report: Report) -> list[dict[str, str]]:
    """What keeps this machine from running at its best, most important first."""
    usable = _get(report, "driver", "usable")
    absent = [name for name in REQUIRED if not _get(report, "versions", name)]
    found = [(f"packages that kvortex needs: {', '.join(absent)}", f"pip install {' '.join(absent)}")] if absent else []
    if not usable and _get(report, "driver", "nvidia_gpus_on_the_bus"):
        found.append(("a working NVIDIA driver", "sudo apt install nvidia-driver-580 (a container: docker run --gpus all)"))
    found += _missing_compiler(report)
    if not isinstance(report["kernel_cache"], dict):
        found.append(("kvortex.kernels, which comes with an installation", "pip install . (in the kvortex checkout)"))
    elif not report["kernel_cache"]["writable"]:
        found.append(("a cache folder that can be written", "export KVORTEX_CACHE_DIR=/a/folder/of/yours"))
    for name in (name for name in report if name.startswith(_TRANSFERS)):
        if str(_get(report, name, "calibrated")).startswith("no"):
            gpu = name[len(_TRANSFERS) :]
            found.append((f"a calibration of {gpu}: how to transfer is guessed", f"kvortex calibrate --device {gpu}"))
    if _get(report, "memory", "transparent_huge_pages") == "never":
        cure = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
        found.append(("huge pages, for pinning large pools quickly", cure))
    if usable and _get(report, "memory", "memlock_soft") is not None:
        found.append(("unlimited locked memory, if pinning is refused", "ulimit -l unlimited (docker run --ulimit memlock=-1)"))
    tiers = report.get("tiers")
    for url, text in tiers.items() if isinstance(tiers, dict) else ():
        if not text.startswith("works"):
            found.append((f"a tier that works: {url}", f"{text}; see KVORTEX_TIERS"))
    if not _get(report, "versions", "rich"):
        found.append(("rich, for nicer tables", _extra("cli")))
    return [{"what": what, "cure": cure} for what, cure in found]


def _extra(name: str) -> str:
    """From the checkout: no package index has kvortex."""
    return f'pip install -e ".[{name}]" (in the kvortex checkout)'


def _missing_compiler(report: Report) -> list[tuple[str, str]]:
    """The compiler is needed by GPUs and by ``--build`` only, but says whether kernels can be tested here too."""
    cuda = str(_get(report, "driver", "cuda") or "13.0")
    extra = "cu12" if cuda.startswith("12.") else "cu13"
    cure = _extra(extra)
    if not _compiles(report):
        return [("the compiler of GPU kernels (not needed on the host device)", cure)]
    linker = _probe(probes.nvjitlink_version)
    if _get(report, "driver", "usable") and isinstance(linker, tuple) and linker[0] > int(cuda.partition(".")[0]):
        what = f"a compiler that suits the driver: it runs CUDA {cuda}, and nvJitLink is of {linker[0]}.{linker[1]}"
        return [(what, f"pip uninstall -y nvidia-nvjitlink nvidia-nvvm; {cure}")]
    return []


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "unlimited" if name.startswith("memlock") else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, int) and (name.endswith("_bytes") or name.startswith("memlock")):
        return f"{value / (1 << 30):.1f} GiB" if value >= 1 << 30 else f"{value >> 10} KiB"
    return str(value)
