"""Sizes and the cluster word: the vocabulary that all of memory/ shares.

Page: 4 KiB, what a client touches. Cluster: 64 KiB = 16 pages, what has one word in the index.

The cluster word (64 bits, changed by one aligned store):

    bits  0-15  resident   page p is in `hot`
    bits 16-31  dirty      page p in `hot` is newer than the cold image
    bits 32-48  length     bytes of the cold image (0: there is none; 65536: stored raw)
    bit  49     slot       which of its two slots in the tier holds it
    bits 50-52  tier       of the cold image: RAM, DISK, REMOTE
    bit  53     dense      no smaller image of the cluster is to be had (only of one in RAM)
    bits 56-63  place      of one on disk: which swap directory has it, counted from the cluster's own

Word 0 is a hole: it reads as zeros and costs nothing. A page that is not resident is zero if the cluster has no
cold image, else it is in the image.

The reference byte of a cluster says whether it has a word at all, so that the index (whose untouched pages would
be allocated by a mere look at them) is never read for a hole; and what the clock wants to know of it, so that
finding victims is a search for a byte value.
"""

from enum import IntEnum
from typing import Final

PAGE_SHIFT: Final = 12
PAGE: Final = 1 << PAGE_SHIFT
CLUSTER_SHIFT: Final = 16
CLUSTER: Final = 1 << CLUSTER_SHIFT
PAGES_PER_CLUSTER: Final = CLUSTER // PAGE
WORD_BYTES: Final = 8
WORDS_PER_PAGE: Final = PAGE // WORD_BYTES  # an index page describes 32 MiB of the device

SEAL_BYTES: Final = 16 + 12 + 16  # salt, nonce and tag of an image that is sealed (`tiers/seal.py`)
SECRET_BYTES: Final = 32  # of what the keys for that are derived from

RESIDENT: Final = 0xFFFF
RESIDENT_AND_DIRTY: Final = 0x10001  # times a page mask: both bits of each page
WHOLE: Final = 0xFFFFFFFF  # every page resident and dirty

DIRTY_SHIFT: Final = 16
LENGTH_SHIFT: Final = 32
LENGTH_MASK: Final = 0x1FFFF
SLOT_SHIFT: Final = 49
TIER_SHIFT: Final = 50
TIER_MASK: Final = 7
DENSE: Final = 1 << 53
PLACE_SHIFT: Final = 56


class Tier(IntEnum):
    """Where a page is; the values of the meta context x-nbdram:tier."""

    HOLE = 0
    RESIDENT = 1
    RAM = 2
    DISK = 3
    REMOTE = 4


class Reference(IntEnum):
    """The states of a reference byte. Zero if and only if the word is."""

    HOLE = 0
    IDLE = 1  # has resident pages, and was not touched since the clock's hand went by
    FRESH = 2  # was written since no page of it was resident, and neither read nor written again
    TOUCHED = 3
    COLD = 4  # no page is resident, the image is in RAM
    STUCK = 5  # would not compress: left alone until it is written again, or there is room below RAM
    FAR = 6  # no page is resident, the image is on disk
    FAR_TOUCHED = 7
    REMOTE = 8  # no page is resident, the image is in the memory of other machines
    REMOTE_TOUCHED = 9
    FAR_TWICE = 10  # its image was read twice since the hand went by: what is read of it next becomes resident
    REMOTE_TWICE = 11
    WANTED = 12  # the same of one that has resident pages


