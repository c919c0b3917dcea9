"""Cutting fragments into pieces, and records into parts: everything once, in order, no larger than asked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvortex.transfer.plan import BASE, BYTES, OFFSET, PIECE_BYTES, STRIDE, cut_parts, split_pieces
from tests.transfer.plans import fragments_of

SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=8)


@given(SIZES, st.sampled_from([16, 32, 112, 4096]), st.booleans())
def test_pieces_tile_their_fragments(sizes: list[int], piece_bytes: int, interleaved: bool) -> None:
    fragments, _ = fragments_of(sizes, 5, 7, interleaved=interleaved)
    kept = fragments.copy()
    rows = split_pieces(fragments, piece_bytes).tolist()
    assert (fragments == kept).all()
    for base, stride, offset, nbytes in fragments.tolist():
        done = 0
        while done < nbytes:
            piece = rows.pop(0)
            assert (piece[BASE] - base, piece[OFFSET] - offset, piece[STRIDE]) == (done, done, stride)
            assert piece[BYTES] == min(piece_bytes, nbytes - done)
            done += piece[BYTES]
    assert not rows


def test_pieces_keep_the_alignment_of_fragments() -> None:
    fragments = np.array([[1 << 20, 1 << 16, 0, 3 * PIECE_BYTES + 16], [1 << 30, 1 << 16, 3 * PIECE_BYTES + 16, 48]], np.int64)
    assert PIECE_BYTES % 16 == 0 and not (split_pieces(fragments) % 16).any()


def test_no_fragments_no_pieces() -> None:
    assert split_pieces(np.empty((0, 4), np.int64)).shape == (0, 4)


@given(SIZES, st.sampled_from([16, 64, 4096]), st.integers(0, 1500))
def test_parts_are_whole_pieces_as_many_as_fit(sizes: list[int], piece_bytes: int, more: int) -> None:
    fragments, _ = fragments_of(sizes, 1, 0, interleaved=True)
    pieces = split_pieces(fragments, piece_bytes)
    buffer_bytes = int(pieces[:, BYTES].max()) + more
    cuts = cut_parts(pieces, buffer_bytes)
    assert cuts.dtype == np.int64 and cuts[0] == 0 and cuts[-1] == len(pieces) and (np.diff(cuts) > 0).all()
    for first, last in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        assert pieces[first:last, BYTES].sum() <= buffer_bytes
        if last < len(pieces):
            assert pieces[first : last + 1, BYTES].sum() > buffer_bytes, "one more piece would have fitted"


@pytest.mark.parametrize(
    ("buffer_bytes", "wanted"), [(4096, [0, 1, 2, 3]), (8191, [0, 1, 2, 3]), (8192, [0, 2, 3]), (12288, [0, 3])]
)
def test_parts_of_equal_pieces(buffer_bytes: int, wanted: list[int]) -> None:
    fragments, _ = fragments_of([3 * 4096], 1, 0, interleaved=True)
    assert cut_parts(split_pieces(fragments), buffer_bytes).tolist() == wanted
