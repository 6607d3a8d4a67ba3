"""The memory that all devices of a server share, counted in pages.

Everything counts: resident pages, cold images in RAM, index pages, and what the process itself takes (`overhead`).
The hot path reads and writes one int, `free_pages`. When it falls below `wake_below`, reclaim is woken; when a
writer finds too little, it may wait if there is hope, and gets ENOSPC otherwise.

Those who wait stand in a queue. While there is one, memory that is short is for its head: it is told when there is
enough for it, takes its turn, and goes to the end if it wants more. So a client that writes without a pause starves
nobody, and one that needs much at once gets it some time.
"""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nbdram.memory.layout import PAGE

# Reclaim works between these shares of the budget that are free; the first is at least so many pages, but for a tiny
# budget: images that are read, and replies that wait, may take some MiB within milliseconds.
_START_SHARE = 0.01
_STOP_SHARE = 0.02
_START_PAGES = 1024
_MOST_SHARE = 0.10
# It starts earlier where memory would be short after this time at the pace of late: so that what a fast writer leaves
# of the processor is put to use. Of the memory for data, at most so much is made free for that: what has been written
# when a writer stops should not be cold already.
_AHEAD_S = 0.5
_AHEAD_SHARE = 0.5
# The processes that compress take a tenth of a second to start: they are called for where it would be short after this.
_SOON_S = 1.0
# What writers leave for reclaim itself: images are stored before the pages that they replace are given back.
_RESERVE_PAGES = 1024
# When the process may have taken so much since it was measured last, for replies and images, it is measured again.
_UNMEASURED_BYTES = 1024 * 1024
# What may be taken in one turn, if others wait.
_TURN_PAGES = 256


@dataclass(slots=True)
class _Waiter:
    resume: Callable[[], None]
    pages: int  # what it could not get
    told: bool = False


