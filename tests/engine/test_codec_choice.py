"""Which engines may have a codec, what the others are told, and that codecs do not share keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvortex import ConfigError, KVLayout, KVortexConfig, KVortexEngine
from kvortex.codecs import CODECS, RecordShape, make_codec
from kvortex.config import _CODECS
from kvortex.devices import HostDevice
from kvortex.devices.cuda import CudaDevice
from kvortex.errors import ArgumentError
from tests.codecs.sample import tables_of
from tests.engine.coded import CODED, LOSSY, Coded, D, H, L, T
from tests.fake_gpu import fake_gpu
from tests.pages import PagedCache, Tensor

RNG = np.random.default_rng(3)


def refused(path: Path | None, layout: KVLayout | None, codec: str, **options: Any) -> str:
    config = KVortexConfig(**{"device": "host", "codec": codec, "codec_tables": path and str(path), **options})
    with pytest.raises(ConfigError, match=f"codec = '{codec}': ") as caught:
        KVortexEngine.create(config, layout)
    return str(caught.value)


def tables(tmp_path: Path, shape: RecordShape) -> Path:
    tables_of(shape, RNG).save(tmp_path / "t", shape)
    return tmp_path / "t"


def test_the_names_are_the_codecs() -> None:
    assert [*_CODECS, "cachegen"] == list(CODECS)


@pytest.mark.parametrize("codec", CODED)
def test_what_cannot_be_coded(codec: str, tmp_path: Path) -> None:
    coded = Coded.make(tmp_path)
    layout, path = coded.cache.layout, coded.path
    assert "opaque buffers" in refused(path, None, codec, max_block_bytes=4096)
    assert "opaque buffers" in refused(path, layout, codec, max_block_bytes=4096)
    assert "kvortex calibrate --tables" in refused(None, layout, codec)
    assert "no file of codec tables" in refused(tmp_path / "none", layout, codec)
    assert "no file of codec tables" in refused(Path("a\0b"), layout, codec)
    assert "16 tokens, and block_size = 32" in refused(path, layout, codec, block_size=32)
    for dtype in ("float16", "fp16", "half", "torch.float16", "fp8_e4m3", "float8_e5m2", "float32", "int8"):
        assert "codes bfloat16" in refused(path, layout, codec, dtype=dtype)
    for dtype in ("bfloat16", "torch.bfloat16", "bf16", "uint16", "auto"):
        with coded.engine(codec, dtype=dtype):
            pass
    halves = KVLayout.from_arrays([np.zeros((2, 4, T, H, D), np.float16) for _ in range(L)], 1)
    assert "of 'float16'" in refused(path, halves, codec)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    assert "damaged" in refused(tmp_path / "damaged", layout, codec)
    assert "tokens by 32 channels" in refused(tables(tmp_path, RecordShape(2 * L, 1, 32, 32)), layout, codec, block_size=32)
    assert "float16" in refused(tables(tmp_path, RecordShape(L, H, D, dtype="float16")), layout, codec)
    assert "a block has" in refused(tables(tmp_path, RecordShape(L + 1, H, D)), layout, codec)


@pytest.mark.parametrize("codec", CODED)
def test_what_a_gpu_cannot_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, codec: str) -> None:
    coded = Coded.make(tmp_path)
    with fake_gpu(monkeypatch) as gpu:
        device = CudaDevice()
        cache = PagedCache(device, [Tensor(device, (2, 4, T, H, D)) for _ in range(L)], 1)
        odd = PagedCache(device, [Tensor(device, (2, 4, T, H, D), shift=2) for _ in range(L)], 1)
        options: dict[str, Any] = {"device": "auto", "calibrate": "never", "cpu_pool_size_bytes": 1 << 20}
        for route in ("resident", "strided", "batched", "mapped"):
            message = refused(coded.path, cache.layout, codec, transfer_route=route, **options)
            assert f"transfer_route = '{route}'" in message and "'auto' or 'staged'" in message
        held = dict(gpu.memory)
        for route in ("auto", "staged"):
            config = KVortexConfig(codec=codec, codec_tables=str(coded.path), transfer_route=route, **options)
            with KVortexEngine.create(config, cache.layout) as engine:
                assert engine.codec is not None and engine.codec.name == codec
        room = make_codec(codec, coded.shape, coded.tables).slot_bytes
        least = 8 * (-(-room // 4096) * 4096)
        message = refused(coded.path, cache.layout, codec, gpu_pool_size_bytes=8 * 4096, **options)
        assert f"a staging buffer of 4096 bytes does not hold a record of {room}" in message
        assert f"gpu_pool_size_bytes to {least} or more" in message
        config = KVortexConfig(codec=codec, codec_tables=str(coded.path), gpu_pool_size_bytes=least, **options)
        KVortexEngine.create(config, cache.layout).shutdown()
        assert f"multiples of {4 if codec == 'plane' else 16} bytes" in refused(coded.path, odd.layout, codec, **options)
        assert gpu.memory.keys() == held.keys(), "what a refusal had taken is given back"


@pytest.mark.parametrize("codec", LOSSY)
def test_loss_needs_to_know_what_a_block_is(codec: str, tmp_path: Path) -> None:
    coded, d = Coded.make(tmp_path), HostDevice()
    pages = {
        "2 x 2 x 16 x 64 elements of 2 bytes": PagedCache(d, [Tensor(d, (2, 4, H, T, D)) for _ in range(L)], 1),  # HND
        "elements of 1 bytes": PagedCache(d, [Tensor(d, (2, 4, T, H, 2 * D), 1) for _ in range(L)], 1),
        "16 x 2 x 128": PagedCache(d, [Tensor(d, (4, T, H, 2 * D)) for _ in range(L)], 0),  # K beside V
        "they have 1 layers": PagedCache(d, [Tensor(d, (2, 4, T * L, H, D))], 1),
    }
    for message, cache in pages.items():
        seen = refused(coded.path, cache.layout, codec)
        assert "not for this layout" in seen and message in seen
    latent = tables(tmp_path, RecordShape(L, 1, 512, parts="L"))
    mla = PagedCache(d, [Tensor(d, (4, T, 512)) for _ in range(L)], 0)
    assert "what it does to a latent was never measured" in refused(latent, mla.layout, codec)
    with mla.engine(codec="plane", codec_tables=str(latent)):
        pass


def test_heads_that_kernels_do_not_have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the host codes and a GPU does not: its refusal says so, and what to do."""
    with fake_gpu(monkeypatch):
        device, shape = CudaDevice(), RecordShape(1, 2, 96)
        cache = PagedCache(device, [Tensor(device, (2, 4, T, 2, 96))], 1)
        options: dict[str, Any] = {"device": "auto", "calibrate": "never", "cpu_pool_size_bytes": 1 << 20}
        message = refused(tables(tmp_path, shape), cache.layout, "int8", **options)
        assert "not on a GPU: head_dim = 96" in message and "use device = 'host'" in message


