"""nbdram, with a beat in its event loop, each due a millisecond after the last: python -m bench.watched FILE serve ...

FILE has the longest time between two beats, in seconds (a double): no stall was longer. Who reads it may set it back.
"""

import asyncio
import mmap
import struct
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import uvloop

from nbdram.cli import main

_EVERY_S: Final = 0.001
_LONGEST: Final = struct.Struct("d")


class Longest:
    """What is in FILE."""

    def __init__(self, path: Path) -> None:
        with path.open("a+b") as file:
            file.truncate(_LONGEST.size)
            self._cell = mmap.mmap(file.fileno(), _LONGEST.size)

    def take(self) -> float:
        """In seconds, since this was last asked."""
        (longest,) = _LONGEST.unpack(self._cell[:])
        self._cell[:] = bytes(_LONGEST.size)
        return float(longest)

    def note(self, seconds: float) -> None:
        if seconds > _LONGEST.unpack(self._cell[:])[0]:
            self._cell[:] = _LONGEST.pack(seconds)


async def _watched(longest: Longest, served: Coroutine[Any, Any, None]) -> None:
    loop = asyncio.get_running_loop()

    def beat(last: float) -> None:
        now = time.monotonic()
        longest.note(now - last)
        loop.call_later(_EVERY_S, beat, now)

    loop.call_soon(beat, time.monotonic())
    await served


def _main(file: str, *arguments: str) -> int:
    longest, run = Longest(Path(file)), uvloop.run
    with patch("uvloop.run", lambda served: run(_watched(longest, served))):
        return main(arguments)


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
