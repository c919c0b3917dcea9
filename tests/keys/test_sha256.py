"""SHA-256 in compiled code against hashlib, by instructions of the CPU and without."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvortex.keys import _loops, _sha_ni
from kvortex.keys._constants import INITIAL_STATE, ROUND_CONSTANTS
from kvortex.keys._sha256 import PADDING, digest, digest_in_place

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["plain", "hardware"])
def hardware(request: pytest.FixtureRequest) -> bool:
    """Both ways; the plain one everywhere."""
    if request.param == "hardware" and not _sha_ni.available():
        pytest.skip("this CPU has no SHA instructions that kvortex uses")
    return request.param == "hardware"


def of_part(data: bytes, at: int, hardware: bool) -> bytes:
    out = np.zeros(40, np.uint8)
    array = np.frombuffer(bytearray(data), np.uint8)
    digest(array, at, len(data) - at, np.empty(128, np.uint8), np.empty(8, np.uint32), out, 5, hardware)
    assert array.tobytes() == data and not out[:5].any() and not out[37:].any()
    return out[5:37].tobytes()


def in_place(data: bytes, hardware: bool) -> bytes:
    buffer, end = np.full(3 + len(data) + PADDING + 8, 0xA5, np.uint8), 3 + len(data)
    buffer[3:end] = np.frombuffer(data, np.uint8)
    out = np.zeros(32, np.uint8)
    digest_in_place(buffer, 3, end, np.empty(8, np.uint32), out, 0, hardware)
    assert (buffer[end + PADDING :] == 0xA5).all(), "it wrote behind the room that it asks for"
    assert buffer[3:end].tobytes() == data and (buffer[:3] == 0xA5).all()
    return out.tobytes()


def test_the_constants_are_those_of_the_standard() -> None:
    assert ROUND_CONSTANTS[0] == 0x428A2F98 and ROUND_CONSTANTS[63] == 0xC67178F2 and len(ROUND_CONSTANTS) == 64
    assert INITIAL_STATE[0] == 0x6A09E667 and INITIAL_STATE[7] == 0x5BE0CD19 and len(INITIAL_STATE) == 8


def test_vectors_of_the_standard(hardware: bool) -> None:
    assert in_place(b"abc", hardware).hex() == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    two_blocks = b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"
    assert in_place(two_blocks, hardware).hex() == "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"


def test_every_length_from_0_to_300(hardware: bool) -> None:
    data = np.random.default_rng(0).integers(0, 256, 400, np.uint8).tobytes()
    for length in range(301):
        message = data[length : 2 * length] if 2 * length <= 400 else data[:length]
        expected = hashlib.sha256(message).digest()
        assert in_place(message, hardware) == expected, length
        assert of_part(b"xyz" + message, 3, hardware) == expected, length


@given(st.binary(max_size=2000), st.integers(0, 70))
def test_random_messages(data: bytes, at: int) -> None:
    at = min(at, len(data))
    for hardware in {False, _sha_ni.available()}:
        assert in_place(data, hardware) == hashlib.sha256(data).digest()
        assert of_part(data, at, hardware) == hashlib.sha256(data[at:]).digest()


def test_a_long_message(hardware: bool) -> None:
    data = np.random.default_rng(1).integers(0, 256, (1 << 20) + 13, np.uint8).tobytes()
    assert of_part(data, 0, hardware) == hashlib.sha256(data).digest()


def test_it_is_told_at_run_time_what_the_cpu_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without the instructions, or one that LLVM cannot tell about, goes the plain way."""
    for features in ({}, {"sha": True}, {"avx": True}, {"sha": True, "avx": False}):
        monkeypatch.setattr(_sha_ni.binding, "get_host_cpu_features", lambda features=features: features)
        assert not _sha_ni.available.__wrapped__()
    monkeypatch.setattr(_sha_ni.binding, "get_host_cpu_features", lambda: {"sha": True, "avx": True})
    assert _sha_ni.available.__wrapped__() == _sha_ni._is_x86()
    monkeypatch.setattr(_sha_ni.platform, "machine", lambda: "aarch64")
    assert not _sha_ni.available.__wrapped__()

    def unknown() -> dict[str, bool]:
        raise RuntimeError("no host CPU")

    monkeypatch.setattr(_sha_ni.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(_sha_ni.binding, "get_host_cpu_features", unknown)
    assert not _sha_ni.available.__wrapped__()


NAMES = """
import numpy as np, sys
from kvortex.keys import Namespace, VllmKeys, adopt, block_keys, _sha_ni
if sys.argv[1] == "plain":
    _sha_ni.available = lambda: False
namespace = Namespace(model="m")
keys = block_keys(namespace, range(64))
hashes = VllmKeys(namespace, seed="0").block_keys(range(64), prompt_embeds=np.ones((9, 3), np.float32), salt="s")
print(keys.tobytes().hex(), hashes.tobytes().hex(), adopt(namespace, hashes).tobytes().hex())
"""


@pytest.mark.slow
def test_a_cache_that_another_kind_of_cpu_has_left_is_no_trap(tmp_path: Path) -> None:
    """Compiled for the plainest of CPUs, into one cache: files that hold the instructions and are not to run them."""
    seen = set()
    for way in ("plain", "told", "plain"):
        for target in ({"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}, {}):
            environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)} | target
            done = subprocess.run([sys.executable, "-c", NAMES, way], env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            seen.add(done.stdout)
    assert len(seen) == 1 and len(seen.pop().split()) == 3


def test_compiled_loops_need_no_gil() -> None:
    for name in ("extremes", "hash_chain", "hash_rows", "hash_alike", "hash_placed"):
        assert getattr(_loops, name).targetoptions["nogil"], name
