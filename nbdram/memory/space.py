"""The address space of one device: what is where, how it is given back, and the rules of both.

Invariants, which the hot loop of `server/connection.py` keeps too:

1. A page is served from `hot` only if its resident bit is set. Holes are never read through a map:
   a read fault on a shared memory file would allocate a page.
2. A cluster's reference byte is non-zero if and only if its word is.
3. A write's bytes are in `hot` before its bits are in the word, and only then is it acknowledged. A page whose bit
   is clear is zero in `hot` (not allocated), but for the one page that each write in progress is being received
   into (`Incoming`), which then holds what has arrived of it; the rest of its cluster may be allocated with it.
4. The dirty bit is set with the resident bit whenever `hot` differs from the cold image.
5. The cold image that the word points at is never overwritten in place: a new image goes to the other slot, then
   the word changes in one store, then the old slot is dropped. Fault order: bytes to `hot`, then the word.
6. Giving back goes the other way: first the word, then the memory; both in one step of the event loop, so that no
   write comes in between.
7. Memory that waits to be sent is not punched: every sender that could not send all of its views at once is in
   `senders`, and is told to copy what it still needs before a punch.
"""

import errno
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, Protocol
from weakref import WeakValueDictionary

from nbdram.memory.backing import Backing, OpenFile, anonymous
from nbdram.memory.budget import Budget
from nbdram.memory.layout import (
    CLUSTER,
    CLUSTER_SHIFT,
    COLD_REFERENCE,
    DIRTY_SHIFT,
    LENGTH_MASK,
    LENGTH_SHIFT,
    PAGE,
    PAGE_SHIFT,
    RAM,
    RESIDENT,
    SLOT_SHIFT,
    TIER_MASK,
    TIER_SHIFT,
    WHOLE,
    WORD_BYTES,
    WORDS_PER_PAGE,
    Reference,
    Tier,
    far_slot,
    page_runs,
    pages_within,
)
from nbdram.memory.tiers.disk import DiskTier
from nbdram.memory.tiers.ram import RamTier, image_pages

if TYPE_CHECKING:
    from nbdram.memory.incoming import Incoming
    from nbdram.memory.tiers.remote import RemoteTier

# One step of a punch: freeing 2 MiB of pages holds the loop for about a tenth of a millisecond.
_STEP_CLUSTERS: Final = 32
_RESIDENT_OF: Final = tuple(
    int.from_bytes(RESIDENT.to_bytes(WORD_BYTES, "little") * count, "little") for count in range(_STEP_CLUSTERS + 1)
)
_NO_REFERENCES: Final = bytes(PAGE)
_FULL_INDEX_PAGE: Final = WHOLE.to_bytes(WORD_BYTES, "little") * WORDS_PER_PAGE
_touched_runs = re.compile(rb"[^\0]+").finditer

Extent = tuple[int, int, int]  # start, end (bytes of the device), tier


class Sender(Protocol):
    """Somebody who holds views of `hot` that a socket has not taken yet."""

    def copy_out(self, copies: "Copies") -> None:
        """Replace all views of device bytes [copies.start, copies.end) by views of copies."""


