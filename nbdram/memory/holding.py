"""What READs hold for a moment: images as they were read, and what is in them, until the socket has it.

None of it is in the budget before the process is measured, and many begin at once. So each says how much it may need
at most, and waits for others to end while that is more than what is free. Half of reclaim's reserve is left alone: what
is measured is always a little late. One at a time may always go on.
"""

import asyncio
from collections import deque

from nbdram.memory.budget import Budget


class Holding:
    """All of a server."""

    def __init__(self) -> None:
        self._pages = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self, budget: Budget, pages: int) -> None:
        """Returns when it is one's turn; `give` must follow."""
        while self._pages and self._pages + pages > budget.free_pages - budget.reserve_pages // 2:
            ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(ended)
            await ended
        self._pages += pages

    def give(self, pages: int) -> None:
        self._pages -= pages
        waiting, self._waiting = self._waiting, deque()
        for ended in waiting:
            if not ended.done():
                ended.set_result(None)
