"""NUMA nodes are counted and memory is bound to one where that can be; where not, a reason comes back and never an error."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from typing import Any

import pytest

from kvortex.memory import numa
from kvortex.memory.mapping import HUGE_PAGE, Mapping


@pytest.mark.parametrize(
    ("entries", "count"), [(["node0"], 1), (["node0", "node1", "node12"], 3), ([], 1), (["online", "has_cpu", "nodes"], 1)]
)
def test_node_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, entries: list[str], count: int) -> None:
    for entry in entries:
        (tmp_path / entry).mkdir()
    monkeypatch.setattr(numa.pathlib, "Path", lambda _: tmp_path)
    assert numa.node_count() == count


def test_node_count_where_sysfs_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(numa.pathlib, "Path", lambda _: tmp_path / "absent")
    assert numa.node_count() == 1


def test_this_machine() -> None:
    assert numa.node_count() >= 1


@pytest.mark.parametrize("node", [0, 1, 63, 64, 1000])
def test_binding_here_gives_nothing_or_a_reason(node: int) -> None:
    mapping = Mapping(HUGE_PAGE)
    try:
        reason = numa.bind(mapping.address, mapping.nbytes, node)
        assert reason is None or (isinstance(reason, str) and reason)
        if node >= 64 > numa.node_count() and platform.machine() in numa._MBIND:
            assert reason is not None and reason.startswith(f"mbind to node {node} failed with errno ")
    finally:
        mapping.close()


def test_memory_bound_to_node_0_can_be_used() -> None:
    mapping = Mapping(2 * HUGE_PAGE, 0)
    ctypes.memset(mapping.address, 7, mapping.nbytes)
    assert ctypes.string_at(mapping.address + mapping.nbytes - 1, 1) == b"\7"
    mapping.close()


def test_an_address_that_is_no_mapping_gives_a_reason() -> None:
    reason = numa.bind(4096, 4096, 0)
    assert reason is not None and ("errno" in reason or "no mbind known" in reason)


def test_an_unknown_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa.platform, "machine", lambda: "vax")
    assert numa.bind(4096, 4096, 0) == "no mbind known for vax"


class FakeLibc:
    """Takes system calls down."""

    def __init__(self, result: int) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.result = result
        libc = self

        class Function:
            restype: Any = None

            def __call__(self, *arguments: Any) -> int:
                number, address, nbytes, mode, mask, bits, flags = arguments
                libc.seen.append((number.value, address.value, nbytes.value, mode.value, list(mask), bits.value, flags.value))
                return libc.result

        self.syscall = Function()


@pytest.mark.parametrize(("machine", "number"), [("x86_64", 237), ("aarch64", 235)])
@pytest.mark.parametrize(
    ("node", "mask"), [(0, [1]), (1, [2]), (63, [1 << 63]), (64, [0, 1]), (70, [0, 1 << 6]), (130, [0, 0, 4])]
)
def test_the_mask_has_one_bit(
    monkeypatch: pytest.MonkeyPatch, machine: str, number: int, node: int, mask: list[int]
) -> None:
    libc = FakeLibc(0)
    monkeypatch.setattr(numa.platform, "machine", lambda: machine)
    monkeypatch.setattr(numa.ctypes, "CDLL", lambda *_, **__: libc)
    assert numa.bind(0x20_0000, 8192, node) is None
    assert libc.seen == [(number, 0x20_0000, 8192, 2, mask, 64 * len(mask) + 1, 0)]


def test_a_refusal_has_its_errno(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = FakeLibc(-1)
    monkeypatch.setattr(numa.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(numa.ctypes, "CDLL", lambda *_, **__: libc)
    monkeypatch.setattr(numa.ctypes, "get_errno", lambda: 1)
    assert numa.bind(0x20_0000, 8192, 3) == "mbind to node 3 failed with errno 1"


def test_where_pages_are() -> None:
    """This machine's own answer: a page that was written to is on a node, one that was not is nowhere."""
    mapping = Mapping(2 * HUGE_PAGE)
    try:
        ctypes.memset(mapping.address, 1, 1)
        found = numa.nodes_of([mapping.address, mapping.address + HUGE_PAGE])
        if found is None:
            pytest.skip("this kernel does not say where pages are")
        assert 0 <= found[0] < 1024 and found[1] < 0
        assert numa.misplaced(mapping.address, 4096, found[0]) is None
        other = found[0] + 1
        assert numa.misplaced(mapping.address, 4096, other) == f"1 of 1 pages looked at are not on NUMA node {other}"
    finally:
        mapping.close()


def test_a_kernel_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa.platform, "machine", lambda: "vax")
    assert numa.nodes_of([0]) is None
    assert numa.misplaced(0, 4096, 0) == "the kernel does not say which NUMA node the pool is on"
