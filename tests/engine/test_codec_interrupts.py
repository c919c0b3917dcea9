"""An interrupt at any line while blocks are coded, of which some do not fit: every slot comes back, and once only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.coded import Coded
from tests.engine.test_interrupts import Trap, anywhere, nothing_is_taken
from tests.pages import keys_of

CALLS: dict[str, Callable[[Any], Any]] = {
    "save and wait": lambda engine: engine.save_blocks(keys_of(5, 6, 7), [5, 6, 7], first=[False, False, True]).wait(),
    "load and wait": lambda engine: engine.load_blocks(keys_of(1, 2, 9), [9, 10, 11], first=True).wait(),
}


@pytest.mark.parametrize("codec", ["plane", "k4v4"])
@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_at_any_line(name: str, codec: str, tmp_path: Path) -> None:
    coded = Coded.make(tmp_path)
    broken = coded.records[6].copy()
    broken[:] = np.random.default_rng(4).integers(0, 256, len(broken))  # neither codec has a slot for it
    broken.view(np.uint16)[5] = 0x7F80
    coded.write(6, broken)
    anywhere(lambda trap: interrupted(CALLS[name], trap, coded, codec))


def interrupted(call: Callable[[Any], Any], trap: Trap, coded: Coded, codec: str) -> bool:
    with coded.engine(codec, slots=16, transfer_timeout_s=20.0) as engine:
        assert engine.save_blocks(keys_of(1, 2), [1, 2], first=True).wait().all()
        trap.run(lambda: call(engine))
        if not trap.sprung:
            return False
        nothing_is_taken(engine, trap)
        engine._index.check()
        first = [False, False, True]
        assert not engine.check_blocks(keys_of(6), first=False).any(), trap.sprung
        saved = engine.save_blocks(keys_of(5, 6, 7), [5, 6, 7], first=first)
        assert saved.wait().tolist() == [True, False, True], trap.sprung
        loaded = engine.load_blocks(keys_of(5, 7), [9, 10], first=[False, True])
        assert loaded.wait().all(), trap.sprung
        assert (coded.read(9) == coded.expected(codec, coded.records[5])).all(), trap.sprung
        assert (coded.read(10) == coded.records[7]).all(), trap.sprung
        assert engine.load_blocks(keys_of(1, 2), [9, 10], first=True).wait().all(), trap.sprung
        assert (coded.read(9) == coded.records[1]).all(), trap.sprung
    return True
