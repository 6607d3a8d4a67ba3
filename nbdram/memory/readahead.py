"""Reading ahead of a client that reads cold data in order: the next images are there when it comes.

Only for images on disk or in a remote; what is in RAM is decompressed when it is read. An image that was read for a
part of its cluster is kept as well, for the rest.
"""

from typing import TYPE_CHECKING, Final

from nbdram.memory.layout import CLUSTER_SHIFT

if TYPE_CHECKING:
    from nbdram.memory.device import Device
    from nbdram.memory.fetch import Fetcher

FIRST_WINDOW: Final = 2  # clusters; it doubles with each READ that goes on where the last one ended
MOST: Final = 16
KEPT: Final = 2 * MOST  # images that were read ahead, of all clients together: 2 MiB at most


class ReadAhead:
    """What one client has read last, and how far ahead of it was read."""

    def __init__(self, fetcher: "Fetcher") -> None:
        self._fetcher = fetcher
        self._next = -1  # where it goes on if it reads in order
        self._window = 0
        self._asked = 0  # the first cluster that was not asked for yet

    def follow(self, device: "Device", start: int, end: int) -> None:
        """The client wants [start, end), of which something is not in RAM. Begins to read what it will want next."""
        cluster = (end - 1) >> CLUSTER_SHIFT
        if start != self._next:
            self._next, self._window, self._asked = end, 0, cluster
            return
        self._next = end
        self._window = min(max(FIRST_WINDOW, 2 * self._window), MOST)
        if device.budget.free_pages <= device.budget.reserve_pages:
            return
        after = min(cluster + 1 + self._window, device.backing.clusters)
        for ahead in range(max(self._asked, cluster), after):
            self._fetcher.fetch_ahead(device, ahead)
        self._asked = max(self._asked, after)