class Copies:
    """Copies of device bytes [start, end), which are about to be punched: made when somebody asks, one for all."""

    def __init__(self, hot: memoryview, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.length = 0  # of all copies
        self._hot = hot
        self._made: dict[int, memoryview] = {}

    def of(self, start: int, end: int) -> Iterator[memoryview]:
        """The bytes [start, end), in pieces."""
        while start < end:
            low = max(self.start, start & ~(CLUSTER - 1))
            copy = self._made.get(low)
            if copy is None:
                copy = memoryview(bytes(self._hot[low : min(self.end, (low | (CLUSTER - 1)) + 1)]))
                self._made[low] = copy
                self.length += len(copy)
            stop = min(end, low + len(copy))
            yield copy[start - low : stop - low]
            start = stop


class FarImage:
    """An image that is being fetched, or was: `is_current` until its cluster gets another one, or none.

    The word does not tell: the next image may be as long as this one, and in the same slot.
    """

    def __init__(self) -> None:
        self.content = b""
        self.is_current = True
        self.is_read = False  # for a client: all that is read of it counts once


class Space:
    """The maps of one device of at most `size` bytes, and what they hold."""

    def __init__(self, name: str, size: int, budget: Budget, open_file: OpenFile | None = None) -> None:
        self.name = name
        self.size = size
        self.budget = budget
        self.backing = Backing(size, open_file or anonymous(name))
        self.ram = RamTier(self.backing.cold_fd)
        self.disk: DiskTier | None = None
        self.remote: RemoteTier | None = None
        self.remote_first = False  # what leaves RAM goes to the remote, and on to disk
        self.hot = self.backing.hot
        self.hot_view = memoryview(self.hot)
        self.folio_view = self._view_folios()
        self.words = memoryview(self.backing.index).cast("Q")
        self.references = self.backing.references
        self.resident_pages = 0
        self.cold_pages = 0  # of images in RAM
        self.cold_clusters = 0  # that have an image in RAM
        self.disk_clusters = 0  # that have one on disk
        self.index_pages = 0
        self.disk_pages = 0  # of images on disk
        self.remote_clusters = 0  # that have an image in the remote
        self.remote_pages = 0  # of images there
        self.duplicate_pages = 0  # resident pages of clusters that have an image
        self.senders: set[Sender] = set()
        self.incoming: set[Incoming] = set()
        self.far_images: WeakValueDictionary[int, FarImage] = WeakValueDictionary()  # by cluster
        self.has_dropped = False  # images in RAM: it may be about to drop some when others are stored
        self.reclaiming: set[int] = set()  # clusters that a worker compresses just now

    def close(self) -> None:
        """Give all memory back; nobody may hold a view of `hot` any more."""
        self.hot_view.release()
        if self.folio_view:
            self.folio_view.release()
        self.words.release()
        self.ram.close()
        self.backing.close()
        if self.disk:
            self.disk.close()
        if self.remote:
            self.remote.close()
        self.budget.give(self.resident_pages + self.cold_pages + self.index_pages)
        self.resident_pages = self.cold_pages = self.index_pages = 0

    def resize(self, size: int) -> None:
        """Set the maximum. Nothing may be allocated, or on its way, above a smaller one."""
        self.backing.resize(size)
        if self.hot is not self.backing.hot:
            self.hot = self.backing.hot
            self.hot_view = memoryview(self.hot)
            self.folio_view = self._view_folios()
        self.size = size

    def _view_folios(self) -> memoryview | None:
        return memoryview(self.backing.folios) if self.backing.folios else None

    def last_cluster(self) -> int:
        """The last cluster that is allocated, -1 if none is."""
        last = -1
        at = 0
        while (span := self.next_span(at, self.backing.clusters)) is not None:
            first, at = span
            used = self.references[first:at].rstrip(b"\0")
            if used:
                last = first + len(used) - 1
        return last

    def word(self, cluster: int) -> int:
        return self.words[cluster] if self.references[cluster] else 0

    def is_whole(self, first: int, after: int) -> bool:
        """Whether every page of the clusters [first, after) is resident and dirty: writes need no book-keeping."""
        count = after - first
        return (
            count <= WORDS_PER_PAGE
            and 0 not in self.references[first:after]
            and self.backing.index[first * WORD_BYTES : after * WORD_BYTES] == _FULL_INDEX_PAGE[: count * WORD_BYTES]
        )

    @property
    def stored_bytes(self) -> int:
        """What the device holds, however it is kept: resident pages, and the content of images, each page once."""
        images = self.cold_clusters + self.disk_clusters + self.remote_clusters
        return (self.resident_pages - self.duplicate_pages) * PAGE + images * CLUSTER

    # -- what is where -----------------------------------------------------------------------------

    def extents(self, offset: int, end: int) -> Iterator[Extent]:
        """[offset, end) cut at page boundaries, in order, neighbours not merged, in small steps.

        Holes of any size are one step, found through the index file's own holes.
        """
        at = offset
        for first, last in self._touched(offset >> CLUSTER_SHIFT, (end - 1) >> CLUSTER_SHIFT):
            start = max(offset, first << CLUSTER_SHIFT)
            stop = min(end, (last + 1) << CLUSTER_SHIFT)
            if start > at:
                yield at, start, int(Tier.HOLE)
            yield from self._extents_of_run(start, stop)
            at = stop
        if end > at:
            yield at, end, int(Tier.HOLE)

    def _extents_of_run(self, start: int, stop: int) -> Iterator[Extent]:
        """Extents of touched clusters that lie within one page of the index."""
        at = start
        while at < stop:
            cluster = at >> CLUSTER_SHIFT
            first = cluster * WORD_BYTES
            whole = (stop >> CLUSTER_SHIFT) - cluster
            length = whole * WORD_BYTES
            if (
                whole > 1
                and not at & (CLUSTER - 1)
                and self.references[cluster]
                and self.backing.index[first : first + length] == _FULL_INDEX_PAGE[:length]
            ):
                yield at, at + whole * CLUSTER, int(Tier.RESIDENT)
                at += whole * CLUSTER
                continue
            base = cluster << CLUSTER_SHIFT
            cluster_end = min(stop, base + CLUSTER)
            # The word is read anew: another request may have changed it while the caller let others run.
            for piece, piece_end, tier in tiers_of(self.word(cluster), at - base, cluster_end - base):
                yield base + piece, base + piece_end, tier
            at = cluster_end

    def _touched(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Runs of clusters of [first, last] that have a word, none across a page of the index."""
        cluster = first
        while cluster <= last:
            found = self.next_word(cluster)
            if found is None or found > last:
                return
            cluster = max(cluster, found)
            after = min((cluster | (WORDS_PER_PAGE - 1)) + 1, last + 1)
            for run in _touched_runs(self.references[cluster:after]):
                yield cluster + run.start(), cluster + run.end() - 1
            cluster = after

    def next_word(self, cluster: int) -> int | None:
        """The first cluster from `cluster` on that the index may have a word for."""
        try:
            found = os.lseek(self.backing.index_fd, cluster * WORD_BYTES, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here to the end of the file
                return None
            raise
        return max(cluster, found // WORD_BYTES)

    def next_span(self, cluster: int, most: int) -> tuple[int, int] | None:
        """The next clusters [first, after) from `cluster` on that the index may have words for."""
        first = self.next_word(cluster)
        if first is None or first >= self.backing.clusters:
            return None
        hole = os.lseek(self.backing.index_fd, first * WORD_BYTES, os.SEEK_HOLE) // WORD_BYTES
        return first, min(hole, first + most, self.backing.clusters)

    # -- punching ----------------------------------------------------------------------------------

    def punch(self, start: int, end: int, *, advisory: bool = False) -> Iterator[None]:
        """Make the pages of [start, end), which are page bounds, holes; costs O(clusters touched).

        Works in steps, which the caller iterates. Where a cluster is punched in part and its other pages are only
        in the cold image, the pages become zeros instead, which may raise ENOSPC; `advisory`: they stay, then.
        """
        if start >= end:
            return
        for first, last in self._touched(start >> CLUSTER_SHIFT, (end - 1) >> CLUSTER_SHIFT):
            for step in range(first, last + 1, _STEP_CLUSTERS):
                after = min(step + _STEP_CLUSTERS, last + 1)
                if step << CLUSTER_SHIFT < start:
                    self._punch_pages(step, start, end, advisory)
                    step += 1
                if after > step and after << CLUSTER_SHIFT > end:
                    after -= 1
                    self._punch_pages(after, start, end, advisory)
                if after > step:
                    self._punch_clusters(step, after)
                yield

    def _punch_clusters(self, first: int, after: int) -> None:
        """Make whole clusters of one index page holes."""
        if not any(self.references[first:after]):  # another request was faster
            return
        index = self.backing.index
        at, stop = first * WORD_BYTES, after * WORD_BYTES
        words = index[at:stop]
        index[at:stop] = bytes(stop - at)
        self.references[first:after] = bytes(after - first)
        bits = int.from_bytes(words, "little")
        resident = bits & _RESIDENT_OF[after - first]
        if resident:
            self.release(first << CLUSTER_SHIFT, after << CLUSTER_SHIFT, resident.bit_count())
        if bits >> LENGTH_SHIFT:
            for number, word in enumerate(memoryview(words).cast("Q"), first):
                self.drop_image(number, word)
        self._drop_metadata(first)

    def _punch_pages(self, cluster: int, start: int, end: int, advisory: bool) -> None:
        """Punch the pages of [start, end) that lie in one cluster, but are not all of it."""
        word = self.word(cluster)
        if not word:
            return
        mask = pages_within(cluster, start, end)
        base = cluster << CLUSTER_SHIFT
        start, end = max(start, base), min(end, base + CLUSTER)
        others = RESIDENT & ~mask
        if word >> LENGTH_SHIFT and word & others != others:
            try:
                self.write(start, bytes(end - start))
            except OSError as error:
                if not advisory or error.errno != errno.ENOSPC:
                    raise
            return
        left = word & others
        if not left:
            self.clear(cluster)
            return
        self.words[cluster] = left | left << 16
        self.references[cluster] = Reference.TOUCHED
        self.release(start, end, (word & mask).bit_count())
        self.drop_image(cluster, word)

    def write(self, offset: int, data: bytes) -> None:
        """Store `data`."""
        raise NotImplementedError

    def put(self, offset: int, *parts: bytes | bytearray | memoryview) -> None:
        """Store bytes, one part behind the other, in `hot` where most pages are new.

        That is done through the file, which takes half the time: by way of the map, each page would be zeroed first.
        Whole clusters have a map of their own where there can be one. ENOSPC if the file system of the files is full;
        invariant 3 holds then too.
        """
        length = sum(map(len, parts))
        if self.folio_view and not (offset | length) & (CLUSTER - 1):
            for part in parts:
                self.folio_view[offset : offset + len(part)] = part
                offset += len(part)
            return
        try:
            done = os.pwritev(self.backing.hot_fd, parts, offset)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            done = 0
        if done != length:
            for page in range(offset & ~(PAGE - 1), offset + done, PAGE):
                if not self._has(page):
                    self.release(page, page + PAGE, 0)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # -- giving back -------------------------------------------------------------------------------

    def clear(self, cluster: int) -> None:
        """Make a cluster a hole."""
        word = self.words[cluster]
        self.words[cluster] = 0
        self.references[cluster] = 0
        base = cluster << CLUSTER_SHIFT
        if word & RESIDENT:
            self.release(base, base + CLUSTER, (word & RESIDENT).bit_count())
        self.drop_image(cluster, word)
        self._drop_metadata(cluster)

    def drop_image(self, cluster: int, word: int) -> None:
        """Give back the cold image that `word`, which is not the cluster's any more, points at."""
        length = word >> LENGTH_SHIFT & LENGTH_MASK
        if not length:
            return
        pages = image_pages(length)
        self.duplicate_pages -= (word & RESIDENT).bit_count()
        if word >> TIER_SHIFT & TIER_MASK == RAM:
            self.has_dropped = True
            self.ram.drop(cluster, word >> SLOT_SHIFT & 1, length)
            self.cold_pages -= pages
            self.cold_clusters -= 1
            self.budget.give(pages)
        else:
            read = self.far_images.pop(cluster, None)
            if read:
                read.is_current = False
            self.far_tier(word).drop(cluster, far_slot(word), length)
            self._count_far(word, -1, -pages)

    def discard_image(self, cluster: int, image: int) -> None:
        """Give back an image that was stored, but never became the cluster's."""
        length = image >> LENGTH_SHIFT & LENGTH_MASK
        if image >> TIER_SHIFT & TIER_MASK == Tier.RAM:
            self.ram.drop(cluster, image >> SLOT_SHIFT & 1, length)
        else:
            self.far_tier(image).drop(cluster, far_slot(image), length)

    def drop_resident(self, cluster: int) -> None:
        """Let a cluster whose image has everything live from it."""
        word = self.words[cluster]
        self.words[cluster] = word & ~WHOLE
        self.references[cluster] = cold_reference(word)
        base = cluster << CLUSTER_SHIFT
        pages = (word & RESIDENT).bit_count()
        self.duplicate_pages -= pages
        self.release(base, base + CLUSTER, pages)

    def take_images(self, first: int, images: Sequence[int]) -> None:
        """New images, described by words, have all of neighbouring clusters from now on, the first of which is `first`.

        Their pages are punched together.
        """
        after = first + len(images)
        words, references = self.words, self.references
        replaced = words[first:after].tolist()
        resident = 0
        for cluster, image, old in zip(range(first, after), images, replaced, strict=True):
            words[cluster] = image
            tier = image >> TIER_SHIFT & TIER_MASK
            references[cluster] = COLD_REFERENCE[tier]
            pages = image_pages(image >> LENGTH_SHIFT & LENGTH_MASK)
            if tier == RAM:
                self.cold_pages += pages
                self.cold_clusters += 1
                self.budget.free_pages -= pages
            else:
                self._count_far(image, 1, pages)
            resident += (old & RESIDENT).bit_count()
        if resident:
            self.release(first << CLUSTER_SHIFT, after << CLUSTER_SHIFT, resident)
        for cluster, old in zip(range(first, after), replaced, strict=True):
            if old >> LENGTH_SHIFT:
                self.drop_image(cluster, old)

    def far_tier(self, word: int) -> "DiskTier | RemoteTier":
        """The tier that has the image of a word that is not in RAM."""
        tier = self.disk if word >> TIER_SHIFT & TIER_MASK == Tier.DISK else self.remote
        assert tier
        return tier

    def far_tiers(self) -> "list[DiskTier | RemoteTier]":
        """The tiers below RAM, in the order in which images go there."""
        tiers = (self.remote, self.disk) if self.remote_first else (self.disk, self.remote)
        return [tier for tier in tiers if tier]

    def roomy_tier(self) -> "DiskTier | RemoteTier | None":
        """The first tier below RAM where it is worth trying to store an image."""
        return next((tier for tier in self.far_tiers() if tier.has_room()), None)

    def _count_far(self, word: int, clusters: int, pages: int) -> None:
        if word >> TIER_SHIFT & TIER_MASK == Tier.DISK:
            self.disk_pages += pages
            self.disk_clusters += clusters
        else:
            self.remote_pages += pages
            self.remote_clusters += clusters

    def release(self, start: int, end: int, pages: int) -> None:
        """Give `hot` pages back to the kernel, `pages` of which were resident: the only place that does."""
        if self.senders:
            copies = Copies(self.hot_view, start, end)
            for sender in tuple(self.senders):
                sender.copy_out(copies)
            self.budget.add_overhead(copies.length)
        arrived = self.arrived(start, end) if self.incoming else []
        for incoming in self.incoming:
            incoming.punched(start, end)
        self.hot.madvise(mmap.MADV_REMOVE, start, end - start)
        for at, content in arrived:
            self.hot[at : at + len(content)] = content
        self.resident_pages -= pages
        self.budget.give(pages)

    def is_receiving(self, cluster: int) -> bool:
        """Whether a write in progress may change the cluster."""
        for incoming in self.incoming:  # noqa: SIM110, a generator takes longer than all of them
            if incoming.covers(cluster):
                return True
        return False

    def arrived(self, start: int, end: int) -> list[tuple[int, bytes]]:
        """What writes in progress have received of pages in [start, end) that have no bit yet: not ours to punch."""
        found = []
        for incoming in self.incoming:
            unmarked = incoming.unmarked()
            if unmarked and start <= unmarked[0] < end and not self._has(unmarked[0]):
                found.append((unmarked[0], self.hot[unmarked[0] : unmarked[1]]))
        return found

    def release_stray(self, cluster: int) -> None:
        """Punch the slots in RAM that hold no image of a cluster: somebody may have stored a part of one."""
        word = self.word(cluster)
        in_use = word >> SLOT_SHIFT & 1 if word >> TIER_SHIFT & TIER_MASK == Tier.RAM else -1
        for slot in (0, 1):
            if slot != in_use:
                self.ram.drop(cluster, slot, CLUSTER)

    def _has(self, page_offset: int) -> bool:
        return bool(self.word(page_offset >> CLUSTER_SHIFT) >> (page_offset >> PAGE_SHIFT & 15) & 1)

    def release_unmarked(self, page_offset: int, is_begun: bool) -> None:
        """Punch what an abandoned write leaves of the cluster that it was being received into, from a page on.

        If that page, which it may have begun to fill, is somebody's by now, what arrived stays.
        """
        cluster = page_offset >> CLUSTER_SHIFT
        if is_begun and self._has(page_offset):
            self.words[cluster] |= 1 << (page_offset >> PAGE_SHIFT & 15) << DIRTY_SHIFT
            self.references[cluster] = Reference.TOUCHED
        base = cluster << CLUSTER_SHIFT
        for first, after in page_runs(pages_within(cluster, page_offset, base + CLUSTER) & ~self.word(cluster)):
            self.release(base + first * PAGE, base + after * PAGE, 0)

    def count_index_page(self, cluster: int) -> None:
        """A cluster gets its first word: its index page may be new."""
        base = cluster & ~(WORDS_PER_PAGE - 1)
        if self.references[base : base + WORDS_PER_PAGE] == _NO_REFERENCES[:WORDS_PER_PAGE]:
            self.index_pages += 1
            self.budget.free_pages -= 1

    def _drop_metadata(self, cluster: int) -> None:
        """Give back the index page, and the references page, around a hole if they are empty."""
        base = cluster & ~(WORDS_PER_PAGE - 1)
        if self.references[base : base + WORDS_PER_PAGE] != _NO_REFERENCES[:WORDS_PER_PAGE]:
            return
        self.backing.index.madvise(mmap.MADV_REMOVE, base * WORD_BYTES, PAGE)
        self.index_pages -= 1
        self.budget.give(1)
        base = cluster & ~(PAGE - 1)
        if self.references[base : base + PAGE] == _NO_REFERENCES:
            self.references.madvise(mmap.MADV_DONTNEED, base, PAGE)


def tiers_of(word: int, start: int, stop: int) -> list[Extent]:
    """Bytes [start, stop) of a cluster as neighbouring (start, end, tier)."""
    behind = word >> TIER_SHIFT & TIER_MASK
    found = []
    at = start
    for first, after in page_runs(word & RESIDENT):
        run_start, run_end = max(start, first * PAGE), min(stop, after * PAGE)
        if run_start >= run_end:
            continue
        if run_start > at:
            found.append((at, run_start, behind))
        found.append((run_start, run_end, int(Tier.RESIDENT)))
        at = run_end
    if at < stop:
        found.append((at, stop, behind))
    return found


def cold_reference(word: int) -> int:
    """The reference byte of an idle cluster without resident pages."""
    return COLD_REFERENCE[word >> TIER_SHIFT & TIER_MASK]
