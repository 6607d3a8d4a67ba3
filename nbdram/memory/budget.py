"""The memory that all devices of a server share, counted in pages."""

import errno

from nbdram.memory.layout import PAGE


class Budget:
    """How many more pages may become resident. Plain ints: the hot path reads and writes them."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_pages = limit_bytes // PAGE
        self.free_pages = self.limit_pages

    @property
    def used_pages(self) -> int:
        return self.limit_pages - self.free_pages

    def take(self, pages: int) -> None:
        """Claim pages, or raise ENOSPC and claim none."""
        if pages > self.free_pages:
            raise OSError(errno.ENOSPC, "the memory budget is used up")
        self.free_pages -= pages

    def give(self, pages: int) -> None:
        self.free_pages += pages
