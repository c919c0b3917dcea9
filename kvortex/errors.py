"""Every error that kvortex raises, under one base class.

An error says what was wrong, what was seen, and what to change. Raising one leaves nothing half done: a call that
raises has moved no byte, holds no pin and has reserved no slot.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Any

_LONGEST = 100  # characters of a value in a message: an array or a prompt must not fill a log
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = _LONGEST + 1
_REPR.maxtuple = _REPR.maxlist = 20
_LOGIN = re.compile(r"(//[^/@:\s]*):\S*@")  # to the last @, since passwords may have some that should have been quoted
_HALF_LOGIN = re.compile(r"(//[^/@:\s\[]*):(?!\*\*\*@|\d*(?![^/?#,:;\s]))[^:;\s]*")  # what is no port, where no @ follows
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what servers say must not command a terminal
_SECRET = re.compile(r"password|secret|token|access_key", re.IGNORECASE)  # in the names of options
_SECRET_OPTION = re.compile(rf"([?&][^=&\s]*(?:{_SECRET.pattern})[^=&\s]*=)[^&\s]*", re.IGNORECASE)


class KVortexError(Exception):
    """Base of every error raised by kvortex."""


class ConfigError(KVortexError, ValueError):
    """An option has an unknown name or an impossible value; the message names it."""


class LayoutError(KVortexError, ValueError):
    """The KV tensors cannot be described as blocks of bytes; the message shows the strides that were seen."""


class ArgumentError(KVortexError, ValueError):
    """The arguments of one call do not fit: lengths, shapes, ranges, duplicates. Nothing was moved."""


class CodecError(KVortexError, ValueError):
    """A codec has an unknown name, does not fit the records or its tables, or was handed bytes that it did not make."""


class CodecWarning(UserWarning):
    """An option loses more of blocks than was measured to be harmless, or loss of a kind that nobody has measured."""


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


class CorruptBlocksError(TransferError):
    """Blocks of a load are not what was saved: their digests differ. The other blocks of the load are right; ``blocks`` is how
    many are not."""

    blocks = 0


class LayersMissingError(TransferError):
    """A layer-wise save is waited for before all layers were announced; ``layers`` are those that were not."""

    layers: tuple[int, ...] = ()


class TransferTimeoutError(TransferError, TimeoutError):
    """A wait reached its deadline. The transfer goes on, its slots stay pinned, and it may be waited for again."""


class PoolTimeoutError(KVortexError, TimeoutError):
    """The pool was not whole at the deadline. It goes on growing, and may be waited for again."""


class TraceError(KVortexError, OSError):
    """A trace could not be written to its end; it ends with a whole line, and the message says where and why."""


class IndexStateError(KVortexError, RuntimeError):
    """A slot of the index is not in the state that the call needs, or the index is damaged. Nothing was changed."""


def shown(value: Any) -> str:
    """The ``repr`` of a value, cut at about 100 characters, for messages. Never raises, whatever the value's own does."""
    try:
        if isinstance(value, int) and value.bit_length() > 300:  # Python refuses to print the largest ones
            return f"<{type(value).__name__} of {value.bit_length()} bits>"
        text = _REPR.repr(value[:_LONGEST] if isinstance(value, (bytes, bytearray)) else value)
        return cut(" ".join(text.split()) if "\n" in text else text)  # arrays take several lines
    except Exception:
        return cut(f"<{type(value).__name__}>")


def told(error: BaseException) -> str:
    """What an error says, with its type, cut likewise."""
    try:
        return cut(f"{type(error).__name__}: {error}", 2 * _LONGEST)
    except Exception:
        return cut(type(error).__name__)


def hidden(text: str) -> str:
    """A URL, or a message with one, without its password and without options that are secrets."""
    return _HALF_LOGIN.sub(r"\1:***", _LOGIN.sub(r"\1:***@", _SECRET_OPTION.sub(r"\1***", text)))


def shown_tiers(given: Any) -> str:
    """As :func:`shown`, for what was given as tiers, or as one of them: what may be a secret is left out."""
    try:
        return shown(_without_secrets(given))
    except Exception:
        return cut(f"<{type(given).__name__}>")


def _without_secrets(given: Any) -> Any:
    if isinstance(given, str):
        return hidden(given)
    if isinstance(given, Mapping):
        return {name: "***" if _SECRET.search(str(name)) else _without_secrets(value) for name, value in given.items()}
    return type(given)(map(_without_secrets, given)) if type(given) in (list, tuple) else given


def cut(text: str, longest: int = _LONGEST) -> str:
    """A text of about ``longest`` characters at most, the middle left out, that can be printed."""
    if len(text) > longest:
        text = f"{text[: longest - 23]}...{text[-20:]}"
    return _CONTROL.sub("\ufffd", text.encode("utf-8", "backslashreplace").decode())
