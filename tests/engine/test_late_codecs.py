"""Coded blocks on a GPU that does everything as late, and in as odd an order, as it may."""

from __future__ import annotations

import ctypes
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvortex.codecs import make_codec
from kvortex.devices.cuda import CudaDevice
from kvortex.transfer.executor import poll
from tests.engine.coded import BLOCKS, Coded, kv
from tests.fake_gpu import fake_gpu
from tests.late_gpu import LateGpu
from tests.pages import keys_of

STREAMS = 0x77000, 0x78000
# Staging buffers, records of each, and options.
SHAPES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "several": (8, 2, {}),
    "one buffer": (2, 1, {"num_transfer_streams": 1, "staging_buffers": 1}),
    "beside compute": (8, 3, {"beside_compute": True}),
    "no digests": (8, 2, {"digests": False}),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("codec", ["plane", "k4v3"])
def test_transfers_in_any_order(
    codec: str, kind: str, seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Saves of pages that change again behind them, and loads that nobody waits for before the next; layer by layer too.

    Every third block is the first of its sequence, which a codec with loss keeps in parts.
    """
    chooser = random.Random(seed)
    with fake_gpu(monkeypatch, LateGpu(seed)) as gpu:
        if seed % 2:
            monkeypatch.setattr("kvortex.transfer.lane._AT_ONCE", -1)  # issued by the lanes' threads
        coded = Coded.make(tmp_path, device=CudaDevice())
        names = kv(np.random.default_rng(5), coded.shape, 40)  # as those that the tables are of
        names[7] = np.random.default_rng(1).integers(0, 256, names.shape[1], np.uint8)  # which no slot holds
        names[7].view(np.uint16)[5] = 0x7F80
        back = [coded.expected(codec, name, at % 3 == 0) if at != 7 else name for at, name in enumerate(names)]
        buffers, each, options = SHAPES[kind]
        room = -(-make_codec(codec, coded.shape, coded.tables).slot_bytes // 4096) * 4096
        with coded.engine(codec, slots=40, gpu_pool_size_bytes=buffers * each * room, **options) as engine:
            open_tickets, wanted, at = [], {}, 0
            for turn in range(8):
                stream, pages = STREAMS[turn % 2], chooser.sample(range(turn % 2, BLOCKS, 2), chooser.randint(1, 5))
                for ticket, _ in open_tickets:
                    ticket.add_to(stream)
                for page, name in zip(pages, range(at, at + len(pages)), strict=True):
                    gpu.enqueue(stream, _write, gpu, coded, page, names[name])
                layerwise = chooser.random() < 0.4
                these = np.arange(at, at + len(pages))
                save = engine.save_blocks(keys_of(*these), pages, stream=stream, layerwise=layerwise, first=these % 3 == 0)
                for layer in range(3 if layerwise else 0):
                    save.save_layer(layer)
                open_tickets.append((save, [at + k != 7 for k in range(len(pages))]))
                save.add_to(stream)
                for page in pages:  # what comes later must not be what was saved
                    gpu.enqueue(stream, _write, gpu, coded, page, names[39])
                at += len(pages)
                if turn % 2:
                    continue
                assert poll(save.done, time.monotonic() + 5), "a save never ends"
                some = chooser.sample(range(at), min(at, 4))
                targets = chooser.sample(range(turn % 2, BLOCKS, 2), len(some))
                layerwise, first = chooser.random() < 0.4, np.array(some) % 3 == 0
                load = engine.load_blocks(keys_of(*some), targets, stream=stream, layerwise=layerwise, first=first)
                assert load._whole is not None
                found = zip(targets, some, load._whole(load._transfer.mask), strict=True)
                hits = {page: name for page, name, hit in found if hit}
                load.wait_layer(1, stream) if load._transfer.layers else load.add_to(stream)
                for page, name in hits.items():
                    gpu.enqueue(stream, _check, gpu, coded, page, back[name], wanted, (turn, page, name))
                open_tickets.append((load, None))
            for ticket, mask in open_tickets:
                assert poll(ticket.done, time.monotonic() + 5), f"{ticket} never ends"
                assert ticket.error is None
                assert mask is None or ticket.mask.tolist() == mask
            gpu.finish()
            assert not gpu.left and len(wanted) >= 4 and all(wanted.values()), wanted
            engine._index.check()


def _write(gpu: LateGpu, coded: Coded, page: int, record: Any) -> None:
    for (address, nbytes), part in _parts(coded, page, record):
        gpu.array(address, nbytes, ctypes.c_uint8)[:] = part


def _check(gpu: LateGpu, coded: Coded, page: int, record: Any, right: dict[Any, bool], what: Any) -> None:
    kind = ctypes.c_uint8
    right[what] = all((gpu.array(*at, kind) == part).all() for at, part in _parts(coded, page, record))


def _parts(coded: Coded, page: int, record: Any) -> Any:
    begin = 0
    for address, nbytes in coded._pages(page):
        yield (address, nbytes), record[begin : begin + nbytes]
        begin += nbytes
