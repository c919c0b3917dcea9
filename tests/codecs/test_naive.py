"""The restatement of LMCache's scheme gives the sizes and errors that were found for it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.codecs.sample import values_of
from tests.naive_codecs import Shipped

# Tokens 0 to 255 of the sample: payload, tables, lengths, maxima, and the errors of K and V, mean over layers. Found by another
# restatement of ours.
GOLDEN = {
    "smollm2": (855_728, 760_320, 46_080, 30_720, 0.191, 0.154),
    "qwen": (454_831, 405_504, 24_576, 24_576, 0.146, 0.151),
}


@pytest.mark.parametrize("model", GOLDEN)
def test_golden_sizes(model: str) -> None:
    bits = values_of(model)[:, :, :256]
    values = (bits.astype(np.uint32) << 16).view(np.float32).reshape(*bits.shape[:3], -1)
    shipped = Shipped(values)
    *sizes, of_k, of_v = GOLDEN[model]
    missed, norm = (np.linalg.norm(x, axis=(2, 3)) for x in (shipped.decoded() - values, values))
    assert (missed / norm).mean(0) == pytest.approx([of_k, of_v], abs=0.006)
    assert list(shipped.nbytes().values()) == sizes
    assert 16 * values.size / 8 / sum(sizes) == pytest.approx(3.47, abs=0.02)
