"""Binding memory to a NUMA node, and asking where it is, through ``mbind`` and ``move_pages`` (no libnuma needed)."""

from __future__ import annotations

import ctypes
import pathlib
import platform

_MBIND = {"x86_64": 237, "aarch64": 235}
_MOVE_PAGES = {"x86_64": 279, "aarch64": 239}
_MPOL_BIND = 2
_SAMPLES, _PAGE = 64, 4096


def node_count() -> int:
    """NUMA nodes of this machine, from sysfs; 1 where it does not say."""
    nodes = pathlib.Path("/sys/devices/system/node")
    return max(1, sum(1 for entry in nodes.glob("node[0-9]*"))) if nodes.is_dir() else 1


def bind(address: int, nbytes: int, node: int) -> str | None:
    """Binds pages that nobody touched yet to a node.

    Parameters
    ----------
    address, nbytes
        A page-aligned range.
    node
        Index of the NUMA node.

    Returns
    -------
    str or None
        Why it did not work; None when it did. A pool on the wrong node is slow, not wrong, so this is no error.
    """
    number = _MBIND.get(platform.machine())
    if number is None:
        return f"no mbind known for {platform.machine()}"
    words = node // 64 + 1
    mask = (ctypes.c_uint64 * words)()
    mask[node // 64] = 1 << node % 64
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    arguments = (ctypes.c_long(number), ctypes.c_void_p(address), ctypes.c_ulong(nbytes), ctypes.c_int(_MPOL_BIND))
    # maxnode counts bits and the kernel wants one more than the mask holds
    if libc.syscall(*arguments, mask, ctypes.c_ulong(words * 64 + 1), ctypes.c_uint(0)):
        return f"mbind to node {node} failed with errno {ctypes.get_errno()}"
    return None


def nodes_of(addresses: list[int]) -> list[int] | None:
    """The NUMA node of the page at each address, a negative errno where none is; None where the kernel does not say."""
    number = _MOVE_PAGES.get(platform.machine())
    if number is None:
        return None
    count = len(addresses)
    pages, status = (ctypes.c_void_p * count)(*addresses), (ctypes.c_int * count)()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    # Process 0 is this one; no wanted nodes means that nothing moves and ``status`` is filled in.
    arguments = (ctypes.c_long(number), ctypes.c_int(0), ctypes.c_ulong(count), pages, ctypes.c_void_p(None), status)
    return None if libc.syscall(*arguments, ctypes.c_int(0)) else list(status)


def misplaced(address: int, nbytes: int, node: int) -> str | None:
    """How many of some evenly spread, resident pages lie on another node than they were bound to; None if none does."""
    step = max(_PAGE, nbytes // _SAMPLES)
    found = nodes_of(list(range(address, address + nbytes, step)))
    if found is None:
        return "the kernel does not say which NUMA node the pool is on"
    wrong = [where for where in found if where != node]
    return f"{len(wrong)} of {len(found)} pages looked at are not on NUMA node {node}" if wrong else None
