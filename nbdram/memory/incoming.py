"""A large WRITE, whose payload is received in pieces: straight into `hot`, or where pages are new, by a buffer."""

from typing import TYPE_CHECKING

from nbdram.memory.layout import CLUSTER, CLUSTER_SHIFT, PAGE

if TYPE_CHECKING:
    from nbdram.memory.device import Device

WINDOW_BYTES = 1024 * 1024


class Incoming:
    """The bytes [offset, end) of a device, on their way.

    The budget for its missing pages is claimed a window at a time, so that a write may be larger than what is free.
    Bits are set page by page as bytes arrive, so if the connection dies, every page that was not resident is either
    the old one or a new one; of one that was, what came is new and the rest is old (docs/design.md has what it would
    cost to let that be whole sectors only). Reclaim leaves its clusters alone.

    `buffer` is for what comes where most pages are new (`Space.put`). It is shared: nobody else may use it between
    `view` and `received`.
    """

    def __init__(self, device: "Device", offset: int, end: int, buffer: memoryview) -> None:
        self._device = device
        self._buffer = buffer
        self._map: memoryview | None = None  # of the device, to receive into; None: by `buffer`
        self._offset = offset
        self._at = offset
        self._end = end
        self._marked = offset
        self._granted = offset  # as far as memory is claimed
        self._claimed = 0  # pages
        self.grant()
        device.incoming.add(self)

    def grant(self) -> None:
        """Claim memory for the next window; ENOSPC or FarPage, if it must wait, and then nothing changed."""
        if self._device.is_whole(self._granted >> CLUSTER_SHIFT, ((self._end - 1) >> CLUSTER_SHIFT) + 1):
            self._granted = self._end
            self._map = self._device.hot_view
            return
        end = min(self._end, -(-(self._granted + WINDOW_BYTES) // PAGE) * PAGE)
        self._device.fault_edges(self._granted, end)
        missing = self._device.missing_pages(self._granted, end)
        self._device.budget.take(missing)
        self._claimed += missing
        self._map = self._map_for(self._granted, end, missing * PAGE)
        self._device.mark_changing(self._granted, end)
        self._granted = end

    def _map_for(self, start: int, end: int, missing: int) -> memoryview | None:
        """By which map to receive [start, end), `missing` bytes of which are in pages that are not resident."""
        if 2 * missing < end - start:
            return self._device.hot_view
        return None if (start | end) & (CLUSTER - 1) else self._device.folio_view

    @property
    def is_held_up(self) -> bool:
        """Whether it takes another grant to go on."""
        return self._at == self._granted

    @property
    def is_last(self) -> bool:
        """Whether `view` has room for all that is still to come."""
        return self._granted == self._end and (self._map is not None or self._end - self._at <= len(self._buffer))

    @property
    def remaining(self) -> tuple[int, int]:
        """The bytes [start, end) that are still to come."""
        return self._at, self._end

    @property
    def _page(self) -> int:
        """The offset of the page that is being received into."""
        return self._at & ~(PAGE - 1)

    def unmarked(self) -> tuple[int, int] | None:
        """The bytes [start, end) of the last page that have arrived, but whose bit is not set yet."""
        start = max(self._offset, self._page)
        return (start, self._at) if start < self._at else None

    def covers(self, cluster: int) -> bool:
        return self._marked >> CLUSTER_SHIFT <= cluster <= (self._granted - 1) >> CLUSTER_SHIFT

    def punched(self, start: int, end: int) -> None:
        """[start, end) has been given back: clusters there come page by page now, for what we pay for is not all."""
        if self._map is not None and start < self._granted and end > self._at & ~(CLUSTER - 1):
            self._map = self._device.hot_view

    def view(self) -> memoryview:
        """Where the next bytes of the payload belong."""
        if self._map is None:
            return self._buffer[: self._granted - self._at]
        return self._map[self._at : self._granted]

    def received(self, length: int) -> bool:
        """`length` more bytes are in `view`; True when that was all. OSError if there is no room for them."""
        if self._map is None:
            self._device.put(self._at, self._buffer[:length])
        return self._advance(length)

    def write(self, data: memoryview) -> bool:
        """As `received`, of bytes that are elsewhere; they must not be more than `view` has room for."""
        if self._map is None:
            self._device.put(self._at, data)
        else:
            self._map[self._at : self._at + len(data)] = data
        return self._advance(len(data))

    def _advance(self, length: int) -> bool:
        """So many bytes are in place."""
        self._at += length
        done = self._at == self._end
        arrived = self._at if done else self._page
        if arrived > self._marked:
            self._claimed -= self._device.mark_written(self._marked, arrived)
            self._device.drop_zeros(self._marked, arrived, self._map)
            self._marked = arrived
        if done:
            self._finish()
        elif self._at == self._granted:
            self._give_back()
        return done

    def _give_back(self) -> None:
        """What was claimed for pages that another write has made resident meanwhile is not needed any more."""
        needed = self._device.missing_pages(self._page, self._granted) if self._page < self._granted else 0
        if self._claimed > needed:
            self._device.budget.give(self._claimed - needed)
            self._claimed = needed

    def abandon(self) -> None:
        """The rest will never come: keep what arrived in whole pages, leave no stray bytes."""
        is_begun = self.unmarked() is not None
        self._finish()
        if self._at & (CLUSTER - 1):
            self._device.release_unmarked(self._page, is_begun)

    def _finish(self) -> None:
        self._device.incoming.discard(self)
        self._device.budget.give(self._claimed)
        self._claimed = 0
