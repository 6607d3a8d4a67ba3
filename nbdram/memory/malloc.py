"""All threads take what they allocate from one place.

glibc gives threads arenas of their own, each of which keeps what it once was given: with our workers 2 to 3 MiB that
nobody uses. They allocate little, and mostly while they have the interpreter's lock, so that none waits for another.
"""

import ctypes
from typing import Final

_M_ARENA_MAX: Final = -8


def share_one_arena() -> bool:
    """To be called before there are threads. False if this C library has no such thing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_M_ARENA_MAX, 1) == 1
