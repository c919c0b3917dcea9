"""The measurement of answers sees what it says that it sees."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from examples.lm.model import Model
from examples.side_by_side import TINY, SideBySide
from kvortex.errors import ArgumentError
from perf import answers


@pytest.fixture(scope="module")
def sides() -> Iterator[SideBySide]:
    with SideBySide(Model.random(TINY), name="tiny", num_pages=64, pool_bytes=8 << 20) as made:
        yield made


def test_a_wrong_byte_of_a_page_is_counted(sides: SideBySide) -> None:
    prefix = list(range(100))
    saved = answers._save_prefix(sides, prefix)
    assert answers._wrong_bytes(sides, prefix, saved) == 0
    saved[1].flat[77] ^= 1
    saved[2].flat[5] ^= 0x0101
    assert answers._wrong_bytes(sides, prefix, saved) == 3


def test_what_was_computed_again_is_not_taken_for_wrong_bytes(sides: SideBySide) -> None:
    prefix = list(range(300, 400))
    answers._save_prefix(sides, prefix)
    keys = sides.engine.block_keys(prefix)
    pages = sides.cache.take(len(prefix))
    for layer in sides.cache.layers:
        layer[:, pages] = 1  # a sum in another order, and more
    sides.engine.drop_blocks(keys[2:3])
    sides.engine.save_blocks(keys[2:3], pages[2:3]).wait()
    sides.cache.give_back(pages)
    assert answers._wrong_bytes(sides, prefix, answers._save_prefix(sides, prefix)) == 0


def test_a_damaged_block_is_told(sides: SideBySide) -> None:
    prompt = list(range(200, 300))
    found = answers._answers(sides, prompt, 80, 4)
    assert found["recomputed"] == found["same_tokens_recomputed"] == found["same_tokens"] == 1


def test_operations_are_counted_by_hand() -> None:
    model = Model.random(TINY)
    count = 7
    layer = 256 * (256 + 2 * 128) + 256 * 256 + 3 * 256 * 512  # q, k, v; output; gate, up, down
    attention = sum(2 * 2 * 4 * 64 * (at + 1) for at in range(count))  # scores and values of each token that is seen
    assert model.flops(count) == 3 * (2 * count * layer + attention) + 2 * 256 * 512
    model.workers.close()


def test_only_the_host_computes() -> None:
    with pytest.raises(ArgumentError, match="host"):
        answers.measure("cuda:0", quick=True)


def test_a_changed_prefix_is_cached_nowhere(sides: SideBySide) -> None:
    rng = np.random.default_rng(8)
    prefix = rng.integers(0, TINY.vocabulary, 85).tolist()
    answers._save_prefix(sides, prefix)
    found = answers._times(sides, prefix, [*prefix, *range(20)], 1, 2, pairs := [])
    assert found["cached"] == 80 and found["saving_cached"] == 0 and len(pairs) == 2
    assert found["saving_share"] > 0
