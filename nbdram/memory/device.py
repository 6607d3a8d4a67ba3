"""The address space of one device: the hot map, the index words, and the rules between them.

Invariants, which the hot loop of `server/connection.py` keeps too:

1. A page is served from `hot` only if its resident bit is set. Holes are never read through a map:
   a read fault on a shared memory file would allocate a page.
2. A cluster's reference byte is non-zero if and only if its word is.
3. A write's bytes are in `hot` before its bits are in the word, and only then is it acknowledged. A page
   whose bit is clear is zero in `hot` (not allocated), but for the one page that each write in progress
   is being received into (`Incoming`).
4. Punching goes the other way: first the word, then `hot`; both in one step of the event loop, so that no
   write comes in between.
5. Memory that waits to be sent is not punched: every sender that could not send all of its views at once is
   in `senders`, and is told to copy what it still needs before a punch.
"""

import errno
import mmap
import os
import re
from collections.abc import Iterator
from typing import Protocol

from nbdram.memory.backing import Backing
from nbdram.memory.budget import Budget
from nbdram.memory.layout import (
    CLUSTER,
    CLUSTER_SHIFT,
    PAGE,
    PAGE_SHIFT,
    RESIDENT,
    RESIDENT_AND_DIRTY,
    RESIDENT_MASKS,
    TOUCHED,
    WHOLE,
    WORD_BYTES,
    WORDS_PER_PAGE,
    page_runs,
)

# One step of a punch: freeing 2 MiB of pages holds the loop for about a tenth of a millisecond.
_STEP_CLUSTERS = 32
_RESIDENT_OF = tuple(
    int.from_bytes(RESIDENT.to_bytes(WORD_BYTES, "little") * count, "little") for count in range(_STEP_CLUSTERS + 1)
)
_NO_REFERENCES = bytes(PAGE)
_FULL_INDEX_PAGE = WHOLE.to_bytes(WORD_BYTES, "little") * WORDS_PER_PAGE
_touched_runs = re.compile(rb"[^\0]+").finditer

HOLE = 0
RESIDENT_TIER = 1

Extent = tuple[int, int, int]  # start, end (bytes of the device), tier


class Sender(Protocol):
    """Somebody who holds views of `hot` that a socket has not taken yet."""

    def copy_out(self, start: int, end: int) -> None:
        """Replace all views of device bytes [start, end) by copies."""


