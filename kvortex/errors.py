"""Every error that kvortex raises, under one base class.

An error says what was wrong, what was seen, and what to change. Raising one leaves nothing half done: a call that
raises has moved no byte, holds no pin and has reserved no slot.
"""

from __future__ import annotations

from typing import Any

_MOST_SHOWN = 80  # characters: what was wrong is seen at its beginning, and a log takes no megabytes of it


class KVortexError(Exception):
    """Base of every error raised by kvortex."""


class ConfigError(KVortexError, ValueError):
    """An option has an unknown name or an impossible value; the message names it."""


class LayoutError(KVortexError, ValueError):
    """The KV tensors cannot be described as blocks of bytes; the message shows the strides that were seen."""


class ArgumentError(KVortexError, ValueError):
    """The arguments of one call do not fit: lengths, shapes, ranges, duplicates. Nothing was moved."""


class PoolFullError(KVortexError):
    """The pool has too few slots that are free or may be evicted; the rest are pinned or still being written."""


class EngineClosedError(KVortexError, RuntimeError):
    """The engine was shut down, or belongs to the process that this one was forked from."""


class ReentrantCallError(KVortexError, RuntimeError):
    """A call that waits for all other calls was made from inside one of them: in a signal handler, or a finaliser."""


class DeviceError(KVortexError, RuntimeError):
    """A call of the device's driver failed; ``code`` is the driver's number for it, -1 where there is none."""

    code = -1


class DeviceUnavailableError(DeviceError):
    """The device that was asked for does not exist here, or its driver or libraries are missing."""


class BuildError(KVortexError, RuntimeError):
    """A kernel could not be compiled for this device."""


class PinnedMemoryError(KVortexError, MemoryError):
    """Host memory could not be reserved or pinned; the message says what to change."""


class TransferError(KVortexError, RuntimeError):
    """A transfer could not be issued."""


class TransferTimeoutError(TransferError, TimeoutError):
    """A wait reached its deadline. The transfer goes on, its slots stay pinned, and it may be waited for again."""


class IndexStateError(KVortexError, RuntimeError):
    """A slot of the index is not in the state that the call needs, or the index is damaged. Nothing was changed."""


def shown(value: Any) -> str:
    """``repr(value)`` for a message, cut where it is long; numbers of more digits than Python writes have a text too."""
    try:
        text = repr(value)
    except ValueError:  # sys.set_int_max_str_digits
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return cut(text)


def cut(text: str, most: int = _MOST_SHOWN) -> str:
    """Text of any length for a message: one that is too long loses its end."""
    return text if len(text) <= most else text[: most - 3] + "..."
