"""A zram device of the kernel, with lz4, and what it costs.

A device that is made for us is removed afterwards. Where the kernel can't make one, one that nobody uses is taken,
and reset afterwards. A kernel without zram, or a user that is not root, can't have any: `Zram.available()` tells.
"""

import mmap
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from bench.errors import BenchError

_CONTROL: Final = Path("/sys/class/zram-control")
_BLOCK: Final = Path("/sys/block")
_PAGE: Final = 4096
# The kernel's metadata, besides what the allocator says: an entry of the table for each page of the device, and a
# handle for each page stored.
_ENTRY_BYTES: Final = 16
_HANDLE_BYTES: Final = 8
_STEP: Final = 1 << 20
_RESET_S: Final = 5.0


@dataclass(frozen=True)
class Usage:
    """What zram holds, in bytes; see `mm_stat` in the kernel's documentation."""

    stored: int  # as much data was written
    compressed: int  # that is what it was compressed to
    used: int  # by the allocator, for that
    metadata: int

    @property
    def cost(self) -> int:
        return self.used + self.metadata


class Zram:
    """A device of `size` bytes under /dev; `limit` is of its cost, in bytes."""

    def __init__(self, size: int, limit: int | None = None) -> None:
        self.size = size
        self._limit = limit
        self._made = False
        self._name = ""

    @staticmethod
    def available() -> bool:
        """Whether we may use one that does lz4."""
        if os.geteuid() != 0 or not (_CONTROL / "hot_add").exists():
            return False
        algorithms = _BLOCK.glob("zram*/comp_algorithm")
        return all("lz4" in path.read_text() for path in algorithms)

    def __enter__(self) -> Self:
        self._name, self._made = _obtain()
        try:
            self._write("comp_algorithm", "lz4")  # before the size: it can't be changed afterwards
            self._write("disksize", str(self.size))
            if self._limit:
                self._write("mem_limit", str(max(_PAGE, self._limit - metadata_bytes(self.size, self.size))))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + _RESET_S  # whoever looks for file systems may have it open for a moment
        while True:
            try:
                self._write("reset", "1")
                if self._made:
                    (_CONTROL / "hot_remove").write_text(self._name.removeprefix("zram"))
                return
            except (OSError, BenchError) as error:
                if time.monotonic() > deadline:
                    raise BenchError(f"{self.path} can't be reset: {error}") from None
                time.sleep(0.05)

    @property
    def path(self) -> Path:
        return Path("/dev") / self._name

    def usage(self) -> Usage:
        fields = [int(field) for field in (_BLOCK / self._name / "mm_stat").read_text().split()]
        stored, compressed, used = fields[:3]
        return Usage(stored, compressed, used, metadata_bytes(self.size, stored))

    def write(self, source: Path) -> None:
        """Store a file, without its holes and pages of zeros, and without the page cache."""
        fd = os.open(self.path, os.O_WRONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, _STEP) as buffer, source.open("rb") as file, memoryview(buffer) as view:
                at = 0
                while count := file.readinto(view):
                    for start, end in _runs(view[:count]):
                        with view[start:end] as run:
                            os.pwrite(fd, run, at + start)
                    at += count
        except OSError as error:
            raise BenchError(f"writing to {self.path} failed: {error.strerror}") from None
        finally:
            os.close(fd)

    def _write(self, name: str, value: str) -> None:
        try:
            (_BLOCK / self._name / name).write_text(value)
        except OSError as error:
            raise BenchError(f"{self._name}: {name} can't be set to {value}: {error.strerror}") from None


def metadata_bytes(size: int, stored: int) -> int:
    """What a device of `size` bytes with `stored` bytes in it takes besides its allocator's memory."""
    return size // _PAGE * _ENTRY_BYTES + stored // _PAGE * _HANDLE_BYTES


def cost_of(source: Path) -> Usage:
    """What zram takes for the content of a file."""
    size = -(-source.stat().st_size // _PAGE) * _PAGE
    with Zram(size) as disk:
        disk.write(source)
        return disk.usage()


def _obtain() -> tuple[str, bool]:
    """A device that is ours, and whether it was made for us."""
    try:
        number = int((_CONTROL / "hot_add").read_text())
    except OSError:
        for path in sorted(_BLOCK.glob("zram*")):
            if (path / "disksize").read_text().strip() == "0":
                return path.name, False
        raise BenchError("there is no zram device to be had") from None
    return f"zram{number}", True


def _runs(view: memoryview) -> Iterator[tuple[int, int]]:
    """The runs of pages that are not all zeros, as (start, end)."""
    zeros = bytes(_PAGE)
    start = None
    for at in range(0, len(view), _PAGE):
        if view[at : at + _PAGE] == zeros:
            if start is not None:
                yield start, at
                start = None
        elif start is None:
            start = at
    if start is not None:
        yield start, -(-len(view) // _PAGE) * _PAGE