class Device:
    """`size` bytes of sparse memory. Offsets and lengths are bytes; the caller has checked bounds."""

    def __init__(self, name: str, size: int, budget: Budget) -> None:
        self.name = name
        self.size = size
        self.budget = budget
        self.backing = Backing(name, size)
        self.hot = self.backing.hot
        self.hot_view = memoryview(self.hot)
        self.words = memoryview(self.backing.index).cast("Q")
        self.references = self.backing.references
        self.resident_pages = 0
        self.senders: set[Sender] = set()
        self.incoming: set[Incoming] = set()

    def close(self) -> None:
        """Give all memory back; nobody may hold a view of `hot` any more."""
        self.hot_view.release()
        self.words.release()
        self.backing.close()
        self.budget.give(self.resident_pages)
        self.resident_pages = 0

    # -- reading -----------------------------------------------------------------------------------

    def read(self, offset: int, length: int) -> bytes:
        """The plain twin of the hot loop's READ."""
        return b"".join(
            self.hot_view[start:end] if tier else bytes(end - start)
            for start, end, tier in self.pieces(offset, offset + length)
        )

    def is_resident(self, offset: int, end: int) -> bool:
        """Whether every page of [offset, end) is in `hot`; touches the clusters."""
        words, references = self.words, self.references
        first, last = offset >> CLUSTER_SHIFT, (end - 1) >> CLUSTER_SHIFT
        for cluster in range(first, last + 1):
            if not references[cluster]:
                return False
            resident = words[cluster] & RESIDENT
            if resident != RESIDENT:
                mask = _pages_within(cluster, offset, end)
                if resident & mask != mask:
                    return False
            references[cluster] = TOUCHED
        return True

    def pieces(self, offset: int, end: int) -> Iterator[Extent]:
        """[offset, end) as neighbouring extents that differ in tier; touches the clusters."""
        start, tier = offset, -1
        for piece_start, _, piece_tier in self.extents(offset, end):
            if piece_tier != tier:
                if tier >= 0:
                    yield start, piece_start, tier
                start, tier = piece_start, piece_tier
        if end > start:
            yield start, end, tier

    def extents(self, offset: int, end: int) -> Iterator[Extent]:
        """[offset, end) cut at page boundaries, in order, not merged, in small steps.

        Holes of any size are one step, found through the index file's own holes.
        """
        at = offset
        for first, last in self._touched(offset >> CLUSTER_SHIFT, (end - 1) >> CLUSTER_SHIFT):
            start = max(offset, first << CLUSTER_SHIFT)
            stop = min(end, (last + 1) << CLUSTER_SHIFT)
            if start > at:
                yield at, start, HOLE
            yield from self._extents_of_run(start, stop)
            at = stop
        if end > at:
            yield at, end, HOLE

    def _extents_of_run(self, start: int, stop: int) -> Iterator[Extent]:
        """Extents of touched clusters that lie within one page of the index."""
        at = start
        while at < stop:
            cluster = at >> CLUSTER_SHIFT
            base = cluster * WORD_BYTES
            whole = (stop >> CLUSTER_SHIFT) - cluster
            if (
                whole > 1
                and not at & (CLUSTER - 1)
                and self.references[cluster]
                and self.backing.index[base : base + whole * WORD_BYTES] == _FULL_INDEX_PAGE[: whole * WORD_BYTES]
            ):
                yield at, at + whole * CLUSTER, RESIDENT_TIER
                at += whole * CLUSTER
                continue
            cluster_end = min(stop, (cluster + 1) << CLUSTER_SHIFT)
            # Another request may have punched the cluster while the caller let others run.
            word = self.words[cluster] if self.references[cluster] else 0
            cluster_start = cluster << CLUSTER_SHIFT
            for first, after in page_runs(word & RESIDENT):
                run_start = max(at, cluster_start + first * PAGE)
                run_end = min(cluster_end, cluster_start + after * PAGE)
                if run_start >= run_end:
                    continue
                if run_start > at:
                    yield at, run_start, HOLE
                yield run_start, run_end, RESIDENT_TIER
                at = run_end
            if at < cluster_end:
                yield at, cluster_end, HOLE
            at = cluster_end

    def _touched(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Runs of clusters of [first, last] that have a word, none across a page of the index."""
        fd = self.backing.index_fd
        cluster = first
        while cluster <= last:
            try:
                found = os.lseek(fd, cluster * WORD_BYTES, os.SEEK_DATA) // WORD_BYTES
            except OSError as error:
                if error.errno == errno.ENXIO:  # no data from here to the end of the file
                    return
                raise
            cluster = max(cluster, found)
            after = min((cluster | (WORDS_PER_PAGE - 1)) + 1, last + 1)
            if cluster >= after:
                return
            for run in _touched_runs(self.references[cluster:after]):
                yield cluster + run.start(), cluster + run.end() - 1
            cluster = after

    # -- writing -----------------------------------------------------------------------------------

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Store `data`; ENOSPC if the budget has no room for new pages, and then nothing changed."""
        end = offset + len(data)
        if end == offset:
            return
        self.budget.take(self.missing_pages(offset, end))
        self.hot[offset:end] = data
        self.mark_written(offset, end)

    def missing_pages(self, offset: int, end: int) -> int:
        """How many pages of [offset, end) are not resident."""
        missing = 0
        for cluster in range(offset >> CLUSTER_SHIFT, ((end - 1) >> CLUSTER_SHIFT) + 1):
            mask = _pages_within(cluster, offset, end)
            word = self.words[cluster] if self.references[cluster] else 0
            missing += (mask & ~word).bit_count()
        return missing

    def mark_written(self, offset: int, end: int) -> int:
        """Set the bits of pages whose bytes are in `hot`; returns how many became resident."""
        words, references = self.words, self.references
        new_pages = 0
        for cluster in range(offset >> CLUSTER_SHIFT, ((end - 1) >> CLUSTER_SHIFT) + 1):
            mask = _pages_within(cluster, offset, end)
            word = words[cluster] if references[cluster] else 0
            new_pages += (mask & ~word).bit_count()
            words[cluster] = word | mask * RESIDENT_AND_DIRTY
            references[cluster] = TOUCHED
        self.resident_pages += new_pages
        return new_pages

    def zero(self, offset: int, end: int, *, keep_allocated: bool = False) -> Iterator[None]:
        """Make [offset, end) read as zeros, in steps that the caller iterates.

        Whole pages become holes, unless `keep_allocated`: then they are written, which may raise ENOSPC.
        """
        if keep_allocated:
            for start in range(offset, end, CLUSTER):
                self.write(start, bytes(min(CLUSTER, end - start)))
                yield
            return
        inner, inner_end = -(-offset // PAGE) * PAGE, end // PAGE * PAGE
        if inner > inner_end:  # within one page
            self._zero_bytes(offset, end)
            return
        self._zero_bytes(offset, inner)
        self._zero_bytes(inner_end, end)
        yield from self.punch(inner, inner_end)

    def _zero_bytes(self, start: int, end: int) -> None:
        """Overwrite a part of one page, which stays a hole if it is one."""
        if start < end and self.missing_pages(start, end) == 0:
            self.write(start, bytes(end - start))

    # -- punching ----------------------------------------------------------------------------------

    def trim(self, offset: int, end: int) -> Iterator[None]:
        """Give back the whole pages of [offset, end), in steps that the caller iterates."""
        return self.punch(-(-offset // PAGE) * PAGE, end // PAGE * PAGE)

    def punch(self, start: int, end: int) -> Iterator[None]:
        """Make the pages of [start, end), which are page bounds, holes; costs O(clusters touched)."""
        if start >= end:
            return
        for first, last in self._touched(start >> CLUSTER_SHIFT, (end - 1) >> CLUSTER_SHIFT):
            for step in range(first, last + 1, _STEP_CLUSTERS):
                after = min(step + _STEP_CLUSTERS, last + 1)
                if step << CLUSTER_SHIFT < start:
                    self._punch_pages(step, start, end)
                    step += 1
                if after > step and after << CLUSTER_SHIFT > end:
                    after -= 1
                    self._punch_pages(after, start, end)
                if after > step:
                    self._punch_clusters(step, after)
                self._drop_metadata(first)
                yield

    def _punch_clusters(self, first: int, after: int) -> None:
        index = self.backing.index
        at, stop = first * WORD_BYTES, after * WORD_BYTES
        bits = int.from_bytes(index[at:stop], "little") & _RESIDENT_OF[after - first]
        index[at:stop] = bytes(stop - at)
        self.references[first:after] = bytes(after - first)
        self._release(first << CLUSTER_SHIFT, after << CLUSTER_SHIFT, bits.bit_count())

    def _punch_pages(self, cluster: int, start: int, end: int) -> None:
        """Punch the pages of [start, end) that lie in one cluster."""
        if not self.references[cluster]:
            return
        mask = _pages_within(cluster, start, end)
        word = self.words[cluster]
        resident = word & mask
        word &= ~mask * RESIDENT_AND_DIRTY
        self.words[cluster] = word
        if not word:
            self.references[cluster] = 0
        base = cluster << CLUSTER_SHIFT
        self._release(max(start, base), min(end, base + CLUSTER), resident.bit_count())

    def _release(self, start: int, end: int, pages: int) -> None:
        """Give `hot` pages back to the kernel: the only place that does."""
        for sender in self.senders:
            sender.copy_out(start, end)
        at = start
        for page in sorted(incoming.page for incoming in self.incoming):
            if at <= page < end and not self._has(page):  # bytes of an unfinished write: not ours to punch
                if page > at:
                    self.hot.madvise(mmap.MADV_REMOVE, at, page - at)
                at = page + PAGE
        if at < end:
            self.hot.madvise(mmap.MADV_REMOVE, at, end - at)
        self.resident_pages -= pages
        self.budget.give(pages)

    def _has(self, page_offset: int) -> bool:
        cluster = page_offset >> CLUSTER_SHIFT
        word = self.words[cluster] if self.references[cluster] else 0
        return bool(word >> (page_offset >> PAGE_SHIFT & 15) & 1)

    def release_unmarked(self, page_offset: int) -> None:
        """Punch a page that an abandoned write had begun to fill, unless it is somebody's by now."""
        if not self._has(page_offset):
            self._release(page_offset, page_offset + PAGE, 0)

    def _drop_metadata(self, cluster: int) -> None:
        """Give back the index page, and the references page, around `cluster` if they are empty."""
        base = cluster & ~(WORDS_PER_PAGE - 1)
        if self.references[base : base + WORDS_PER_PAGE] != _NO_REFERENCES[:WORDS_PER_PAGE]:
            return
        self.backing.index.madvise(mmap.MADV_REMOVE, base * WORD_BYTES, PAGE)
        base = cluster & ~(PAGE - 1)
        if self.references[base : base + PAGE] == _NO_REFERENCES:
            self.references.madvise(mmap.MADV_DONTNEED, base, PAGE)


class Incoming:
    """A large WRITE whose payload is received straight into `hot`, in pieces.

    The budget for its missing pages is claimed at the start (ENOSPC there harms nothing). Bits are set page by
    page as bytes arrive, so if the connection dies, every page is either the old one or a new one.
    """

    def __init__(self, device: Device, offset: int, end: int) -> None:
        self._claimed = device.missing_pages(offset, end)
        device.budget.take(self._claimed)
        self._device = device
        self._at = offset
        self._end = end
        self._marked = offset
        device.incoming.add(self)

    @property
    def page(self) -> int:
        """The offset of the page that is being received into."""
        return self._at & ~(PAGE - 1)

    @property
    def remaining(self) -> int:
        """Bytes that are still to come."""
        return self._end - self._at

    def view(self) -> memoryview:
        """Where the rest of the payload belongs."""
        return self._device.hot_view[self._at : self._end]

    def received(self, length: int) -> bool:
        """`length` more bytes are in place; True when that was all."""
        self._at += length
        done = self._at == self._end
        arrived = self._at if done else self.page
        if arrived > self._marked:
            self._claimed -= self._device.mark_written(self._marked, arrived)
            self._marked = arrived
        if done:
            self._finish()
        return done

    def abandon(self) -> None:
        """The rest will never come: keep what arrived in whole pages, leave no stray bytes."""
        page = self.page
        self._finish()
        if self._at > self._marked:
            self._device.release_unmarked(page)

    def _finish(self) -> None:
        self._device.incoming.discard(self)
        self._device.budget.give(self._claimed)
        self._claimed = 0


def _pages_within(cluster: int, start: int, end: int) -> int:
    """The mask of the pages of `cluster` that [start, end) touches."""
    base = cluster << CLUSTER_SHIFT
    first = start - base >> PAGE_SHIFT if start > base else 0
    last = (end - 1 - base) >> PAGE_SHIFT if end < base + CLUSTER else 15
    return RESIDENT_MASKS[first << 4 | last]
