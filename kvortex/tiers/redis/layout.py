"""How a record lies in Redis: in two strings, so that its memory is not a quarter waste.

Redis takes its memory from jemalloc, whose sizes have four steps to a power of two: a string of exactly 2 MiB with its 10
bytes of bookkeeping takes 2.5 MiB. (``MEMORY USAGE``: 2,621,488 bytes for one of 2,097,152, and 2,097,200 for one of
2,097,088.) Blocks have such sizes. So ``{name}:d`` holds the first bytes of the payload, as many as fill a size, and
``{name}:h`` the header and the rest. The braces put both on one server of a cluster. How a record was cut is seen from the
strings; only writers decide it.
"""

from __future__ import annotations

_SPARE = 64  # bytes of a size left for what Redis adds
_LEAST_STEP = 16


def body_bytes(payload_bytes: int) -> int:
    """How much of a payload lies in ``:d``."""
    step = max(_LEAST_STEP, 1 << max(0, payload_bytes.bit_length() - 3))
    return max(0, payload_bytes // step * step - _SPARE)


def names(namespace: bytes, keys: list[bytes]) -> list[bytes]:
    """What records are called; a cluster hashes just this."""
    prefix = b"kvx:" + namespace[:8].hex().encode() + b":"
    return [prefix + key.hex().encode() for key in keys]


def head_name(name: bytes) -> bytes:
    """The string with a record's header."""
    return b"{%b}:h" % name


def body_name(name: bytes) -> bytes:
    """The string with most of a record's payload."""
    return b"{%b}:d" % name
