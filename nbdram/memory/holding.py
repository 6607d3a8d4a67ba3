"""What READs hold for a moment: images as they were read, and what is in them, until the socket has it.

None of it is in the budget before the process is measured, and many begin at once. So each says how much it may need
at most, and waits for others to end while that is more than what is free. Half of reclaim's reserve is left alone: what
is measured is always a little late. One at a time may always go on.
"""

import asyncio
from collections import deque

from nbdram.memory.budget import Budget


class Turns(asyncio.Semaphore):
    """So many at once; `release` ends a turn."""

    def take_now(self) -> bool:
        """Whether it is one's turn without waiting."""
        if self._value <= 0 or self._waiters:  # `locked` looks at each of them
            return False
        self._value -= 1
        return True


class Holding:
    """All of a server."""

    def __init__(self) -> None:
        self._pages = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    def take_now(self, budget: Budget, pages: int) -> bool:
        """Whether it could be taken without waiting; then `give` must follow."""
        if self._waiting or not self._has_room(budget, pages):
            return False
        self._pages += pages
        return True

    async def take(self, budget: Budget, pages: int) -> None:
        """Returns when it is one's turn; `give` must follow."""
        while not self._has_room(budget, pages):
            ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(ended)
            await ended
        self._pages += pages

    def _has_room(self, budget: Budget, pages: int) -> bool:
        return not self._pages or self._pages + pages <= budget.free_pages - budget.reserve_pages // 2

    def give(self, pages: int) -> None:
        self._pages -= pages
        waiting, self._waiting = self._waiting, deque()
        for ended in waiting:
            if not ended.done():
                ended.set_result(None)
