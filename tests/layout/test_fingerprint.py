"""Fingerprints: equal exactly where a record of the one can be loaded into the other."""

from __future__ import annotations

import numpy as np
import pytest

from kvortex.layout import KVLayout

B, L, N, H, D = 5, 3, 4, 2, 6


def make(shape, dtype=np.uint16):
    return np.zeros(shape, dtype)


def of(arrays, **keywords):
    return KVLayout.from_arrays(arrays, **keywords).fingerprint


BASE = of(make((B, 2, N, H, D)))


def test_is_a_digest_that_stays():
    assert len(BASE) == 32 and isinstance(BASE, bytes)
    # Records on disk carry it: a change of this value makes every stored record unreadable.
    assert of(make((B, 2, N, H, D)), order="NHD").hex() == "a6354e0288e6bccabdf8a18f116cc196ba613317801795af22ad46cf1a7ade3a"


@pytest.mark.parametrize("same", [
    lambda: of(make((B, 2, N, H, D))),
    lambda: of(make((B + 4, 2, N, H, D))),
    lambda: of(make((1, 2, N, H, D))),
    lambda: of(make((B, 2, N, H, D), np.float16)),
    lambda: of(make((B, 2, N, H, D + 2))[..., :D]),
    lambda: of(make((B, 2, N + 1, H, D))[:, :, :N]),
    lambda: of(make((2, B, N, H, D)), block_axis=1),
    lambda: of(make((2, N, H, B, D)), block_axis=3),
    lambda: of(make((2, B, N, H, D)).swapaxes(0, 1)),
    lambda: of(make((1, B, 2, N, H, D)), block_axis=1, layer_axis=0),
    lambda: KVLayout.from_pointers((0x7000_0000, (B, 2, N, H, D), (192, 96, 24, 12, 2), 2), device="cuda:7").fingerprint,
], ids=range(11))
def test_same_records(same):
    assert same() == BASE


@pytest.mark.parametrize("other", [
    lambda: of(make((B, 2, H, N, D)).swapaxes(2, 3)),  # the same logical shape, heads before tokens in memory
    lambda: of(make((B, 2, H, N, D))),
    lambda: of(make((B, N, 2, H, D)).swapaxes(1, 2)),
    lambda: of(make((B, 2, N, H, D), np.uint32)),
    lambda: of(make((B, 2, N, H, 2 * D), np.uint8)),
    lambda: of(make((B, 2, N, H * D))),
    lambda: of(make((B, 2, N, H, D, 1))),
    lambda: of(make((B, 2, N, H, D)), order="NHD"),
    lambda: of([make((B, 2, N, H, D))] + [make((B, 2, N, H, D))]),
    lambda: of([make((B, N, H, D)), make((B, N, H, D))]),
    lambda: of(make((B, 2, N, H, D)), layer_axis=1),
], ids=range(11))
def test_other_records(other):
    assert other() != BASE


def test_layers_in_one_tensor_or_in_several():
    several = of([make((2, B, N, H, D)) for _ in range(L)], block_axis=1)
    assert of(make((B, L, 2, N, H, D)), layer_axis=1) == several
    assert of(make((2, L, B, N, H, D)), block_axis=2, layer_axis=1) == several
    assert of([make((B, 1, 2, N, H, D)), make((B, 2, 2, N, H, D))], layer_axis=1) == several
    assert of([make((B, 2, N, H, D)) for _ in range(L + 1)]) != several


def test_where_the_layer_axis_lies_leaves_no_trace():
    """Records put the layers first wherever memory has them."""
    assert of(make((B, N, N, D)), layer_axis=1) == of(make((N, B, N, D)), block_axis=1, layer_axis=0)
    assert of(make((B, N, N, D)), layer_axis=1) == of(make((B, N, N, D)), layer_axis=2)
    assert of(make((B, N, N, D)), layer_axis=1) != of(make((B, N, N, D)))


def test_order_of_tensors_matters():
    small, large = make((B, 8)), make((B, 16))
    assert of([small, large]) != of([large, small])


def test_axes_of_size_one_are_part_of_the_meaning():
    assert of(make((B, 1, 12))) != of(make((B, 12, 1)))
    one, strange = make((B, 4, 1, 6)), np.lib.stride_tricks.as_strided(make((B, 4, 6)), (B, 4, 1, 6), (48, 12, 999, 2))
    assert of(one) == of(strange)


def test_label_and_shapes_cannot_be_confused():
    labels = ["", "N", "NH", "HN", "N\0", "é"]
    assert len({of(make((B, 8)), order=label) for label in labels}) == len(labels)
