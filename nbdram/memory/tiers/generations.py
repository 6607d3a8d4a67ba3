"""Which image is in which slot of a remote: 16 bytes per cluster, for its two slots.

The generation of an image is a random number of 64 bits, and part of its key. So no key is ever used for a second
image: not by a server that was restored from an old copy of its state directory, not after a command that came late,
not by a replica that has missed the last writes before it took over. Whatever is found under a key is the image that
was stored there, or nothing, or found out by its seal.

The slots are those of the cluster's word: a new generation is written beside the one that the word points at, and is
the cluster's from when the word changes. A killed server leaves generations that no word points at; they are what is
to be removed from the remote at the next start.
"""

import mmap
import os
import random
import secrets
import threading
from collections.abc import Callable, Iterator
from typing import Final

from nbdram.memory.backing import allocated_bytes, no_huge_pages
from nbdram.memory.layout import CLUSTER_SHIFT, MAX_DEVICE_BYTES, PAGE

_ENTRY_BYTES: Final = 16
_ENTRIES_PER_PAGE: Final = PAGE // _ENTRY_BYTES
GENERATIONS_BYTES: Final = (MAX_DEVICE_BYTES >> CLUSTER_SHIFT) * _ENTRY_BYTES
_DRAWS: Final = 16
_EMPTY_PAGE: Final = bytes(PAGE)


class Generations:
    """The generations of one device, in a sparse memory file. For all threads."""

    def __init__(self, fd: int) -> None:
        """`fd`: of a file that is GENERATIONS_BYTES long, and closed with this."""
        self._fd = fd
        self._area = mmap.mmap(fd, GENERATIONS_BYTES)
        no_huge_pages(self._area)
        self._numbers = memoryview(self._area).cast("Q")
        self._lock = threading.Lock()
        self._closed = False
        self._draw = random.Random(secrets.randbits(256)).getrandbits

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._numbers.release()
        self._area.close()
        os.close(self._fd)

    def new(self, cluster: int, slot: int, is_good: Callable[[int], bool] | None = None) -> tuple[int, int]:
        """Draw and remember the generation of an image that is going to be stored; and the one in its place, or 0.

        `is_good`: which ones are wanted; after some in vain, another one is taken.
        """
        generation = self._draw(64) or 1
        for _ in range(_DRAWS if is_good else 0):
            if is_good and is_good(generation):
                break
            generation = self._draw(64) or 1
        with self._lock:
            old = self._numbers[2 * cluster + slot]
            self._numbers[2 * cluster + slot] = generation
        return generation, old

    def at(self, cluster: int, slot: int) -> int:
        """0: none was stored. Only for slots that have been written: looking at others takes memory."""
        return self._numbers[2 * cluster + slot]

    def forget(self, cluster: int, slot: int, generation: int) -> None:
        """The image is gone, unless the slot has another one by now."""
        with self._lock:
            if self._closed or self._numbers[2 * cluster + slot] != generation:
                return
            self._numbers[2 * cluster + slot] = 0
            base = cluster // _ENTRIES_PER_PAGE * PAGE
            if self._area[base : base + PAGE] == _EMPTY_PAGE:
                self._area.madvise(mmap.MADV_REMOVE, base, PAGE)

    def allocated_bytes(self) -> int:
        return allocated_bytes(self._fd)

    def pages(self) -> Iterator[list[tuple[int, int, int]]]:
        """All there are as (cluster, slot, generation), some at a time."""
        at = 0
        while True:
            try:
                at = os.lseek(self._fd, at, os.SEEK_DATA) // PAGE * PAGE
            except OSError:  # no data from here to the end
                return
            content = memoryview(os.pread(self._fd, PAGE, at)).cast("Q")
            first = at // _ENTRY_BYTES
            yield [(first + (n >> 1), n & 1, number) for n, number in enumerate(content) if number]
            at += PAGE
