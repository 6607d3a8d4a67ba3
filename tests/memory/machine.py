"""A device against a bytearray: what hypothesis may do to it, and what must hold after each step.

The window is eight clusters around the border between two pages of the index, and three pages of the last cluster.
The model knows what must be read, not where it is. Bytes of a WRITE that is still being received are in the page
already if that is resident, and `pending` if not: those may be read or not, until the page becomes resident.
"""

import errno
import os
import random
import struct
from collections.abc import Callable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from nbdram.memory.budget import Budget
from nbdram.memory.device import Device
from nbdram.memory.incoming import Incoming
from nbdram.memory.layout import Tier
from tests.helpers import CLUSTER, MIB, PAGE, hot_pages, index_pages
from tests.memory.evicting import evict

MIDDLE = 32 * MIB
BASE = MIDDLE - 4 * CLUSTER
SIZE = MIDDLE + 4 * CLUSTER + 3 * PAGE
LIMIT_PAGES = 100
BUFFER = memoryview(bytearray(5 * PAGE + 100))

offsets = st.one_of(
    st.integers(BASE, SIZE - 1),
    st.integers(BASE // PAGE, SIZE // PAGE - 1).map(lambda page: page * PAGE),
    st.integers(BASE // CLUSTER, SIZE // CLUSTER).map(lambda cluster: cluster * CLUSTER),
)
lengths = st.one_of(
    st.integers(1, 3 * PAGE),
    st.integers(1, 3 * CLUSTER),
    st.integers(1, 40).map(lambda pages: pages * PAGE),
    st.integers(1, 3).map(lambda clusters: clusters * CLUSTER),
)
seeds = st.integers(0, 99)


def content(seed: int, length: int) -> bytes:
    """Zeros, something that compresses, or something that does not."""
    if seed < 10:
        return bytes(length)
    if seed < 70:
        return (b"%05d " % seed * (length // 6 + 1))[:length]
    return random.Random(seed).randbytes(length)


def pages_of(start: int, end: int) -> range:
    """The offsets of the pages that [start, end) touches."""
    return range(start // PAGE * PAGE, end, PAGE)


def fits(work: Callable[[], object]) -> bool:
    """Do it; False if the budget has no room for it."""
    try:
        work()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False
    return True


class Flight:
    """A WRITE that is being received."""

    def __init__(self, incoming: Incoming, offset: int, data: bytes) -> None:
        self.incoming = incoming
        self.offset = offset
        self.data = data
        self.arrived = 0

    @property
    def at(self) -> int:
        return self.offset + self.arrived


class DeviceMachine(RuleBasedStateMachine):
    flights = Bundle("flights")

    def __init__(self) -> None:
        super().__init__()
        self.budget = Budget(LIMIT_PAGES * PAGE)
        self.device = Device("model", SIZE, self.budget)
        self.model = bytearray(SIZE - BASE)
        self.live: list[Flight] = []
        self.pending: list[tuple[Flight, int, bytes]] = []
        self.resident = self.resident_now()

    def teardown(self) -> None:
        for flight in self.live:
            flight.incoming.abandon()
        self.device.close()
        assert self.budget.free_pages == LIMIT_PAGES

    # -- what the model does -----------------------------------------------------------------------

    def tiers(self, start: int, end: int) -> dict[int, int]:
        """The tier of each page that [start, end) touches."""
        low, high = start // PAGE * PAGE, min(SIZE, -(-end // PAGE) * PAGE)
        return {page: tier for first, last, tier in self.device.extents(low, high) for page in range(first, last, PAGE)}

    def resident_now(self) -> set[int]:
        return {page for page, tier in self.tiers(BASE, SIZE).items() if tier == Tier.RESIDENT}

    def put(self, offset: int, data: bytes) -> None:
        self.model[offset - BASE : offset - BASE + len(data)] = data

    def settle(self) -> None:
        """Pages that became resident show what was pending in them."""
        now = self.resident_now()
        for page in now - self.resident:
            for entry in [entry for entry in self.pending if entry[1] // PAGE * PAGE == page]:
                self.put(entry[1], entry[2])
                self.pending.remove(entry)
        self.resident = now

    def zeroed(self, start: int, end: int) -> None:
        """[start, end) was zeroed; whole pages may be holes, in which unfinished writes keep what they brought."""
        before = self.resident
        self.settle()
        for page in range(-(-start // PAGE) * PAGE, end // PAGE * PAGE, PAGE):
            kept = [entry for entry in self.pending if entry[1] // PAGE * PAGE == page]
            self.pending = [entry for entry in self.pending if entry not in kept]
            if page in before:
                kept = [(flight, *self.seen(flight, page)) for flight in self.live if flight.at < page + PAGE]
            if page not in self.resident:
                self.pending += [entry for entry in kept if entry[2]]
        self.put(start, bytes(end - start))

    def seen(self, flight: Flight, page: int) -> tuple[int, bytes]:
        """The part of a resident page that a write has received into."""
        start, end = max(flight.offset, page), max(flight.offset, page, flight.at)
        return start, bytes(self.model[start - BASE : end - BASE])

    def room_for(self, start: int, end: int) -> bool:
        """Whether there is certainly memory for a write."""
        missing = sum(tier != Tier.RESIDENT for tier in self.tiers(start, end).values())
        return missing <= self.budget.free_pages

    # -- what may be done --------------------------------------------------------------------------

    @rule(offset=offsets, length=lengths, seed=seeds)
    def write(self, offset: int, length: int, seed: int) -> None:
        data = content(seed, min(length, SIZE - offset))
        roomy = self.room_for(offset, offset + len(data))
        stored = fits(lambda: self.device.write(offset, data))
        assert stored or not roomy
        self.settle()
        if stored:
            self.put(offset, data)

    @rule(offset=offsets, length=lengths)
    def read(self, offset: int, length: int) -> None:
        end = min(offset + length, SIZE)
        self.compare(offset, self.device.read(offset, end - offset))
        self.settle()

    @rule(offset=offsets, length=lengths, everything=st.booleans())
    def trim(self, offset: int, length: int, everything: bool) -> None:
        start, end = (0, SIZE) if everything else (offset, min(offset + length, SIZE))
        if not fits(lambda: list(self.device.trim(start, end))):
            self.adopt(start, end)
            return
        first, last = max(BASE, -(-start // PAGE) * PAGE), end // PAGE * PAGE
        if first < last:
            self.zeroed(first, last)

    @rule(offset=offsets, length=lengths, keep=st.booleans())
    def zero(self, offset: int, length: int, keep: bool) -> None:
        end = min(offset + length, SIZE)
        if not fits(lambda: list(self.device.zero(offset, end, keep_allocated=keep))):
            self.adopt(offset, end)
            return
        if keep:
            assert set(self.tiers(offset, end).values()) == {Tier.RESIDENT}
            self.settle()
            self.put(offset, bytes(end - offset))
        else:
            self.zeroed(offset, end)

    def adopt(self, start: int, end: int) -> None:
        """Zeroing failed half-way: each byte is as it was, or zero."""
        start = max(start, BASE)
        self.settle()
        found = self.device.read(start, end - start)
        for at, byte in enumerate(found, start - BASE):
            assert byte in (0, self.model[at]), "neither the old byte nor zero"
        self.settle()
        self.put(start, found)

    @rule(cluster=st.integers(BASE // CLUSTER, SIZE // CLUSTER))
    def evict(self, cluster: int) -> None:
        """As reclaim does it: not where a WRITE is being received."""
        if not any(incoming.covers(cluster) for incoming in self.device.incoming):
            evict(self.device, cluster)
            self.resident = self.resident_now()

    @rule(target=flights, offset=offsets, length=lengths, seed=seeds)
    def begin(self, offset: int, length: int, seed: int) -> Flight | None:
        return self.send(offset, content(seed, min(length, SIZE - offset)))

    @rule(target=flights, first=st.integers(0, 7), count=st.integers(1, 3), seed=seeds)
    def begin_clusters(self, first: int, count: int, seed: int) -> Flight | None:
        return self.send(BASE + first * CLUSTER, content(seed, min(8 - first, count) * CLUSTER))

    def send(self, offset: int, data: bytes) -> Flight | None:
        roomy = self.room_for(offset, offset + len(data))
        started: list[Incoming] = []
        fits(lambda: started.append(Incoming(self.device, offset, offset + len(data), BUFFER)))
        self.settle()
        if not started:
            assert not roomy
            return None
        flight = Flight(started[0], offset, data)
        self.live.append(flight)
        return flight

    @rule(flight=flights, share=st.floats(0.01, 1))
    def receive(self, flight: Flight | None, share: float) -> None:
        if flight not in self.live:
            return
        assert flight
        view = flight.incoming.view()
        assert 0 < len(view) <= len(flight.data) - flight.arrived
        count = max(1, int(len(view) * share))
        start = flight.at
        piece = flight.data[flight.arrived : flight.arrived + count]
        view[:count] = piece
        del view
        flight.arrived += count
        for page in pages_of(start, start + count):
            low, high = max(page, start), min(page + PAGE, start + count)
            part = piece[low - start : high - start]
            if page in self.resident:
                self.put(low, part)
            else:
                self.pending.append((flight, low, part))
        done = flight.incoming.received(count)
        assert done == (flight.arrived == len(flight.data))
        if done:
            self.live.remove(flight)
        self.settle()
        for entry in [
            entry for entry in self.pending if entry[0] is flight and (done or entry[1] < flight.at // PAGE * PAGE)
        ]:
            assert not any(entry[2]), "only zeros may have gone with their cluster"
            self.put(entry[1], entry[2])
            self.pending.remove(entry)

    @rule(flight=consumes(flights))
    def abandon(self, flight: Flight | None) -> None:
        if flight in self.live:
            assert flight
            flight.incoming.abandon()
            self.live.remove(flight)
            self.pending = [entry for entry in self.pending if entry[0] is not flight]
            self.settle()

    # -- what must hold ----------------------------------------------------------------------------

    def compare(self, offset: int, found: bytes) -> None:
        expected = bytearray(self.model[offset - BASE : offset - BASE + len(found)])
        for _, at, data in self.pending:  # may be seen, or not yet
            low, high = max(at, offset), min(at + len(data), offset + len(found))
            if low < high:
                expected[low - offset : high - offset] = found[low - offset : high - offset]
        if found != expected:
            at = next(i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
            pytest.fail(f"byte {offset + at:#x} is {found[at]}, not {expected[at]}")

    @invariant()
    def the_content_is_what_was_written(self) -> None:
        self.compare(BASE, self.device.read(BASE, SIZE - BASE))
        self.settle()

    @invariant()
    def extents_cover_everything_once_and_holes_are_zeros(self) -> None:
        at = 0
        for start, end, tier in self.device.extents(0, SIZE):
            assert start == at < end
            at = end
            if tier == Tier.HOLE:
                assert not any(self.model[max(0, start - BASE) : max(0, end - BASE)])
        assert at == SIZE

    def surplus(self) -> int:
        """How many pages may be allocated besides those that are resident or were begun."""
        return 0

    @invariant()
    def each_page_is_counted_once(self) -> None:
        stray = {at // PAGE * PAGE for _, at, _ in self.pending} - self.resident
        assert self.device.resident_pages == len(self.resident)
        surplus = hot_pages(self.device) - len(self.resident) - len(stray)
        assert 0 <= surplus <= self.surplus()
        assert self.device.cold_pages * PAGE == self.device.ram.allocated_bytes()
        assert self.device.index_pages == index_pages(self.device)
        whole = self.device.backing.clusters * CLUSTER  # an image is of a whole cluster, also of the last one
        stored = sum(end - start for start, end, tier in self.device.extents(0, whole) if tier != Tier.HOLE)
        assert self.device.stored_bytes == stored

    @invariant()
    def the_budget_is_what_is_left(self) -> None:
        device = self.device
        used = device.resident_pages + device.cold_pages + device.index_pages
        if not self.live:
            assert self.budget.free_pages == LIMIT_PAGES - used

    @invariant()
    def a_reference_byte_is_zero_exactly_where_the_word_is(self) -> None:
        for first in (BASE // CLUSTER, 0):
            raw = os.pread(
                self.device.backing.index_fd, 8 * 16, first * 8
            )  # unlike a look at the map, it allocates nothing
            words = struct.unpack(f"<{len(raw) // 8}Q", raw)
            for cluster, word in enumerate(words, first):
                assert bool(self.device.references[cluster]) == bool(word)
