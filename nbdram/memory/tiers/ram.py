"""The first tier: compressed images in a sparse memory file with two slots per cluster.

An image is written to the slot that the cluster's word does not point at, so the old one stays valid until the
word has changed. The file is read through maps of windows of it, made when they are first needed: a map of
all of it would take twice the address space of the device.
"""

import errno
import mmap
import os
from collections.abc import Sequence
from typing import Final

from nbdram.memory.backing import no_huge_pages
from nbdram.memory.layout import CLUSTER, CLUSTER_SHIFT, PAGE, round_up

_WINDOW_SHIFT: Final = 38  # 256 GiB
_MADV_POPULATE_WRITE: Final = 23  # Linux's value
_WITHIN_WINDOW: Final = (1 << _WINDOW_SHIFT) - 1


def image_pages(length: int) -> int:
    """The pages that an image of `length` bytes takes."""
    return -(-length // PAGE)


class RamTier:
    """The cold images of one device."""

    def __init__(self, fd: int) -> None:
        self.fd = fd  # of the file, which is somebody else's to close
        self._windows: dict[int, tuple[mmap.mmap, memoryview]] = {}

    def close(self) -> None:
        for area, view in self._windows.values():
            view.release()
            area.close()
        self._windows.clear()

    def store(self, cluster: int, slot: int, image: Sequence[bytes | memoryview]) -> None:
        """Write an image into a free slot. May be called from any thread. OSError if there is no room for it."""
        if os.pwritev(self.fd, image, _offset(cluster, slot)) != sum(map(len, image)):
            self.drop(cluster, slot, CLUSTER)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fetch(self, cluster: int, slot: int, length: int) -> bytes:
        """An image; zeros if its slot has been dropped. May be called from any thread."""
        return os.pread(self.fd, length, _offset(cluster, slot))

    def load(self, cluster: int, slot: int, length: int) -> memoryview:
        """A view of an image; valid until the slot is dropped."""
        at = 2 * cluster + slot << CLUSTER_SHIFT
        base = at & _WITHIN_WINDOW
        window = self._windows.get(at >> _WINDOW_SHIFT)
        if window is None or base >= len(window[1]):
            window = self._window(at)
        return window[1][base : base + length]

    def drop(self, cluster: int, slot: int, length: int) -> None:
        """Give the pages of a slot back."""
        at = _offset(cluster, slot)
        base = at & _WITHIN_WINDOW
        self._window(at)[0].madvise(mmap.MADV_REMOVE, base, round_up(length, PAGE))

    def allocated_bytes(self) -> int:
        return os.fstat(self.fd).st_blocks * 512

    def _window(self, at: int) -> tuple[mmap.mmap, memoryview]:
        window = self._windows.get(at >> _WINDOW_SHIFT)
        if window is None or at & _WITHIN_WINDOW >= len(window[0]):  # the device has grown since
            start = at >> _WINDOW_SHIFT << _WINDOW_SHIFT
            length = min(1 << _WINDOW_SHIFT, os.fstat(self.fd).st_size - start)
            area = mmap.mmap(self.fd, length, offset=start)
            no_huge_pages(area)
            window = self._windows[at >> _WINDOW_SHIFT] = (area, memoryview(area))
        return window


class MappedRamTier(RamTier):
    """The same file for a process that goes last of all while the server drops images: it stores through maps.

    Who writes to a file keeps others from punching it, and that process may lose the processor in the middle of it:
    the server would wait until it goes on. (Writing takes a third less of the time that storing takes.)
    """

    def store(self, cluster: int, slot: int, image: Sequence[bytes | memoryview]) -> None:
        at = _offset(cluster, slot)
        base, length = at & _WITHIN_WINDOW, sum(map(len, image))
        area, view = self._window(at)
        try:
            area.madvise(_MADV_POPULATE_WRITE, base, round_up(length, PAGE))
        except OSError as error:
            if error.errno != errno.EINVAL:  # EFAULT, if the file system is full
                self.drop(cluster, slot, CLUSTER)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            super().store(cluster, slot, image)  # Linux before 5.14
            return
        for part in image:
            view[base : base + len(part)] = part
            base += len(part)


def _offset(cluster: int, slot: int) -> int:
    return (2 * cluster + slot) * CLUSTER
