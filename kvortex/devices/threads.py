"""A mutex and a semaphore of the C library, for compiled code that holds no GIL."""

from __future__ import annotations

import ctypes

import numpy as np

from kvortex.devices.native import libc_address

_WORDS = 16  # 128 bytes: more than a pthread_mutex_t or a sem_t has anywhere
_RECURSIVE = 1  # PTHREAD_MUTEX_RECURSIVE of Linux


def busy_address() -> int:
    """Of a function that answers every call with a number that is not 0."""
    return libc_address("getpid")


class Mutex:
    """A lock. Its owner may take it again, as a driver made of Python does whose objects are finalised in the middle of a call.

    Attributes
    ----------
    cells : (4,) int64
        Its address, and those of ``pthread_mutex_lock``, ``pthread_mutex_trylock`` and ``pthread_mutex_unlock``.
    """

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        self._memory, attributes = np.zeros(_WORDS, np.int64), np.zeros(_WORDS, np.int64)
        at, how = ctypes.c_void_p(self._memory.ctypes.data), ctypes.c_void_p(attributes.ctypes.data)
        libc.pthread_mutexattr_init(how)
        libc.pthread_mutexattr_settype(how, _RECURSIVE)
        libc.pthread_mutex_init(at, how)
        names = "pthread_mutex_lock", "pthread_mutex_trylock", "pthread_mutex_unlock"
        self.cells = np.array([at.value or 0, *map(libc_address, names)], np.int64)


class Semaphore:
    """Counts what there is to do; a thread that waits for some takes no time.

    Attributes
    ----------
    cells : (3,) int64
        Its address, and those of ``sem_wait`` and ``sem_post``.
    """

    def __init__(self) -> None:
        self._memory = np.zeros(_WORDS, np.int64)
        at = ctypes.c_void_p(self._memory.ctypes.data)
        ctypes.CDLL(None).sem_init(at, 0, 0)
        self.cells = np.array([at.value or 0, libc_address("sem_wait"), libc_address("sem_post")], np.int64)
