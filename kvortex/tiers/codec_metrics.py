"""What coding did to the records of one tier: blocks, bytes before and after, time, and what was refused, by cause."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

ENCODE, DECODE = "encode", "decode"


@dataclass(frozen=True)
class CodecStats:
    """A snapshot.

    Attributes
    ----------
    codec
        Of the tier's records.
    encoded_blocks, encoded_from_bytes, encoded_to_bytes, encode_seconds
        Blocks that were made ready for the tier, the bytes of their slots, the bytes of their records, and the time that took
        the tier's threads. Whether the tier has stored them, its operation ``put`` says.
    decoded_blocks, decoded_from_bytes, decoded_to_bytes, decode_seconds
        The reverse: blocks that came back into slots.
    refused
        Blocks that did not, by cause; none was handed out. On the way down ``"slot"``: what a slot held was not what was saved.
        On the way up ``"codec"``: of another codec, version, or tables; ``"envelope"``: no record of this version;
        ``"length"``: lengths that contradict each other; ``"parts"``: a part is missing, or of another record; ``"body"``: what
        the codec cannot decode; ``"digest"``: what came of it is not what was saved; ``"kind"``: asked for exactly, and kept
        with loss; ``"overlong"``: what came of it does not fit into a slot of the pool's codec.
    """

    codec: str
    encoded_blocks: int = 0
    encoded_from_bytes: int = 0
    encoded_to_bytes: int = 0
    encode_seconds: float = 0.0
    decoded_blocks: int = 0
    decoded_from_bytes: int = 0
    decoded_to_bytes: int = 0
    decode_seconds: float = 0.0
    refused: dict[str, int] = field(default_factory=dict)


class CodecTally:
    """Running totals of one tier; thread-safe."""

    def __init__(self, codec: str) -> None:
        self._codec = codec
        self._lock = threading.RLock()  # a finaliser that runs inside may count too
        self._totals: dict[str, list[float]] = {ENCODE: [0, 0, 0, 0.0], DECODE: [0, 0, 0, 0.0]}
        self._refused: dict[str, int] = {}

    def count(self, operation: str, blocks: int, before: int, after: int, seconds: float) -> None:
        """Blocks that went one way, ``ENCODE`` or ``DECODE``: bytes before and after."""
        with self._lock:
            totals = self._totals[operation]
            for at, more in enumerate((blocks, before, after, seconds)):
                totals[at] += more

    def refuse(self, cause: str, blocks: int) -> None:
        """Blocks that did not go on, by cause."""
        if blocks:
            with self._lock:
                self._refused[cause] = self._refused.get(cause, 0) + blocks

    def foreign(self, records: int) -> None:
        """Records of another codec, as headers say."""
        self.refuse("codec", records)

    def stats(self) -> CodecStats:
        """A snapshot."""
        with self._lock:
            made, back = self._totals[ENCODE], self._totals[DECODE]
            return CodecStats(
                codec=self._codec,
                encoded_blocks=int(made[0]),
                encoded_from_bytes=int(made[1]),
                encoded_to_bytes=int(made[2]),
                encode_seconds=made[3],
                decoded_blocks=int(back[0]),
                decoded_from_bytes=int(back[1]),
                decoded_to_bytes=int(back[2]),
                decode_seconds=back[3],
                refused=dict(self._refused),
            )