# As plain numbers, which are found faster than members of an enumeration.
RAM: Final = int(Tier.RAM)
IDLE: Final = int(Reference.IDLE)
FRESH: Final = int(Reference.FRESH)
TOUCHED: Final = int(Reference.TOUCHED)
# A page was read out of the image in RAM: the cluster is touched, and its reference byte tells the page. It is one of
# these and the page's number, the second if other pages of the cluster are resident. When the same page is read again
# before the clock's hand comes by, it becomes resident.
READ_ONCE: Final = 16
READ_ONCE_BESIDE: Final = 32
# What a READ of an image below RAM makes of a reference byte; and the first of those of which pages become resident.
READ_OFTEN: Final = int(Reference.FAR_TWICE)
WANTED: Final = int(Reference.WANTED)
_NEXT: Final[dict[int, int]] = {
    IDLE: TOUCHED,
    FRESH: TOUCHED,
    Reference.STUCK: TOUCHED,
    TOUCHED: WANTED,
    Reference.FAR: Reference.FAR_TOUCHED,
    Reference.FAR_TOUCHED: Reference.FAR_TWICE,
    Reference.REMOTE: Reference.REMOTE_TOUCHED,
    Reference.REMOTE_TOUCHED: Reference.REMOTE_TWICE,
}
FAR_READ: Final = bytes(_NEXT.get(value, value) for value in range(256))
# What the clock's hand makes of those that were touched: it takes away their second chance.
SECOND_CHANCES: Final[dict[int, int]] = {
    TOUCHED: IDLE,
    Reference.FAR_TOUCHED: Reference.FAR,
    Reference.FAR_TWICE: Reference.FAR,
    Reference.REMOTE_TOUCHED: Reference.REMOTE,
    Reference.REMOTE_TWICE: Reference.REMOTE,
    WANTED: IDLE,
    **dict.fromkeys(range(READ_ONCE, READ_ONCE + PAGES_PER_CLUSTER), Reference.COLD),
    **dict.fromkeys(range(READ_ONCE_BESIDE, READ_ONCE_BESIDE + PAGES_PER_CLUSTER), Reference.IDLE),
}
# What a READ makes of the reference bytes of clusters whose pages are all resident.
READ_TOUCH: Final = bytes.maketrans(bytes((IDLE, FRESH)), bytes((TOUCHED, TOUCHED)))
# What a WRITE to pages that were not resident makes of a reference byte.
WRITE_TOUCH: Final = bytes(
    FRESH if value in (Reference.HOLE, FRESH, Reference.COLD, Reference.FAR, Reference.REMOTE) else TOUCHED
    for value in range(256)
)
# The reference byte of an idle cluster without resident pages, by the tier of its image: tiers are numbers here.
COLD_REFERENCE: Final = (0, 0, int(Reference.COLD), int(Reference.FAR), int(Reference.REMOTE))

MAX_DEVICE_BYTES: Final = 64 << 40

# RESIDENT_MASKS[first << 4 | last]: the resident bits of the pages first..last of a cluster.
RESIDENT_MASKS: Final = tuple(
    ((2 << last) - 1) & ~((1 << first) - 1) if last >= first else 0
    for first in range(PAGES_PER_CLUSTER)
    for last in range(PAGES_PER_CLUSTER)
)

RESIDENT_AND_DIRTY_MASKS: Final = tuple(mask * RESIDENT_AND_DIRTY for mask in RESIDENT_MASKS)


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def page_runs(mask: int) -> list[tuple[int, int]]:
    """The runs of set bits of a 16-bit page mask, as (first page, page after the last)."""
    runs = []
    page = 0
    while mask >> page:
        page += ((mask >> page) & -(mask >> page)).bit_length() - 1
        ones = ~(mask >> page)
        length = (ones & -ones).bit_length() - 1
        runs.append((page, page + length))
        page += length
    return runs


def cold_word(length: int, slot: int, tier: int) -> int:
    """The part of a word that describes a cold image. `slot` as `far_slot` has it."""
    return length << LENGTH_SHIFT | (slot & 1) << SLOT_SHIFT | tier << TIER_SHIFT | slot >> 1 << PLACE_SHIFT


def far_slot(word: int) -> int:
    """The slot of an image below RAM, and its place above the lowest bit."""
    return word >> SLOT_SHIFT & 1 | word >> PLACE_SHIFT << 1


def pages_within(cluster: int, start: int, end: int) -> int:
    """The mask of the pages of `cluster` that the device bytes [start, end) touch."""
    base = cluster << CLUSTER_SHIFT
    first = start - base >> PAGE_SHIFT if start > base else 0
    last = (end - 1 - base) >> PAGE_SHIFT if end < base + CLUSTER else PAGES_PER_CLUSTER - 1
    return RESIDENT_MASKS[first << 4 | last]
