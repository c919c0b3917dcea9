"""The cache whose bytes follow from keys: what is right counts 0, and every kind of mix-up is seen."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from kvortex.cli.pages import Pages, _runs
from kvortex.devices import Device, HostDevice
from kvortex.devices.host import HostBuffer
from tests.cli.screen import FarDevice

BLOCKS, LAYERS, TOKENS, HEADS, DIM = 12, 3, 4, 2, 8
FRAGMENT = TOKENS * HEADS * DIM * 2
RECORD = LAYERS * 2 * FRAGMENT


def keys_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(count, 32), dtype=np.uint8)


@pytest.fixture
def pages(device: Device) -> Iterator[Pages]:
    with Pages(device, BLOCKS, LAYERS, TOKENS, HEADS, DIM) as made:
        yield made


def swap(pages: Pages, a: tuple[int, int, int], b: tuple[int, int, int]) -> None:
    """Exchanges two fragments, each (layer, side, block)."""
    places = [(pages._buffers[layer], (side * BLOCKS + block) * FRAGMENT) for layer, side, block in (a, b)]
    contents = [buffer.read(offset, FRAGMENT) for buffer, offset in places]
    for (buffer, offset), content in zip(places, contents[::-1], strict=True):
        buffer.write(content, offset)


def test_layout_is_what_it_says(pages: Pages) -> None:
    assert (pages.layout.num_blocks, pages.layout.num_layers, pages.layout.record_bytes) == (BLOCKS, LAYERS, RECORD)
    assert pages.layout.device == pages.device.name
    assert len(pages.layout.fragments) == 2 * LAYERS


def test_what_was_filled_is_right_and_nothing_else(pages: Pages) -> None:
    ids, keys = np.array([7, 0, 3, 4]), keys_of(4)
    pages.fill(ids, keys)
    assert pages.wrong_bytes(ids, keys) == 0
    assert pages.wrong_bytes(ids[:0], keys[:0]) == 0
    # A byte at random is right once in 256 times.
    assert pages.wrong_bytes(ids[::-1].copy(), keys) > 0.98 * 4 * RECORD
    assert pages.wrong_bytes(np.array([1, 2, 5, 6]), keys) > 0.98 * 4 * RECORD
    pages.clear(ids[:2])
    assert 0.98 * 2 * RECORD < pages.wrong_bytes(ids, keys) <= 2 * RECORD


@pytest.mark.parametrize(
    ("a", "b"),
    [((0, 0, 5), (1, 0, 5)), ((2, 0, 5), (2, 1, 5)), ((1, 1, 5), (1, 1, 6)), ((0, 1, 5), (1, 0, 5)), ((0, 0, 5), (2, 1, 6))],
    ids=["layers", "K and V", "blocks", "across", "far"],
)
def test_swapped_fragments_are_seen(pages: Pages, a: tuple[int, int, int], b: tuple[int, int, int]) -> None:
    ids, keys = np.array([5, 6]), keys_of(2)
    pages.fill(ids, keys)
    swap(pages, a, b)
    assert 0.95 * 2 * FRAGMENT < pages.wrong_bytes(ids, keys) <= 2 * FRAGMENT
    swap(pages, a, b)
    assert pages.wrong_bytes(ids, keys) == 0


def test_a_shift_within_a_fragment_is_seen(pages: Pages) -> None:
    pages.fill(np.array([2]), keys_of(1))
    buffer = pages._buffers[1]
    buffer.write(np.roll(buffer.read(2 * FRAGMENT, FRAGMENT), 8), 2 * FRAGMENT)
    assert pages.wrong_bytes(np.array([2]), keys_of(1)) > 0.9 * FRAGMENT


@pytest.mark.parametrize("at", [0, 1, FRAGMENT - 1])
def test_single_bytes_are_counted(pages: Pages, at: int) -> None:
    ids, keys = np.arange(BLOCKS), keys_of(BLOCKS)
    pages.fill(ids, keys)
    for layer in range(LAYERS):
        byte = pages._buffers[layer].read(at, 1)
        pages._buffers[layer].write(byte ^ np.uint8(1 << layer), at)
    assert pages.wrong_bytes(ids, keys) == LAYERS


@pytest.mark.parametrize("byte", range(32))
def test_every_byte_of_a_key_matters(byte: int) -> None:
    with Pages(HostDevice(), 1, 1, TOKENS, HEADS, DIM) as pages:
        keys = keys_of(1)
        pages.fill(np.zeros(1, np.int64), keys)
        keys[0, byte] ^= 16
        assert pages.wrong_bytes(np.zeros(1, np.int64), keys) > 0.9 * 2 * FRAGMENT


def test_memory_that_is_far_holds_the_same_bytes() -> None:
    far = FarDevice()
    ids, keys = np.array([3, 9, 4, 5, 0]), keys_of(5)
    sizes = (BLOCKS, LAYERS, TOKENS, HEADS, DIM)
    with Pages(far, *sizes) as there, Pages(HostDevice(), *sizes) as here:
        for pages in (there, here):
            pages.fill(ids, keys)
            pages.clear(ids[:1])
        for remote, local in zip(far.buffers, here._buffers, strict=True):
            assert isinstance(local, HostBuffer)
            np.testing.assert_array_equal(remote.read(), local.array)
        assert there.wrong_bytes(ids[1:], keys[1:]) == 0
        assert there.wrong_bytes(ids[:1], keys[:1]) > 0.98 * RECORD
        for buffer in far.buffers:
            buffer.write(np.zeros(FRAGMENT, np.uint8), 9 * FRAGMENT)
        assert there.wrong_bytes(ids[1:], keys[1:]) > 0.98 * LAYERS * FRAGMENT


def test_runs_of_neighbours() -> None:
    assert _runs(np.array([5, 3, 4, 9, 0])) == [(s, f, c) for s in range(2) for f, c in ((0, 1), (3, 3), (9, 1))]
    assert _runs(np.empty(0, np.int64)) == []


def test_what_was_taken_is_given_back_when_a_layer_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    far = FarDevice()
    allocate = far.allocate
    freed = []
    monkeypatch.setattr(FarDevice, "allocate", lambda self, n: allocate(n) if len(self.buffers) < 2 else [][0])
    monkeypatch.setattr("tests.cli.screen.FarBuffer.free", lambda self: freed.append(self))
    with pytest.raises(IndexError):
        Pages(far, BLOCKS, LAYERS, TOKENS, HEADS, DIM)
    assert freed == far.buffers and len(freed) == 2
