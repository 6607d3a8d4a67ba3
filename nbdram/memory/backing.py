"""The sparse memory files under a device: made, mapped once at full size, given back.

The kernel's memory files are the allocator. A mapped page that nobody wrote costs nothing, a write
makes the kernel allocate exactly the page it touches, and MADV_REMOVE gives it back.
"""

import errno
import mmap
import os
from contextlib import suppress

from nbdram.errors import NbdramError
from nbdram.memory.layout import CLUSTER, CLUSTER_SHIFT, PAGE, WORD_BYTES, round_up

_MAP_NORESERVE = 0x4000  # Linux's value; Python names it only from 3.13 on


class Backing:
    """Maps of one device of at most `size` bytes, in anonymous memory files.

    `hot` is an identity map of the device, `index` one word per cluster, both shared memory files.
    `references` is private anonymous memory: reading what was never written there costs nothing.
    """

    def __init__(self, name: str, size: int) -> None:
        clusters = round_up(size, CLUSTER) >> CLUSTER_SHIFT
        self.size = size
        self.clusters = clusters
        self.hot_fd, self.hot = _memory_file(f"nbdram:{name}:hot", clusters * CLUSTER)
        try:
            index_bytes = round_up(clusters * WORD_BYTES, PAGE)
            self.index_fd, self.index = _memory_file(f"nbdram:{name}:index", index_bytes)
        except BaseException:
            self.hot.close()
            os.close(self.hot_fd)
            raise
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self.references = mmap.mmap(-1, round_up(clusters, PAGE), flags=flags)
        no_huge_pages(self.references)

    def close(self) -> None:
        """Give everything back. The caller has released its memoryviews of the maps."""
        for area in (self.hot, self.index, self.references):
            area.close()
        os.close(self.hot_fd)
        os.close(self.index_fd)

    def allocated_bytes(self) -> tuple[int, int]:
        """What the kernel says is allocated in (`hot`, `index`), in bytes."""
        return (os.fstat(self.hot_fd).st_blocks * 512, os.fstat(self.index_fd).st_blocks * 512)


def _memory_file(name: str, length: int) -> tuple[int, mmap.mmap]:
    fd = os.memfd_create(name[:249], os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, length)
        area = mmap.mmap(fd, length)
    except OSError as error:
        os.close(fd)
        if error.errno == errno.ENOMEM:
            raise NbdramError(
                f"there is no address space left to map {length >> 30} GiB: "
                "all exports together can have about 120 TiB on most machines"
            ) from error
        raise
    no_huge_pages(area)
    return fd, area


def no_huge_pages(area: mmap.mmap) -> None:
    """A huge page would make the first touched byte cost 2 MiB. Kernels without them refuse the advice."""
    with suppress(OSError):
        area.madvise(mmap.MADV_NOHUGEPAGE)
