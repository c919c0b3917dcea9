"""The digest's definition (kvortex.digests.keys) in Python's integers, as slow and as obvious as can be."""

from __future__ import annotations

_MOST = 2**64


def splitmix64(seed: int, index: int) -> int:
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) % _MOST
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % _MOST
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % _MOST
    return z ^ (z >> 31)


def _seed(letter: str) -> int:
    return int.from_bytes(b"kvortex" + letter.encode(), "big")


def sums(data: bytes) -> tuple[int, int]:
    """What the bytes of a record add to both halves."""
    padded = data + bytes(-len(data) % 512)
    halves = []
    for half, order in enumerate(("little", "big")):
        total = 0
        for j in range(len(padded) // 512):
            row = padded[512 * j : 512 * j + 512]
            words = [int.from_bytes(row[4 * i : 4 * i + 4], order) for i in range(128)]  # type: ignore[arg-type]
            column = sum(splitmix64(_seed("C"), 128 * half + i) * word for i, word in enumerate(words))
            total += (splitmix64(_seed("R"), 2 * j + half) | 1) * column
        halves.append(total % _MOST)
    return halves[0], halves[1]


def digest(data: bytes) -> bytes:
    lengths = (splitmix64(_seed("L"), half) * len(data) for half in range(2))
    return b"".join(((a + b) % _MOST).to_bytes(8, "little") for a, b in zip(sums(data), lengths, strict=True))
