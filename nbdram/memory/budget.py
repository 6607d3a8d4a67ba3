"""The memory that all devices of a server share, counted in pages.

Everything counts: resident pages, cold images in RAM, index pages, and what the process itself takes (`overhead`).
The hot path reads and writes one int, `free_pages`. When it falls below `wake_below`, reclaim is woken; when a
writer finds too little, it may wait for `freed` if there is hope, and gets ENOSPC otherwise.
"""

import errno
from collections.abc import Callable

from nbdram.memory.layout import PAGE

# Reclaim works between these shares of the budget that are in use.
_START_SHARE = 0.90
_STOP_SHARE = 0.85
# What writers leave for reclaim itself: images are stored before the pages that they replace are given back.
_RESERVE_PAGES = 1024


class Budget:
    """`limit_bytes` of RAM for everything."""

    def __init__(self, limit_bytes: int) -> None:
        self.overhead_pages = 0
        self.free_pages = 0
        self.limit_pages = 0
        self.reserve_pages = 0
        self.wake_below = 0
        self.stop_above = 0
        self.reclaim: Callable[[], None] | None = None
        self.hopeful = False
        self.waiting: list[Callable[[], None]] = []
        self.set_limit(limit_bytes)

    def set_limit(self, limit_bytes: int) -> None:
        """Raise or lower the limit; what is above a lowered one is reclaimed, not lost."""
        pages = limit_bytes // PAGE
        self.free_pages += pages - self.limit_pages
        self.limit_pages = pages
        self._mark()
        self.freed()

    def set_overhead(self, pages: int) -> None:
        """The process itself takes `pages` now (as measured from outside: RssAnon)."""
        self.free_pages -= pages - self.overhead_pages
        self.overhead_pages = pages
        self._mark()

    def add_overhead(self, count: int) -> None:
        """The process takes `count` bytes more, until it is measured again."""
        self.set_overhead(self.overhead_pages + -(-count // PAGE))

    def _mark(self) -> None:
        usable = max(0, self.limit_pages - self.overhead_pages)
        self.reserve_pages = min(_RESERVE_PAGES, usable // 16) if self.reclaim else 0
        self.wake_below = int(usable * (1 - _START_SHARE)) + self.reserve_pages
        self.stop_above = int(usable * (1 - _STOP_SHARE)) + self.reserve_pages

    def attach(self, reclaim: Callable[[], None]) -> None:
        """From now on `reclaim` is called when memory gets short."""
        self.reclaim = reclaim
        self.hopeful = True
        self._mark()

    @property
    def used_pages(self) -> int:
        return self.limit_pages - self.free_pages

    def take(self, pages: int) -> None:
        """Claim pages, or raise ENOSPC and claim none."""
        left = self.free_pages - pages
        if left < self.wake_below and self.reclaim:
            self.reclaim()
        if left < self.reserve_pages and pages:
            raise OSError(errno.ENOSPC, "the memory budget is used up")
        self.free_pages = left

    def give(self, pages: int) -> None:
        self.free_pages += pages
        if self.waiting:
            self.freed()

    def freed(self) -> None:
        """Let those who wait for memory try again."""
        waiting, self.waiting = self.waiting, []
        for resume in waiting:
            resume()
