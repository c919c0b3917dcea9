"""What the records of one tier are, where they are not what slots hold.

A tier with a codec of its own has a namespace of its own, made of the engine's and of the codec's digest (its tables,
parameters and shape of records): records of several codecs lie side by side in a store, and who has another one does
not see them.

Codecs with loss need to know which blocks begin a sequence. A key says it: where a tier has such a codec, the engine makes all
its keys by :func:`marked`, whose last bit is 1 for those, so nothing else has to carry it, from RAM to a store and back.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from kvortex.codecs import Codec
from kvortex.keys import KeyArray, Namespace, adopt
from kvortex.tiers.codec_metrics import CodecTally
from kvortex.tiers.envelope import ENVELOPE_BYTES
from kvortex.tiers.record import RecordFormat

_TAG = b"kvortex-tier-codec-1"  # a new form of records gets a new one, so that old and new ones never meet
_PAGE = 4096  # of a disk's slots
_BEGINS, _FOLLOWS = 0xFF, 0xFE  # behind a key: no number of a part of kvortex.coding, of which there are a few


@dataclass(frozen=True)
class TierCoding:
    """The way between slots and records of one tier.

    Parameters
    ----------
    pool
        The codec of what slots hold; None for blocks as they lie in pages.
    own
        The tier's; None for the same records, without the zeros behind them.
    tally
    """

    pool: Codec | None
    own: Codec | None
    tally: CodecTally = field(compare=False)

    @property
    def lossy(self) -> bool:
        """Whether the tier gives back less than it got."""
        return self.own is not None and not self.own.exact

    @property
    def slot_bytes(self) -> int:
        """Bytes of what a slot holds."""
        if self.pool is not None:
            return self.pool.slot_bytes
        return 0 if self.own is None else self.own.shape.raw_bytes

    def format_from(self, form: RecordFormat) -> RecordFormat:
        """The format of the tier's records, from that of what slots hold."""
        if self.own is None:
            return replace(form, foreign=self.tally.foreign)
        most, usual = (ENVELOPE_BYTES + size for size in (self.own.worst_bytes, self.own.slot_bytes))
        digest = hashlib.sha256()
        for part in (_TAG, form.namespace, self.own.name.encode(), self.own.digest):
            digest.update(len(part).to_bytes(8, "little") + part)
        usual = min(most, -(-usual // _PAGE) * _PAGE)
        raw_bytes = self.own.shape.raw_bytes
        return RecordFormat(digest.digest(), most, self.own.number, raw_bytes, usual, self.tally.foreign)


def marked(namespace: Namespace, keys: KeyArray, begins: npt.NDArray[np.bool_]) -> KeyArray:
    """Keys that say whether their block begins a sequence; so one that was stored as that is found only by who asks for it so.

    SHA-256 of 32 bytes of the namespace, the key and a byte, as no scheme hashes them; then the last bit is set.
    """
    tags = np.where(begins, _BEGINS, _FOLLOWS).astype(np.uint8)
    made = adopt(namespace, np.concatenate((keys, tags[:, None]), axis=1))
    made[:, -1] = (made[:, -1] & 0xFE) | begins
    return made


def begin(keys: KeyArray) -> npt.NDArray[np.bool_]:
    """(n,) bool: which blocks begin a sequence, by keys of :func:`marked`."""
    return np.asarray(keys[:, -1] & 1, np.bool_)
