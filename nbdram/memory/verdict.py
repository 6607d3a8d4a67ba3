""" "There is nothing left to reclaim": how long that is believed while nobody asks for memory.

Who asks makes reclaim look again at once. If nobody does, what could change the verdict is rare: a disk that works
again, say. A look costs milliseconds for each gigabyte, so that they are few, and fewer as time goes by.
"""

import time
from typing import Final

_FIRST_S: Final = 0.5
_MOST_S: Final = 60.0


class Verdict:
    """Of one reclaimer; there is none at first."""

    def __init__(self) -> None:
        self._pause_s = _FIRST_S
        self._until = 0.0
        self._free_pages = 0

    def pass_on(self, free_pages: int) -> None:
        """Reclaim has looked everywhere in vain, with so much free. Believed twice as long as the one before."""
        self._until = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _MOST_S)
        self._free_pages = free_pages

    def lift(self) -> None:
        """There is enough, or something was found."""
        self._until = 0.0
        self._pause_s = _FIRST_S

    def stands(self, free_pages: int) -> bool:
        """Whether it is believed; not if there is less memory than it was about: the process or a limit changed."""
        return free_pages >= self._free_pages and time.monotonic() < self._until
