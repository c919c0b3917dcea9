"""Every KV layout that vLLM has, saved and loaded by slots: each byte of a block, and no byte beside. Also on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvortex.config import KVortexConfig
from kvortex.devices import Device
from kvortex.errors import LayoutError
from kvortex.integrations.vllm import layouts
from kvortex.integrations.vllm.messages import Blocks, rows_of
from kvortex.integrations.vllm.store import Store
from kvortex.layout import KVLayout
from tests.integrations.vllm.tensors import Backend, FakeTensor, caches_of, tensors_of
from tests.pages import PagedCache, Tensor, assert_same

B, N, H, D, L = 13, 16, 2, 24, 3
FLASH, FLASH_INFER, CPU = Backend((2, "B", "N", "H", "D")), Backend(("B", 2, "N", "H", "D")), Backend((2, "B", "H", "N", "D"))
MLA, FP8_MLA = Backend(("B", "N", 576)), Backend(("B", "N", 656))
HND = (0, 1, 3, 2, 4)

# Name: block axis, tensors, and the backend that finds the axis.
PER_LAYER: dict[str, tuple[int, Callable[[Device], list[Tensor]], Backend | None]] = {
    "0.15 FlashAttention NHD": (1, lambda d: tensors_of(d, L, (2, B, N, H, D)), FLASH),
    "0.15 FlashAttention HND": (1, lambda d: tensors_of(d, L, (2, B, N, H, D), order=HND), FLASH),
    "0.15 FlashInfer, Triton NHD": (0, lambda d: tensors_of(d, L, (B, 2, N, H, D)), FLASH_INFER),
    "0.15 FlashInfer HND": (0, lambda d: tensors_of(d, L, (B, 2, N, H, D), order=HND), FLASH_INFER),
    "0.15 CPU": (1, lambda d: tensors_of(d, L, (2, B, H, N, D)), CPU),
    "0.15 MLA": (0, lambda d: tensors_of(d, L, (B, N, 576)), MLA),
    "0.15 fp8 MLA": (0, lambda d: tensors_of(d, L, (B, N, 656), 1), FP8_MLA),
    "0.15 indexer beside MLA": (0, lambda d: [*tensors_of(d, 2, (B, N, 576)), *tensors_of(d, 2, (B, N, 132), 1)], None),
    "fp8": (1, lambda d: tensors_of(d, L, (2, B, N, H, D), 1), FLASH),
    "0.26 [B,H,N,2D]": (0, lambda d: tensors_of(d, L, (B, H, N, 2 * D)), None),
    "padded pages": (0, lambda d: tensors_of(d, L, (B, H, N, 2 * D), pad={1: 512}), None),
    "block of 7 tokens": (1, lambda d: tensors_of(d, L, (2, B, 7, H, D)), FLASH),
}


def moved(device: Device, layout: KVLayout, cache: PagedCache) -> None:
    """Saves blocks, overwrites all, loads them elsewhere, and looks at every byte."""
    slot_bytes = -(-layout.record_bytes // 4096) * 4096
    small: dict[str, Any] = {"gpu_pool_size_bytes": 8 << 20, "calibrate": "never"}
    store = Store(KVortexConfig(cpu_pool_size_bytes=B * slot_bytes, device=device.name, **small), layout, B)
    try:
        rng, before = np.random.default_rng(3), cache.randomize()
        saved, slots = rng.permutation(B)[:9], rng.permutation(B)[:9]
        names = rows_of([bytes([i] * 36) for i in range(9)])
        store.save(1, Blocks(slots, names, saved))
        store.wait([1])
        assert [(done.saved, done.failed) for done in store.poll()] == [(True, ())]
        assert_same(cache.memory(), before)
        poisoned = cache.randomize()
        order, targets = rng.permutation(9)[:6], rng.permutation(B)[:6]
        store.load(2, Blocks(slots[order], names[order], targets))
        store.wait([2])
        assert [(done.saved, done.failed) for done in store.poll()] == [(False, ())]
        assert_same(cache.memory(), cache.expected(poisoned, before, list(zip(saved[order], targets, strict=True))))
    finally:
        store.close()


@pytest.mark.parametrize("name", PER_LAYER)
def test_tensors_by_layer(device: Device, name: str) -> None:
    axis, make, backend = PER_LAYER[name]
    cache = PagedCache(device, make(device), axis)
    caches: dict[str, Any] = caches_of(cache)
    axes = layouts.block_axes(caches, dict.fromkeys(caches, backend))
    assert set(axes.values()) == {axis}
    moved(device, layouts.layout_of(caches, axes, B), cache)


ACROSS: dict[str, tuple[int, tuple[int, ...], Backend]] = {
    "FlashAttention": (0, (B, L, 2, N, H, D), Backend((2, "B", "N", "H", "D"), (2, 0, 1, 3, 4, 5))),
    "FlashAttention HND": (0, (B, H, L, 2, N, D), Backend((2, "B", "N", "H", "D"), (2, 4, 0, 1, 3, 5))),
    "FlashInfer": (0, (B, L, 2, N, H, D), Backend(("B", 2, "N", "H", "D"), (1, 0, 2, 3, 4, 5))),
    "MLA": (0, (B, L, N, 576), Backend(("B", "N", 576), (1, 0, 2, 3))),
    "blocks not first": (1, (L, B, 2, N, H, D), Backend(("B", 2, "N", "H", "D"), (0, 1, 2, 3, 4, 5))),
}


@pytest.mark.parametrize("name", ACROSS)
def test_one_tensor_of_all_layers(device: Device, name: str) -> None:
    axis, shape, backend = ACROSS[name]
    cache = PagedCache(device, [Tensor(device, shape)], axis)
    caches = {"all": FakeTensor(cache.tensors[0])}
    axes = layouts.block_axes(caches, {"all": backend})
    assert axes == {"all": axis}
    moved(device, layouts.layout_of(caches, axes, B), cache)


@pytest.mark.parametrize(("axis", "shape"), [(1, (2, 4 * B, 4, H, D)), (0, (4 * B, 2, 4, H, D))])
def test_blocks_of_the_kernel_smaller_than_the_schedulers(device: Device, axis: int, shape: tuple[int, ...]) -> None:
    kernel = PagedCache(device, tensors_of(device, L, shape), axis)
    caches = caches_of(kernel)
    layout = layouts.layout_of(caches, dict.fromkeys(caches, axis), B)
    assert layout.num_blocks == B and layout.record_bytes == 4 * kernel.layout.record_bytes

    class Grouped(PagedCache):  # four of the kernel's blocks move with each of the scheduler's
        def expected(self, memory: Any, source: Any, moves: Any) -> Any:
            return super().expected(memory, source, [(4 * a + i, 4 * b + i) for a, b in moves for i in range(4)])

    moved(device, layout, Grouped(device, kernel.tensors, axis))


@pytest.mark.parametrize("interleaved", [False, True])
def test_canonical_tensors_of_newer_versions(device: Device, interleaved: bool) -> None:
    page = 2 * N * H * D
    pad = {0: 0} if not interleaved else {1: 640}
    cache = PagedCache(device, tensors_of(device, L, (B, page), 1, pad=pad), 0)
    canonical = [SimpleNamespace(tensor=tensor, page_size_bytes=page) for tensor in caches_of(cache).values()]
    moved(device, layouts.canonical_layout(canonical), cache)


def test_layers_that_share_memory_count_once() -> None:
    from kvortex.devices import open_device

    cache = PagedCache(open_device("host"), tensors_of(open_device("host"), 2, (B, 64)), 0)
    caches = caches_of(cache)
    layout = layouts.layout_of({**caches, "shared": caches["layers.0"]}, {**dict.fromkeys(caches, 0), "shared": 0}, B)
    assert layout.record_bytes == cache.layout.record_bytes


def test_what_is_no_tensor_or_has_other_blocks_is_refused() -> None:
    from kvortex.devices import open_device

    caches: dict[str, Any] = caches_of(PagedCache(open_device("host"), tensors_of(open_device("host"), 1, (B, 64)), 0))
    with pytest.raises(LayoutError, match="layers.0: 13 blocks on axis 0"):
        layouts.layout_of(caches, {"layers.0": 0}, 5)
    with pytest.raises(LayoutError, match="layer mamba: list is no tensor"):
        layouts.layout_of({"mamba": [1]}, layouts.block_axes({"mamba": [1]}, {}), B)
    with pytest.raises(LayoutError, match="KV tensors of 5 axes"):
        layouts.block_axis(FLASH, 4)
