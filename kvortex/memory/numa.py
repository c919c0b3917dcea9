"""Binding memory to a NUMA node, through the ``mbind`` system call (no libnuma needed)."""

from __future__ import annotations

import ctypes
import pathlib
import platform

_MBIND = {"x86_64": 237, "aarch64": 235}
_MPOL_BIND = 2


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
