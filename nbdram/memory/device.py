"""Reading and writing a device: through `hot` where pages are resident, out of cold images where they are not.

The invariants are at the head of `space.py`. What is here are the plain twins of what the hot loop does inline, and
everything that it leaves to them: faults, partial pages, first touches.
"""

import errno
import logging
import os
import time
from collections.abc import Iterable, Iterator
from typing import Final

from nbdram.memory.backing import OpenFile
from nbdram.memory.budget import Budget
from nbdram.memory.codec import Codec, IntegrityError, MissingImage
from nbdram.memory.histogram import Histogram
from nbdram.memory.layout import (
    CLUSTER,
    CLUSTER_SHIFT,
    DIRTY_SHIFT,
    FAR_READ,
    LENGTH_MASK,
    LENGTH_SHIFT,
    PAGE,
    PAGE_SHIFT,
    RAM,
    READ_OFTEN,
    READ_ONCE,
    READ_ONCE_BESIDE,
    READ_TOUCH,
    RESIDENT,
    RESIDENT_AND_DIRTY,
    SLOT_SHIFT,
    TIER_MASK,
    TIER_SHIFT,
    TOUCHED,
    WANTED,
    WHOLE,
    WORDS_PER_PAGE,
    WRITE_TOUCH,
    Reference,
    Tier,
    far_slot,
    pages_within,
)
from nbdram.memory.recent import Recent
from nbdram.memory.space import FarImage, Space, tiers_of

log = logging.getLogger("nbdram.device")

_MISSING_LOGGED: Final = 100  # a remote may lose all it had: more are only counted
_SAMPLED_FAULTS: Final = 63  # every 64th fault from RAM is timed
_COLD: Final = int(Reference.COLD)
_ZEROS: Final = bytes(CLUSTER)
_ALL_TOUCHED: Final = bytes((TOUCHED,)) * WORDS_PER_PAGE

Buffer = bytes | memoryview
Piece = tuple[int, int, list[Buffer]]  # start, end (bytes of the device), content
Images = dict[int, FarImage]  # by cluster


class FarPage(OSError):
    """What is needed is on disk or in a remote, and must be fetched first."""

    def __init__(self, cluster: int) -> None:
        super().__init__(errno.EAGAIN, "an image must be read from disk")
        self.cluster = cluster


