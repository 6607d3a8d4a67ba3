"""A picture of a device, for people: what is where, in a bounded number of cells.

It is made from the index and the reference bytes, in the thread that asks, some thousand clusters at a time.
Parts of the device that were never written are left out, found through the index file's own holes, so that a device of
64 TiB with a few files on it is drawn as the few files.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from nbdram.memory.device import Device
from nbdram.memory.layout import (
    CLUSTER,
    FRESH,
    PAGES_PER_CLUSTER,
    RESIDENT,
    SECOND_CHANCES,
    TIER_SHIFT,
    WORD_BYTES,
    Reference,
)

MAX_CELLS: Final = 1200
_MAX_SPANS: Final = 4096  # of a device that is scattered more, the rest is not drawn
_CELLS_AT_ONCE: Final = 32
_CLUSTERS_AT_ONCE: Final = 4096
_REST_S: Final = 0.00005

_HOT: Final = bytes((FRESH, *SECOND_CHANCES))

Span = tuple[int, int]  # clusters [first, after)


@dataclass(frozen=True)
class DeviceMap:
    """`cells` has five bytes for each cell: how much of it is resident, compressed, on disk, in a remote, and how much
    of that was touched lately, each 0 to 255. The cells follow each other through `spans` (bytes of the device, in
    order), each `cell_bytes` long, but for the last.
    """

    spans: list[tuple[int, int]]
    cell_bytes: int
    cells: bytes
    complete: bool


def draw(device: Device, max_cells: int = MAX_CELLS) -> DeviceMap:
    """The map of a device. ValueError if it is closed meanwhile."""
    spans: list[Span] = []
    for span in _spans(device):
        spans.append(span)
        if len(spans) > _MAX_SPANS:
            break
    complete = len(spans) <= _MAX_SPANS
    spans = _trimmed(device, spans[:_MAX_SPANS])
    clusters = sum(after - first for first, after in spans)
    per_cell = max(1, -(-clusters // max_cells))
    cells_at_once = max(1, min(_CELLS_AT_ONCE, _CLUSTERS_AT_ONCE // per_cell))
    cells = bytearray()
    for number, pieces in enumerate(_cells(spans, per_cell)):
        cells += _cell(device, pieces, per_cell)
        if number % cells_at_once == cells_at_once - 1:
            time.sleep(_REST_S)
    in_bytes = [(first * CLUSTER, min(after * CLUSTER, device.size)) for first, after in spans]
    return DeviceMap(in_bytes, per_cell * CLUSTER, bytes(cells), complete)


def _spans(device: Device) -> Iterator[Span]:
    """The parts of the device that the index has words for, none of them neighbours."""
    most = device.backing.clusters
    span = device.next_span(0, most)
    while span is not None and span[1] > span[0]:
        yield span
        span = device.next_span(span[1], most)


def _trimmed(device: Device, spans: list[Span]) -> list[Span]:
    """Without the untouched beginning and end of each: a page of the index is 32 MiB of the device."""
    found = []
    for first, after in spans:
        start, stop = first, after
        while start < stop and not (head := device.references[start : start + 512].lstrip(b"\0")):
            start += 512
        if start < stop:
            start += min(512, len(device.references[start : start + 512])) - len(head)
            while not (tail := device.references[max(start, stop - 512) : stop].rstrip(b"\0")):
                stop -= 512
            stop = max(start, stop - 512) + len(tail)
            found.append((start, stop))
    return found


def _cells(spans: list[Span], per_cell: int) -> Iterator[list[Span]]:
    """The spans cut into cells; one cell may be made of pieces of several."""
    pieces: list[Span] = []
    room = per_cell
    for first, after in spans:
        at = first
        while at < after:
            stop = min(after, at + room)
            pieces.append((at, stop))
            room -= stop - at
            at = stop
            if not room:
                yield pieces
                pieces, room = [], per_cell
    if pieces:
        yield pieces


def _cell(device: Device, pieces: list[Span], per_cell: int) -> bytes:
    pages = [0, 0, 0, 0]
    stored = hot = 0
    for first, after in pieces:
        for at in range(first, after, _CLUSTERS_AT_ONCE):
            stop = min(after, at + _CLUSTERS_AT_ONCE)
            references = device.references[at:stop]
            stored += len(references) - references.count(Reference.HOLE)
            hot += len(references) - len(references.translate(None, _HOT))
            found = _pages_by_tier(device.backing.index[at * WORD_BYTES : stop * WORD_BYTES])
            pages = [one + more for one, more in zip(pages, found, strict=True)]
    in_cell = per_cell * PAGES_PER_CLUSTER
    return bytes([*(_scaled(count, in_cell) for count in pages), _scaled(hot, stored)])


def _pages_by_tier(words: bytes) -> tuple[int, int, int, int]:
    """How many pages are resident, only in images in RAM, on disk, in a remote; all words in a few operations."""
    ones = _ones(len(words) // WORD_BYTES)
    bits = int.from_bytes(words, "little")
    resident = bits & ones * RESIDENT

    def only_there(with_image: int) -> int:
        return PAGES_PER_CLUSTER * with_image.bit_count() - (resident & with_image * RESIDENT).bit_count()

    here = bits >> TIER_SHIFT + 1 & ones  # tiers RAM (2) and DISK (3)
    on_disk = bits >> TIER_SHIFT & here
    in_remote = bits >> TIER_SHIFT + 2 & ones  # tier REMOTE (4)
    far = only_there(on_disk)
    return resident.bit_count(), only_there(here) - far, far, only_there(in_remote)


@lru_cache(32)
def _ones(count: int) -> int:
    """The lowest bit of each of `count` words."""
    return int.from_bytes((1).to_bytes(WORD_BYTES, "little") * count, "little")


def _scaled(part: int, whole: int) -> int:
    """0 to 255; what is not nothing is at least 1."""
    return -(-part * 255 // whole) if whole else 0