class Budget:
    """`limit_bytes` of RAM for everything."""

    def __init__(self, limit_bytes: int) -> None:
        self.overhead_pages = 0
        self.free_pages = 0
        self.limit_pages = 0
        self.reserve_pages = 0
        self.wake_below = 0
        self.stop_above = 0
        self.ahead_pages = 0
        self.is_soon_short = False
        self._pace = 0.0  # pages that data take more, each second
        self._seen_pages = 0
        self.reclaim: Callable[[], None] | None = None
        self._measure: Callable[[], None] | None = None
        self._unmeasured = 0  # bytes
        self._given_up_at: int | None = None  # with so much free
        self._queue: dict[object, _Waiter] = {}
        self._serving: object = None  # whose turn it is
        self._taken = 0  # in this turn
        self._refused = 0  # what was last asked for in vain
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

    def may_have_grown(self, count: int) -> None:
        """The process holds `count` bytes more, perhaps, for as long as it takes: measured if that was much."""
        self._unmeasured += count
        if self._unmeasured >= _UNMEASURED_BYTES and self._measure:
            self._unmeasured = 0
            self._measure()

    def _mark(self) -> None:
        usable = self.data_pages
        self.reserve_pages = min(_RESERVE_PAGES, usable // 16) if self.reclaim else 0
        start = max(int(usable * _START_SHARE), min(_START_PAGES, int(usable * _MOST_SHARE)))
        self.wake_below = start + self.reserve_pages
        self.stop_above = max(int(usable * _STOP_SHARE), start * 5 // 4) + self.reserve_pages

    def look_ahead(self, elapsed_s: float) -> None:
        """Called again and again, last so many seconds ago: reclaim starts now if memory is going fast."""
        pages = self.used_pages - self.overhead_pages
        self._pace = max(0.0, (self._pace + (pages - self._seen_pages) / elapsed_s) / 2)
        if self.free_pages < self.wake_below:  # reclaim is at it, and writers go at its pace
            self._pace = 0.0
        self._seen_pages = pages
        self.ahead_pages = int(min(self._pace * _AHEAD_S, self.data_pages * _AHEAD_SHARE))
        self.is_soon_short = 0 <= self.free_pages - self.wake_below < self._pace * _SOON_S
        if self.reclaim and self.ahead_pages and self.free_pages < self.wake_below + self.ahead_pages:
            self.reclaim()

    def attach(self, reclaim: Callable[[], None], measure: Callable[[], None] | None = None) -> None:
        """From now on `reclaim` is called when memory gets short, and `measure` when the process may have grown."""
        self.reclaim = reclaim
        self._measure = measure
        self._seen_pages = self.used_pages - self.overhead_pages
        self._mark()

    @property
    def data_pages(self) -> int:
        """What there is for data: all but what the process itself takes."""
        return max(0, self.limit_pages - self.overhead_pages)

    @property
    def goal_pages(self) -> int:
        """What reclaim should make free: also enough for what was last refused, however small the budget is."""
        return max(self.stop_above + self.ahead_pages, self._refused + self.reserve_pages)

    @property
    def hopeful(self) -> bool:
        """Whether it is worth waiting for memory: also if some was taken since reclaim gave up: that is new."""
        return self.reclaim is not None and (self._given_up_at is None or self.free_pages < self._given_up_at)

    @property
    def is_short(self) -> bool:
        """Whether it is for more than the comfort of READs that reclaim is wanted."""
        return self.free_pages < self.wake_below or self._refused > 0

    def satisfied(self) -> None:
        """Reclaim has reached its goal."""
        self._refused = 0
        self.freed()

    def give_up(self) -> None:
        """There is nothing left to reclaim: those who wait, and those who come until there is hope, get ENOSPC."""
        self._given_up_at = self.free_pages
        self._refused = 0
        self.freed(everyone=True)

    def hope(self) -> None:
        """Reclaim is willing to look again."""
        self._given_up_at = None

    @property
    def used_pages(self) -> int:
        return self.limit_pages - self.free_pages

    def take(self, pages: int) -> None:
        """Claim pages, or raise ENOSPC and claim none."""
        left = self.free_pages - pages
        if left < self.wake_below and self.reclaim:
            self.reclaim()
        if pages:
            if left < self.reserve_pages or (self._queue and left < self.wake_below and not self._is_turn()):
                self._refused = pages
                raise OSError(errno.ENOSPC, "the memory budget is used up")
            self._taken += pages
        self.free_pages = left

    def check_edge(self) -> None:
        """ENOSPC unless there is a page to fault in, of which a write covers a part.

        These few may come out of reclaim's reserve: the write that they are for may have waited its turn already.
        """
        if self.free_pages < self.wake_below and self.reclaim:
            self.reclaim()
        if self.free_pages <= 0:
            self._refused = 1
            raise OSError(errno.ENOSPC, "the memory budget is used up")

    def has_spare(self, *, much: bool = False) -> bool:
        """Whether there is memory for what need not be resident, but had better be. If not, some is reclaimed.

        `much`: so much that reclaim has nothing to do for a while.
        """
        if self.free_pages > self.wake_below:
            return not much or self.free_pages > 2 * self.stop_above
        if self.reclaim and not much:
            self.reclaim()
        return False

    def give(self, pages: int) -> None:
        self.free_pages += pages
        if self._queue:
            self.freed()

    # -- waiting -----------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._queue)

    def wait(self, who: object, resume: Callable[[], None]) -> None:
        """After a `take` in vain: `resume` is called, once, when there is reason to try again, as a `turn`."""
        if self._serving is who and self._taken:  # it has had something: others come first
            self._queue.pop(who, None)
        self._queue[who] = _Waiter(resume, self._refused)

    def leave(self, who: object) -> None:
        """Wait no more."""
        if self._queue.pop(who, None):
            self.freed()

    @contextmanager
    def turn(self, who: object) -> Iterator[None]:
        """For `who` to try again what failed. If it does not `wait` again meanwhile, it needs no more."""
        waiter = self._queue.get(who)
        if waiter is not None and next(iter(self._queue)) is who:
            self._serving, self._taken = who, 0
        try:
            yield
        finally:
            self._serving = None
            if waiter is not None and self._queue.get(who) is waiter:
                del self._queue[who]
            self.freed()

    def freed(self, *, everyone: bool = False) -> None:
        """Let the first in the queue try again, if there is enough for it; or all, to hear that it is in vain."""
        if everyone:
            for waiter in list(self._queue.values()):
                self._tell(waiter)
        elif self._queue:
            waiter = next(iter(self._queue.values()))
            if self.free_pages - waiter.pages >= self.reserve_pages:
                self._tell(waiter)

    @staticmethod
    def _tell(waiter: _Waiter) -> None:
        if not waiter.told:
            waiter.told = True
            waiter.resume()

    def _is_turn(self) -> bool:
        return self._serving is not None and (len(self._queue) < 2 or self._taken < _TURN_PAGES)
