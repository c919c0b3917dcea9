"""What an engine takes from a profile, and what its config says instead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvortex.devices.cuda import CudaDevice
from kvortex.errors import ConfigError, DeviceError
from kvortex.parts import _staging_bytes
from kvortex.transfer.cuda import CudaExecutor
from kvortex.transfer.executor import Direction
from kvortex.transfer.profiles import calibrate as module
from kvortex.transfer.profiles import store
from kvortex.transfer.profiles.profile import Profile, guess
from tests.fake_gpu import FakeGpu, fake_gpu
from tests.pages import PagedCache, keys_of

SMALL = replace(guess(None, 8), buffer_bytes=8192, streams=3, buffers=5, resident_ctas=6, resident_ctas_beside=1, staged_ctas=7)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeGpu]:
    monkeypatch.setenv("KVORTEX_CACHE_DIR", str(tmp_path))
    with fake_gpu(monkeypatch) as made:
        store.save(CudaDevice(), SMALL)
        yield made


def shape_of(gpu: FakeGpu, **options: Any) -> tuple[int, int, int]:
    """Streams, staging buffers and bytes of one that an engine has each way."""
    with PagedCache.plain(CudaDevice()).engine(**{"gpu_pool_size_bytes": None, "calibrate": "stored", **options}) as engine:
        executor = engine._executor
        assert isinstance(executor, CudaExecutor) and executor._staging is not None
        lane = executor._lanes[Direction.SAVE]
        assert len(lane.buffers) == len(executor._lanes[Direction.LOAD].buffers) == len(executor._staging.addresses) // 2
        return lane._count, len(lane.buffers), executor._staging.buffer_bytes


def test_a_stored_profile_shapes_transfers(gpu: FakeGpu) -> None:
    assert shape_of(gpu) == (3, 5, 8192)
    cache = PagedCache.plain(CudaDevice(), blocks=200)
    for route, busy, ctas in (("resident", False, 6), ("resident", True, 1), ("staged", True, 7)):
        with cache.engine(slots=200, transfer_route=route, beside_compute=busy, calibrate="stored") as engine:
            gpu.issued.calls.clear()
            assert engine.save_blocks(keys_of(*range(200)), range(200)).wait().all()
            assert {call.arguments[1] for call in gpu.issued.calls if call.name == "launch"} == {ctas}


def test_the_config_comes_before_the_profile(gpu: FakeGpu) -> None:
    assert shape_of(gpu, num_transfer_streams=2) == (2, 5, 8192)
    assert shape_of(gpu, num_transfer_streams=7) == (7, 7, 8192), "each stream has a buffer"
    assert shape_of(gpu, staging_buffers=4) == (3, 4, 8192)
    assert shape_of(gpu, staging_buffers=2, num_transfer_streams=1, gpu_pool_size_bytes=4 << 12) == (1, 2, 4096)
    assert shape_of(gpu, calibrate="never")[:2] == (2, 4)


@pytest.mark.parametrize(("pool", "route"), [(16 << 20, "staged"), (4 << 20, "resident")])
def test_deep_buffers_are_for_staging_beside_a_model(gpu: FakeGpu, pool: int, route: str) -> None:
    """This link moves 4 MB until the next kernel of a model ends, and five of ten buffers share half of the pool."""
    store.save(CudaDevice(), replace(SMALL, link_rate=1e9))
    cache = PagedCache.plain(CudaDevice(), blocks=200)
    with cache.engine(slots=200, gpu_pool_size_bytes=pool, beside_compute=True, calibrate="stored") as engine:
        assert engine.save_blocks(keys_of(*range(200)), range(200)).wait().all()
        assert [entry.route for entry in engine.get_stats().routes] == [route]


def test_an_engine_that_is_to_measure_does_so_once(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    store.path_of(CudaDevice()).unlink()
    measured: list[str] = []

    def once(device: CudaDevice, _: list[str]) -> Profile:
        measured.append(device.name)
        store.save(device, SMALL)
        return SMALL

    monkeypatch.setattr(module, "once", once)
    assert shape_of(gpu)[0] == 2 and not measured
    assert shape_of(gpu, calibrate="once") == shape_of(gpu, calibrate="once") == shape_of(gpu) == (3, 5, 8192)
    assert measured == ["cuda:0"]


def test_why_nothing_could_be_measured_is_told(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    store.path_of(CudaDevice()).unlink()

    def refuse(*_: object) -> Profile:
        raise DeviceError("planted")

    monkeypatch.setattr(module, "once", refuse)
    with PagedCache.plain(CudaDevice()).engine(calibrate="once") as engine:
        assert "not calibrated: planted" in engine.notes


def test_nothing_else_goes_on_while_it_measures(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that fill the pool, and the driver that registers it, would be measured as well, and kept."""
    taken: list[int] = []
    monkeypatch.setattr(module, "profile_for", lambda *_: taken.append(len(gpu.registered)) or SMALL)
    with PagedCache.plain(CudaDevice()).engine(calibrate="once"):
        assert taken == [0] and len(gpu.registered) == 1


@pytest.mark.parametrize("lacks", ["launches that return", "flags"])
def test_resident_kernels_are_refused_where_they_would_hang(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    if lacks == "flags":
        monkeypatch.setattr(CudaDevice, "attribute", lambda *arguments: "64_BIT_STREAM" not in str(arguments[1]))
    else:
        monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    cache = PagedCache.plain(CudaDevice(), blocks=200)
    with pytest.raises(ConfigError, match="transfer_route = 'resident': its kernel would wait for ever"):
        cache.engine(transfer_route="resident")
    assert not gpu.registered
    with cache.engine(slots=200) as engine:
        assert engine.save_blocks(keys_of(*range(200)), range(200)).wait().all()
        assert engine.save_blocks(keys_of(300), [0], layerwise=True).abort()
        assert "resident" not in {entry.route for entry in engine.get_stats().routes}
    assert not gpu.resident and "wait_value" not in gpu.issued.names


@pytest.mark.parametrize(
    ("vram", "free", "times"),
    [
        (1 << 20, 1 << 20, 1),
        (64 * 2 * 5 * 8192, 1 << 30, 1),
        (64 * 3 * 5 * 8192, 1 << 30, 1.5),
        (8 << 30, 8 << 30, 4),
        (8 << 30, 6 * 5 * 8192, 1.5),  # a model has all others
        (8 << 30, 0, 1),
    ],
)
def test_a_codec_has_longer_staging_buffers_as_far_as_the_gpu_is_large_and_free(vram: int, free: int, times: float) -> None:
    device: Any = SimpleNamespace(memory_bytes=vram, free_bytes=free)
    codec: Any = object()
    assert SMALL.staging_bytes == 2 * 5 * 8192
    assert _staging_bytes(device, SMALL, codec) == times * SMALL.staging_bytes
    assert _staging_bytes(device, SMALL, None) == SMALL.staging_bytes