class Device(Space):
    """`size` bytes of sparse memory. Offsets and lengths are bytes; the caller has checked bounds."""

    def __init__(
        self,
        name: str,
        size: int,
        budget: Budget,
        codec: Codec | None = None,
        open_file: OpenFile | None = None,
    ) -> None:
        super().__init__(name, size, budget, open_file)
        self.codec = codec or Codec()
        self.integrity_errors = 0
        self._damaged: set[int] = set()  # clusters whose image is known to be damaged
        self.ram_faults = 0  # READs answered out of an image in RAM
        self.refaults = 0  # pages that became resident again after they had been reclaimed
        self.disk_faults = 0  # images that had to be read from disk
        self.remote_faults = 0  # images that had to be fetched from the remote
        self.missing_images = 0  # that the remote did not have any more
        self.ram_fault_times = Recent()
        self.ram_fault_seconds = Histogram()

    def read(self, offset: int, length: int) -> bytes:
        """The plain twin of the hot loop's READ; blocks for what is not in RAM."""
        if not length:
            return b""
        images: Images = {}
        for cluster in self.far_clusters(offset, offset + length):
            images[cluster] = image = FarImage()
            image.content = self.load_image(cluster, self.words[cluster])
        return b"".join(
            b"".join(buffers) if buffers else bytes(end - start)
            for start, end, buffers in self.gather(offset, offset + length, images)
        )

    # -- reading -----------------------------------------------------------------------------------

    def is_resident(self, offset: int, end: int) -> bool:
        """Whether every page of [offset, end) is in `hot`; touches the clusters that are."""
        words, references = self.words, self.references
        first, last = offset >> CLUSTER_SHIFT, (end - 1) >> CLUSTER_SHIFT
        if self.is_whole(first, last + 1):
            references[first : last + 1] = references[first : last + 1].translate(READ_TOUCH)
            return True
        for cluster in range(first, last + 1):
            reference = references[cluster]
            if not reference:
                return False
            resident = words[cluster] & RESIDENT
            if resident != RESIDENT:
                mask = pages_within(cluster, offset, end)
                if resident & mask != mask:
                    return False
            if reference < TOUCHED:
                references[cluster] = TOUCHED
        return True

    def read_cold(self, cluster: int, word: int, offset: int, end: int) -> list[Buffer]:
        """The bytes [offset, end) of a cluster with this word, none of them resident, from its image in RAM.

        The first time they are read through; when the same are read again before the clock's hand comes by, the pages
        become resident, if there is memory. If there is much, any of the cluster do. IntegrityError as `decode`.
        """
        self.ram_faults += 1
        begun = 0.0 if self.ram_faults & _SAMPLED_FAULTS else time.perf_counter()
        references = self.references
        within = offset & CLUSTER - 1
        page = within >> PAGE_SHIFT
        reference = references[cluster]
        read_through = True
        if reference == _COLD:
            references[cluster] = READ_ONCE + page
        elif reference <= TOUCHED:
            references[cluster] = READ_ONCE_BESIDE + page
        else:
            read_through = not self.budget.has_spare(much=reference >= READ_ONCE and reference & 15 != page)
        if read_through:
            content = self.decode(cluster, word, within, within + end - offset)
        else:
            content = self._promote(cluster, offset, end)
        if begun:
            seconds = time.perf_counter() - begun
            self.ram_fault_times.add(seconds)
            self.ram_fault_seconds.observe(seconds, _SAMPLED_FAULTS + 1)
        return content

    def decode(self, cluster: int, word: int, start: int, end: int, image: bytes | None = None) -> list[Buffer]:
        """Bytes [start, end) of a cluster out of its image, which is in RAM if it is not given.

        IntegrityError if it is damaged.
        """
        try:
            length = word >> LENGTH_SHIFT & LENGTH_MASK
            if image is None and length != CLUSTER:  # as `decode_quietly` has it, in one call less
                return self.codec.decode(self.ram.load(cluster, word >> SLOT_SHIFT & 1, length), start, end)
            return self.decode_quietly(cluster, word, start, end, image)
        except IntegrityError as error:
            self.note_damage(cluster, error)
            raise

    def decode_quietly(self, cluster: int, word: int, start: int, end: int, image: bytes | None = None) -> list[Buffer]:
        """`decode` for those who can't know whether the word is still the cluster's: damage is not noted."""
        length = word >> LENGTH_SHIFT & LENGTH_MASK
        content = self.ram.load(cluster, word >> SLOT_SHIFT & 1, length) if image is None else image
        if len(content) != length:
            raise IntegrityError("a cold image is not as long as it was")
        return self.codec.content(content, start, end)

    def note_damage(self, cluster: int, error: IntegrityError) -> None:
        """Count a damaged image, and log the first time; whoever needs it gets EIO, the rest of the device goes on."""
        self.integrity_errors += 1
        self.missing_images += isinstance(error, MissingImage)
        if cluster not in self._damaged and self.missing_images <= _MISSING_LOGGED:
            self._damaged.add(cluster)
            log.error("%s: the data at offset %d is lost: %s", self.name, cluster << CLUSTER_SHIFT, error.strerror)

    def drop_image(self, cluster: int, word: int) -> None:
        super().drop_image(cluster, word)
        if self._damaged:
            self._damaged.discard(cluster)

    def load_image(self, cluster: int, word: int) -> bytes:
        """A cluster's image from wherever it is; may block."""
        length = word >> LENGTH_SHIFT & LENGTH_MASK
        if word >> TIER_SHIFT & TIER_MASK == Tier.RAM:
            return self.ram.fetch(cluster, word >> SLOT_SHIFT & 1, length)
        return self.far_tier(word).load(cluster, far_slot(word), length)

    def _promote(self, cluster: int, start: int, end: int, image: bytes | None = None) -> list[Buffer]:
        """Make the pages of [start, end) resident, if they fit. Their bytes as they came: views of `hot` may fault."""
        first, base = start & ~(PAGE - 1), cluster << CLUSTER_SHIFT
        try:
            pieces = self._fault(cluster, first, -(-end // PAGE) * PAGE, image)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return self.decode(cluster, self.words[cluster], start - base, end - base, image)
        return [memoryview(pieces[0])[start - first : end - first]] if len(pieces) == 1 else [self.hot_view[start:end]]

    def _fault(self, cluster: int, start: int, end: int, image: bytes | None = None) -> list[Buffer]:
        """Copy the missing pages [start, end) of a cluster out of its image to `hot`, clean; returns their bytes.

        What a write in progress has received of them stays; pages that it may still change are dirty. ENOSPC as `put`.
        """
        base = cluster << CLUSTER_SHIFT
        pieces = self.decode(cluster, self.words[cluster], start - base, end - base, image)
        arrived = self.arrived(start, end) if self.incoming else []
        try:
            self.put(start, *pieces)
        finally:
            for at, content in arrived:
                self.hot[at : at + len(content)] = content
        mask = pages_within(cluster, start, end)
        new_pages = mask.bit_count()
        self.budget.free_pages -= new_pages
        self.resident_pages += new_pages
        self.duplicate_pages += new_pages
        self.refaults += new_pages
        self.words[cluster] |= mask * RESIDENT_AND_DIRTY if self.is_receiving(cluster) else mask
        self.references[cluster] = TOUCHED
        for at, content in arrived:
            self.mark_written(at, at + len(content))
        return pieces

    def gather(self, offset: int, end: int, images: Images | None = None) -> list[Piece]:
        """[offset, end) as neighbouring (start, end, buffers), an empty list for a hole; touches the clusters.

        Buffers are views of `hot`, good until the caller lets others run, or decompressed bytes. Images on disk
        must have been fetched before, else FarPage is raised.
        """
        found: list[Piece] = []
        for cluster in range(offset >> CLUSTER_SHIFT, ((end - 1) >> CLUSTER_SHIFT) + 1):
            base = cluster << CLUSTER_SHIFT
            start, stop = max(offset, base), min(end, base + CLUSTER)
            for piece_start, piece_end, buffers in self._gather_cluster(cluster, start, stop, images):
                if found and bool(found[-1][2]) == bool(buffers):
                    found[-1][2].extend(buffers)
                    found[-1] = (found[-1][0], piece_end, found[-1][2])
                else:
                    found.append((piece_start, piece_end, buffers))
        return found

    def _gather_cluster(self, cluster: int, start: int, stop: int, images: Images | None) -> list[Piece]:
        word = self.word(cluster)
        if not word:
            return [(start, stop, [])]
        base = cluster << CLUSTER_SHIFT
        pieces: list[Piece] = []
        for first, last, tier in tiers_of(word, start - base, stop - base):
            buffers: list[Buffer] = []
            if tier == Tier.RESIDENT:
                if self.references[cluster] < TOUCHED:
                    self.references[cluster] = TOUCHED
                buffers = [self.hot_view[base + first : base + last]]
            elif tier == Tier.RAM:
                buffers = self.read_cold(cluster, word, base + first, base + last)
            elif tier != Tier.HOLE:
                image = images.get(cluster) if images else None
                if image is None or not image.is_current:
                    raise FarPage(cluster)
                buffers = self._read_far(cluster, word, base + first, base + last, image)
            pieces.append((base + first, base + last, buffers))
        return pieces

    def read_fetched(self, cluster: int, start: int, end: int, image: FarImage) -> list[Buffer] | None:
        """The bytes [start, end) of a cluster, none of them resident, out of its fetched image; None: another case."""
        word = self.word(cluster)
        if not image.is_current or word & pages_within(cluster, start, end):
            return None
        return self._read_far(cluster, word, start, end, image)

    def _read_far(self, cluster: int, word: int, start: int, end: int, image: FarImage) -> list[Buffer]:
        """Bytes of a cluster out of its fetched image.

        The first two images of a cluster are read through; when it is fetched once more before the clock's hand comes
        by, what is read of it becomes resident, if there is memory. If there is much, what is read first does.
        """
        references, budget = self.references, self.budget
        reference = references[cluster]
        is_wanted = reference >= (WANTED if image.is_read else READ_OFTEN)
        if budget.has_spare(much=not is_wanted):
            content = self._promote(cluster, start, end, image.content)
            if self.words[cluster] & RESIDENT:
                references[cluster] = WANTED
        else:
            if not image.is_read:
                references[cluster] = FAR_READ[reference]
            base = cluster << CLUSTER_SHIFT
            content = self.decode(cluster, word, start - base, end - base, image.content)
        image.is_read = True
        return content

    def far_clusters(self, offset: int, end: int) -> list[int]:
        """The clusters of which [offset, end) needs pages that are only on disk or in a remote."""
        found = []
        words, references = self.words, self.references
        for cluster in range(offset >> CLUSTER_SHIFT, ((end - 1) >> CLUSTER_SHIFT) + 1):
            if references[cluster]:
                word = words[cluster]
                if word >> TIER_SHIFT & TIER_MASK > RAM and pages_within(cluster, offset, end) & ~word:
                    found.append(cluster)
        return found

    def check_images(self, offset: int, end: int) -> list[int]:
        """Look at the images in RAM that [offset, end) needs: IntegrityError if one is damaged.

        Returns the clusters whose images are on disk or in a remote.
        """
        far = []
        for cluster in range(offset >> CLUSTER_SHIFT, ((end - 1) >> CLUSTER_SHIFT) + 1):
            word = self.word(cluster)
            if not word >> LENGTH_SHIFT or not pages_within(cluster, offset, end) & ~word:
                continue
            if word >> TIER_SHIFT & TIER_MASK > RAM:
                far.append(cluster)
                continue
            image = self.ram.load(cluster, word >> SLOT_SHIFT & 1, word >> LENGTH_SHIFT & LENGTH_MASK)
            try:
                self.codec.check(image)
            except IntegrityError as error:
                self.note_damage(cluster, error)
                raise
        return far

    def install(self, page: int, image: FarImage) -> None:
        """Make one page resident out of a fetched image, if that is still where it is; ENOSPC if it can't be."""
        cluster = page >> CLUSTER_SHIFT
        if image.is_current and not self.word(cluster) >> (page >> PAGE_SHIFT & 15) & 1:
            self.budget.check_edge()
            self._fault(cluster, page, page + PAGE, image.content)

    # -- writing -----------------------------------------------------------------------------------

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Store `data`; ENOSPC if the budget has no room for new pages, and then nothing changed."""
        end = offset + len(data)
        if end == offset:
            return
        self.fault_edges(offset, end)
        missing = self.missing_pages(offset, end)
        self.budget.take(missing)
        self.mark_changing(offset, end)
        if missing:
            try:
                self.put(offset, data)
            except OSError:
                self.budget.give(missing)
                raise
        else:
            self.hot[offset:end] = data
        self.mark_written(offset, end)

    def edge_pages(self, offset: int, end: int) -> list[int]:
        """The pages that [offset, end) covers only in part, if they are in the cold image."""
        found = []
        for at in {offset & ~(PAGE - 1), (end - 1) & ~(PAGE - 1)}:
            word = self.word(at >> CLUSTER_SHIFT)
            in_part = at < offset or at + PAGE > end
            if in_part and word >> LENGTH_SHIFT and not word >> (at >> PAGE_SHIFT & 15) & 1:
                found.append(at)
        return found

    def fault_edges(self, offset: int, end: int) -> None:
        """Make the pages resident that a write of [offset, end) only covers in part; FarPage if that must wait."""
        for page in self.edge_pages(offset, end):
            cluster = page >> CLUSTER_SHIFT
            if self.words[cluster] >> TIER_SHIFT & TIER_MASK != Tier.RAM:
                raise FarPage(cluster)
            self.budget.check_edge()
            self._fault(cluster, page, page + PAGE)

    def missing_pages(self, offset: int, end: int) -> int:
        """How many pages of [offset, end) are not resident."""
        missing = 0
        for cluster in range(offset >> CLUSTER_SHIFT, ((end - 1) >> CLUSTER_SHIFT) + 1):
            mask = pages_within(cluster, offset, end)
            missing += (mask & ~self.word(cluster)).bit_count()
        return missing

    def mark_changing(self, offset: int, end: int) -> None:
        """Resident pages of [offset, end) are about to differ from the image: they are dirty before they do.

        Whoever takes the device up after a crash in between may not drop them as if the image had them.
        """
        for cluster in range(offset >> CLUSTER_SHIFT, ((end - 1) >> CLUSTER_SHIFT) + 1):
            word = self.word(cluster)
            clean = word & ~(word >> DIRTY_SHIFT) & pages_within(cluster, offset, end)
            if clean:
                self.words[cluster] = word | clean << DIRTY_SHIFT

    def mark_written(self, offset: int, end: int) -> int:
        """Set the bits of pages whose bytes are in `hot`; returns how many became resident."""
        words, references = self.words, self.references
        new_pages = 0
        first, after = offset >> CLUSTER_SHIFT, ((end - 1) >> CLUSTER_SHIFT) + 1
        if self.is_whole(first, after):
            self.overwritten(offset, end)
            return 0
        for cluster in range(first, after):
            mask = pages_within(cluster, offset, end)
            reference = references[cluster]
            if reference:
                word = words[cluster]
            else:
                word = 0
                self.count_index_page(cluster)
            added = (mask & ~word).bit_count()
            new_pages += added
            words[cluster] = new_word = word | mask * RESIDENT_AND_DIRTY
            references[cluster] = TOUCHED if word & mask else WRITE_TOUCH[reference]
            if word >> LENGTH_SHIFT:
                if new_word & WHOLE == WHOLE:  # no page needs the image any more
                    words[cluster] = WHOLE
                    self.drop_image(cluster, word)
                else:
                    self.duplicate_pages += added
        self.resident_pages += new_pages
        return new_pages

    def overwritten(self, offset: int, end: int) -> None:
        """As `mark_written`, of clusters that were whole already, and still are."""
        first, after = offset >> CLUSTER_SHIFT, ((end - 1) >> CLUSTER_SHIFT) + 1
        self.references[first:after] = _ALL_TOUCHED[: after - first]

    # -- zeros -------------------------------------------------------------------------------------

    def drop_zeros(self, start: int, end: int, seen: memoryview | None) -> None:
        """Clusters of zeros within [start, end) become holes at once: the inode tables of a new ext4 come as zeros.

        `seen` is the map of the device that the bytes came by. None: by the file, and a map would have to map them.
        """
        bases = range(-(-start // CLUSTER) * CLUSTER, end - CLUSTER + 1, CLUSTER)
        heads: Iterable[int]
        if seen is None:
            heads = (int.from_bytes(os.pread(self.backing.hot_fd, 8, base), "little") for base in bases)
        else:
            heads = seen.cast("Q")[bases.start >> 3 : end >> 3 : CLUSTER >> 3]
        for base, head in zip(bases, heads, strict=False):
            if not head and self.hot[base : base + CLUSTER] == _ZEROS:
                self.clear(base >> CLUSTER_SHIFT)

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
        """Overwrite a part of one page, unless it is a hole."""
        if start < end and self.word(start >> CLUSTER_SHIFT):
            tiers = tiers_of(self.word(start >> CLUSTER_SHIFT), start & (CLUSTER - 1), (start & (CLUSTER - 1)) + 1)
            if tiers[0][2] != Tier.HOLE:
                self.write(start, bytes(end - start))

    def trim(self, offset: int, end: int) -> Iterator[None]:
        """Give back the whole pages of [offset, end), in steps that the caller iterates. Needs no memory."""
        return self.punch(-(-offset // PAGE) * PAGE, end // PAGE * PAGE, advisory=True)
