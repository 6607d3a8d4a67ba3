"""Sizes and the cluster word: the vocabulary that all of memory/ shares.

Page: 4 KiB, what a client touches. Cluster: 64 KiB = 16 pages, what has one word in the index.

The cluster word (64 bits, changed by one aligned store):

    bits  0-15  resident   page p is in `hot`
    bits 16-31  dirty      page p in `hot` is newer than the cold image
    bits 32-63  the cold image (0: there is none)

Word 0 is a hole: it reads as zeros and costs nothing.

The reference byte of a cluster says whether it has a word at all, so that the index (whose untouched
pages would be allocated by a mere look at them) is never read for a hole:

    0  hole: the word is 0, do not look
    1  the cluster has a word, and was not touched since the clock's hand went by
    2  it was touched
"""

from typing import Final

PAGE_SHIFT: Final = 12
PAGE: Final = 1 << PAGE_SHIFT
CLUSTER_SHIFT: Final = 16
CLUSTER: Final = 1 << CLUSTER_SHIFT
PAGES_PER_CLUSTER: Final = CLUSTER // PAGE
WORD_BYTES: Final = 8
WORDS_PER_PAGE: Final = PAGE // WORD_BYTES  # an index page describes 32 MiB of the device

RESIDENT: Final = 0xFFFF
RESIDENT_AND_DIRTY: Final = 0x10001  # times a page mask: both bits of each page
WHOLE: Final = 0xFFFFFFFF  # every page resident and dirty

UNTOUCHED: Final = 1
TOUCHED: Final = 2

MAX_DEVICE_BYTES: Final = 64 << 40

# RESIDENT_MASKS[first << 4 | last]: the resident bits of the pages first..last of a cluster.
RESIDENT_MASKS: Final = tuple(
    ((2 << last) - 1) & ~((1 << first) - 1) if last >= first else 0
    for first in range(PAGES_PER_CLUSTER)
    for last in range(PAGES_PER_CLUSTER)
)


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
