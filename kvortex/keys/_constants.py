"""SHA-256's constants: FIPS 180-4, sections 4.2.2 and 5.3.3. Derived, so that no digit can be mistyped."""

from __future__ import annotations

from math import isqrt


def _primes(count: int) -> list[int]:
    found: list[int] = []
    number = 2
    while len(found) < count:
        if all(number % prime for prime in found):
            found.append(number)
        number += 1
    return found


def _cube_root(number: int) -> int:
    """The largest integer whose cube is at most ``number``."""
    low, high = 0, number
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**3 <= number else (low, middle - 1)
    return low


# The first 32 bits behind the point of roots of the first primes.
ROUND_CONSTANTS = tuple(_cube_root(prime << 96) & 0xFFFFFFFF for prime in _primes(64))
INITIAL_STATE = tuple(isqrt(prime << 64) & 0xFFFFFFFF for prime in _primes(8))
