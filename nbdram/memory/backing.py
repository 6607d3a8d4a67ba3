"""The sparse memory files under a device: made or opened, mapped once, grown, given back.

The kernel's memory files are the allocator. A mapped page that nobody wrote costs nothing, a write
makes the kernel allocate exactly the page it touches, and MADV_REMOVE gives it back.

`index` and `references` are mapped for the largest device there can be (8 and 1 GiB of addresses), so that a device
that grows keeps them. `hot` is mapped as large as the device; when that grows, another map of the same file takes
its place, and the first one stays for as long as anybody holds a view of it.

Where the kernel may keep shared memory in folios of the size of a cluster, `hot` is mapped twice: by the second map, a
hole of a whole cluster is filled by one fault, and compressed and punched in one piece, for a half to a third of what
sixteen pages take. By the first, a page is a page.
"""

import ctypes
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
    read through maps of the RAM tier's own. `folios`, if there is one, is the second map of `hot`.
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
            self.folios = _map_folios(self.hot_fd, len(self.hot))
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
            self.folios = _map_folios(self.hot_fd, len(self.hot))
        self.size, self.clusters = size, clusters

    def close(self) -> None:
        """Give everything back. The caller has released its memoryviews of the maps."""
        for area in (self.hot, self.index, self.references, self.folios):
            if area:
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
                "all exports together can have about 120 TiB on most machines, half of that with folios of 64 KiB"
            ) from error
        raise
    no_huge_pages(area)
    return area


def _map_folios(fd: int, length: int) -> mmap.mmap | None:
    """A map by which what is written to an empty cluster takes a folio of 64 KiB; None if the kernel has that off.

    It is off unless somebody has set `hugepages-64kB/shmem_enabled` (docs/tuning.md). The last cluster must be a hole:
    a look at what one byte costs there tells. Files with names do without: their file system may be full, and a map
    could not say so.

    The kernel takes a folio only where it is aligned in memory as it is in the file. So the map begins at an odd
    multiple of 64 KiB, and there are none of 128 KiB or 2 MiB, whatever else is set.
    """
    if os.fstat(fd).st_nlink:
        return None
    try:
        area = _map_at_odd_multiple(fd, length)
        area.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # no such place, or a kernel that does not know the advice
        return None
    before = allocated_bytes(fd)
    area[length - CLUSTER] = 0
    taken = allocated_bytes(fd) - before
    area.madvise(mmap.MADV_REMOVE, length - CLUSTER, CLUSTER)
    if taken == CLUSTER:
        return area
    area.close()
    return None


def _map_at_odd_multiple(fd: int, length: int) -> mmap.mmap:
    """A map of a file, which is made longer for it, that begins at an odd multiple of CLUSTER; OSError if none does.

    The kernel puts a map below others. One that is longer by the surplus ends where the first one did, and so begins
    where we want it; or it does not fit there, and is put elsewhere.
    """
    for _ in range(4):
        os.ftruncate(fd, max(os.fstat(fd).st_size, length))
        area = mmap.mmap(fd, length)
        surplus = (_address(area) - CLUSTER) % (2 * CLUSTER)
        if not surplus:
            return area
        area.close()
        length += surplus
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def _address(area: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(area))


def no_huge_pages(area: mmap.mmap) -> None:
    """A huge page would make the first touched byte cost 2 MiB. Kernels without them refuse the advice."""
    with suppress(OSError):
        area.madvise(mmap.MADV_NOHUGEPAGE)
