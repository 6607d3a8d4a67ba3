"""The sparse memory files under a device: made or opened, mapped once, grown, given back.

The kernel's memory files are the allocator. A mapped page that nobody wrote costs nothing, a write
makes the kernel allocate exactly the page it touches, and MADV_REMOVE gives it back.

`index` and `references` are mapped for the largest device there can be (8 and 1 GiB of addresses), so that a device
that grows keeps them. `hot` is mapped as large as the device; when that grows, a second map of the same file takes
its place, and the first one stays for as long as anybody holds a view of it.
"""

import errno
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from nbdram.errors import NbdramError
from nbdram.memory.layout import CLUSTER, CLUSTER_SHIFT, MAX_DEVICE_BYTES, WORD_BYTES, round_up

_MAP_NORESERVE = 0x4000  # Linux's value; Python names it only from 3.13 on

INDEX_BYTES: Final = (MAX_DEVICE_BYTES >> CLUSTER_SHIFT) * WORD_BYTES
_REFERENCES_BYTES: Final = MAX_DEVICE_BYTES >> CLUSTER_SHIFT

# Opens the file "hot", "cold" or "index" of a device, that many bytes long or longer; returns its descriptor.
OpenFile = Callable[[str, int], int]


def anonymous(name: str) -> OpenFile:
    """Files without a name in any directory: they are gone with the process."""

    def open_file(kind: str, length: int) -> int:
        fd = os.memfd_create(f"nbdram:{name}:{kind}"[:249], os.MFD_CLOEXEC)
        os.ftruncate(fd, length)
        return fd

    return open_file


class Backing:
    """The files and maps of one device of at most `size` bytes.

    `hot` is an identity map of the device, `index` one word per cluster, both shared memory files.
    `references` is private anonymous memory: reading what was never written there costs nothing. `cold_fd` is
    read through maps of the RAM tier's own.
    """

    def __init__(self, size: int, open_file: OpenFile) -> None:
        self.size = size
        self.clusters = clusters_of(size)
        self._fds: list[int] = []
        areas: list[mmap.mmap] = []
        try:
            for kind, length in file_lengths(size).items():
                self._fds.append(open_file(kind, length))
            self.hot_fd, self.cold_fd, self.index_fd = self._fds
            self.hot = _map(self.hot_fd, self.clusters * CLUSTER)
            areas.append(self.hot)
            self.index = _map(self.index_fd, INDEX_BYTES)
            areas.append(self.index)
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
            self.references = mmap.mmap(-1, _REFERENCES_BYTES, flags=flags)
            no_huge_pages(self.references)
        except BaseException:
            for area in areas:
                area.close()
            self._close_files()
            raise

    def resize(self, size: int) -> None:
        """Make room for `size` bytes. The files never shrink: what is in flight may still look at their ends."""
        clusters = clusters_of(size)
        if clusters * CLUSTER > len(self.hot):
            for fd, length in zip(self._fds, file_lengths(size).values(), strict=True):
                if os.fstat(fd).st_size < length:
                    os.ftruncate(fd, length)
            self.hot = _map(self.hot_fd, clusters * CLUSTER)
        self.size, self.clusters = size, clusters

    def close(self) -> None:
        """Give everything back. The caller has released its memoryviews of the maps."""
        for area in (self.hot, self.index, self.references):
            area.close()
        self._close_files()

    def _close_files(self) -> None:
        for fd in self._fds:
            os.close(fd)

    def allocated_bytes(self) -> tuple[int, int]:
        """What the kernel says is allocated in (`hot`, `index`), in bytes."""
        return (allocated_bytes(self.hot_fd), allocated_bytes(self.index_fd))


def clusters_of(size: int) -> int:
    return round_up(size, CLUSTER) >> CLUSTER_SHIFT


def file_lengths(size: int) -> dict[str, int]:
    """How long the files of a device of `size` bytes are, in bytes; longer ones are fine."""
    clusters = clusters_of(size)
    return {"hot": clusters * CLUSTER, "cold": 2 * clusters * CLUSTER, "index": INDEX_BYTES}


def allocated_bytes(fd: int) -> int:
    """What the kernel has allocated for a file."""
    return os.fstat(fd).st_blocks * 512


def _map(fd: int, length: int) -> mmap.mmap:
    try:
        area = mmap.mmap(fd, length)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise NbdramError(
                f"there is no address space left to map {length >> 30} GiB: "
                "all exports together can have about 120 TiB on most machines"
            ) from error
        raise
    no_huge_pages(area)
    return area


def no_huge_pages(area: mmap.mmap) -> None:
    """A huge page would make the first touched byte cost 2 MiB. Kernels without them refuse the advice."""
    with suppress(OSError):
        area.madvise(mmap.MADV_NOHUGEPAGE)
