"""nbdram, with a beat in its event loop each half millisecond: python -m bench.watched FILE serve ...

FILE has the longest time between two beats, in seconds: no stall was longer. And the longest that was not spent on
waiting for a core, which others had: what is left is what the program itself did, or waited for. (Two doubles.) Who
reads it may set it back.
"""

import asyncio
import ctypes
import mmap
import os
import struct
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final, NamedTuple
from unittest.mock import patch

import uvloop

from nbdram.cli import main

EVERY_NS: Final = 500_000
_TIME: Final = struct.Struct("4q")  # struct itimerspec: how often and from when on, in seconds and nanoseconds
_LONGEST: Final = struct.Struct("2d")


class Stall(NamedTuple):
    """In seconds, each the longest: not necessarily the same."""

    whole_s: float
    own_s: float  # without the time that others had its core

    def or_longer(self, other: "Stall") -> "Stall":
        return Stall(*map(max, self, other))


class Beats:
    """The times between the beats of this thread.

    The clock and the waits are read one after the other. So let beats be far apart (EVERY_NS) beside the time that this
    takes, or what happens in between counts for the wrong one.
    """

    def __init__(self) -> None:
        self._schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY)  # of the thread that opens it
        self._last_s, self._last_waited_s = time.monotonic(), self._waited_s()

    def beat(self) -> Stall:
        """How long ago the last one was."""
        now, waited = time.monotonic(), self._waited_s()
        whole = now - self._last_s
        stall = Stall(whole, whole - (waited - self._last_waited_s))
        self._last_s, self._last_waited_s = now, waited
        return stall

    def _waited_s(self) -> float:
        """How long this thread has waited for a core."""
        return int(os.pread(self._schedstat, 100, 0).split()[1]) / 1e9


class Longest:
    """What is in FILE."""

    def __init__(self, path: Path) -> None:
        with path.open("a+b") as file:
            file.truncate(_LONGEST.size)
            self._cell = mmap.mmap(file.fileno(), _LONGEST.size)

    def take(self) -> Stall:
        """Since this was last asked."""
        longest = Stall(*_LONGEST.unpack(self._cell[:]))
        self._cell[:] = bytes(_LONGEST.size)
        return longest

    def note(self, stall: Stall) -> None:
        self._cell[:] = _LONGEST.pack(*stall.or_longer(Stall(*_LONGEST.unpack(self._cell[:]))))


async def _watched(longest: Longest, served: Coroutine[Any, Any, None]) -> None:
    beats, timer = Beats(), _timer()

    def beat() -> None:
        os.read(timer, 8)
        longest.note(beats.beat())

    asyncio.get_running_loop().add_reader(timer, beat)
    await served


def _timer() -> int:
    """What can be read each time that a beat is due. (The loop's own timers are up to a millisecond late.)"""
    libc = ctypes.CDLL(None, use_errno=True)  # Python itself has timers of this kind from 3.13 on
    timer: int = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
    if timer < 0 or libc.timerfd_settime(timer, 0, _TIME.pack(0, EVERY_NS, 0, EVERY_NS), None):
        raise OSError(ctypes.get_errno(), "no timer can be had")
    return timer


def _main(file: str, *arguments: str) -> int:
    longest, run = Longest(Path(file)), uvloop.run
    with patch("uvloop.run", lambda served: run(_watched(longest, served))):
        return main(arguments)


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