def test_heads_that_cannot_be_rotated(tmp_path: Path) -> None:
    d, shape = HostDevice(), RecordShape(1, 2, 96)
    cache = PagedCache(d, [Tensor(d, (2, 4, T, 2, 96))], 1)
    assert "head_dim = 96" in refused(tables(tmp_path, shape), cache.layout, "k4v4")
    with cache.engine(codec="int8", codec_tables=str(tmp_path / "t")):
        pass


@pytest.mark.parametrize("codec", CODED)
def test_opaque_buffers_are_refused_by_calls(codec: str, tmp_path: Path) -> None:
    coded = Coded.make(tmp_path)
    buffer = np.zeros(64, np.uint8)
    with coded.engine(codec) as engine:
        keys = engine.block_keys(np.arange(16))
        with pytest.raises(ArgumentError, match=f"codec {codec} codes pages"):
            engine.save_blocks(keys, data_ptrs=[buffer.ctypes.data], sizes=[64], first=True)
        with pytest.raises(ArgumentError, match=f"codec {codec} codes pages"):
            engine.load_blocks(keys, output_ptrs=[buffer.ctypes.data], sizes=[64], first=True)
        with pytest.raises(ArgumentError, match=f"no opaque buffers with codec {codec}"):
            engine.prefetch(keys, [64], first=True)
        assert not engine.get_stats().resident_blocks


def test_codecs_and_tables_have_keys_of_their_own(tmp_path: Path) -> None:
    coded, other = Coded.make(tmp_path), Coded.make(tmp_path, seed=6)
    seen = set()
    for codec in ("raw", *CODED):
        for one in (coded, other):
            with one.engine(codec) as engine:
                seen.add(engine.block_keys(np.arange(16)).tobytes())
    assert len(seen) == 1 + 2 * len(CODED)  # of raw, tables say nothing
    with coded.cache.engine() as engine:  # as without an option
        assert engine.block_keys(np.arange(16)).tobytes() in seen and engine.codec is None
