"""nbdram, with a beat in its event loop that tells how late it comes: python -m bench.watched FILE serve ...

The beat is due a millisecond after the last one. FILE has the longest that one was late, in seconds (a double); who
reads it may set it back.
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


class Lateness:
    """What is in FILE."""

    def __init__(self, path: Path) -> None:
        with path.open("a+b") as file:
            file.truncate(_LONGEST.size)
            self._cell = mmap.mmap(file.fileno(), _LONGEST.size)

    def take(self) -> float:
        """The longest, in seconds, since this was last asked."""
        (longest,) = _LONGEST.unpack(self._cell[:])
        self._cell[:] = bytes(_LONGEST.size)
        return float(longest)

    def note(self, late: float) -> None:
        if late > _LONGEST.unpack(self._cell[:])[0]:
            self._cell[:] = _LONGEST.pack(late)


async def _watched(lateness: Lateness, served: Coroutine[Any, Any, None]) -> None:
    loop = asyncio.get_running_loop()

    def beat(last: float) -> None:
        now = time.monotonic()
        lateness.note(now - last - _EVERY_S)
        loop.call_later(_EVERY_S, beat, now)

    loop.call_soon(beat, time.monotonic())
    await served


def _main(file: str, *arguments: str) -> int:
    lateness, run = Lateness(Path(file)), uvloop.run
    with patch("uvloop.run", lambda served: run(_watched(lateness, served))):
        return main(arguments)


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
