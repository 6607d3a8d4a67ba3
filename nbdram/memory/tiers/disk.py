"""The second tier: sealed images in sparse files on disk, with the same geometry as the RAM tier.

One directory is one swap area, shared by all devices of a server and locked by it. Each device has a file there
that is never larger than what is stored in it, and holds nothing readable: every image is sealed with AES-GCM.
The file has no name, so that nothing is left behind; with a state directory it is called after the device.

How images are sealed is told in `seal.py`.
The cluster, the slot and the device are authenticated with the image, so that images can't be exchanged.
All calls but `load_now` block, and may be made from worker threads; stores and drops come from a single one, in order.
"""

import ctypes
import errno
import logging
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final
from uuid import UUID

from nbdram.errors import NbdramError
from nbdram.memory.backing import allocated_bytes
from nbdram.memory.layout import CLUSTER, PAGE, SEAL_BYTES, Tier, round_up
from nbdram.memory.locking import lock_patiently

log = logging.getLogger("nbdram.disk")

SLOT_BYTES: Final = CLUSTER + PAGE
_MOST_PLACES: Final = 128  # so that a slot is a byte
_RETRY_S: Final = 1.0  # a disk that has refused a write is asked again after this, or when something was dropped
_FALLOC_FL_KEEP_SIZE: Final = 1
_FALLOC_FL_PUNCH_HOLE: Final = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give a part of a file back to its file system."""
    mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
    if _libc.fallocate(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class SwapArea:
    """A directory for swap files, of at most `max_bytes` together (0: as much as the disk has).

    `secret` is what images are sealed with; without one, with one that nobody else will ever know.
    """

    def __init__(self, path: Path, max_bytes: int, secret: bytes | None = None) -> None:
        from nbdram.memory.tiers.seal import Seal  # its library takes 2 MiB, which are only for those who seal

        self.path = path
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self.failing = False  # it has refused the last write
        self._retry_at = 0.0
        self._seal = Seal(secret, b"nbdram swap", "on disk")
        if os.path.exists(path) and not os.path.isdir(path):
            raise NbdramError(f"can't use {path} for swap: it is not a directory, name one")
        try:
            path.mkdir(mode=0o700, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            above = path.absolute().parent
            if isinstance(error, FileNotFoundError) and not above.exists():  # a disk that is not mounted, perhaps
                raise NbdramError(f"can't use {path} for swap: there is no {above}: mount or make it") from error
            raise NbdramError(f"can't use {path} for swap: {error.strerror}") from error
        try:
            lock_patiently(self._lock, f"{path} is in use by another server: give each its own directory")
            self._check_sparse()
        except BaseException:
            os.close(self._lock)
            raise
        if filesystem(path) == "tmpfs":
            log.warning("%s is on tmpfs: what is swapped there stays in RAM", path)

    def close(self) -> None:
        os.close(self._lock)

    def open_file(self, identity: UUID | None = None) -> int:
        """A new file without a name, or the file of a device that is kept: the one that is there, or a new one."""
        if identity is None:
            return os.open(self.path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        flags = os.O_CREAT | os.O_NOFOLLOW | os.O_RDWR | os.O_CLOEXEC
        return os.open(swap_file(self.path, identity), flags, 0o600)

    def _check_sparse(self) -> None:
        """Refuse a file system that can't grow sparse files or take a part of them back."""
        try:
            fd = self.open_file()
            try:
                os.pwrite(fd, bytes(CLUSTER), 1 << 40)
                punch_hole(fd, 1 << 40, CLUSTER)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EFBIG, errno.EISDIR, errno.EINVAL):
                raise NbdramError(
                    f"the file system of {self.path} has no sparse files that can be punched: "
                    "use one on ext4, xfs or btrfs"
                ) from error
            raise NbdramError(f"can't use {self.path} for swap: {error.strerror}") from error

    def size_bytes(self) -> int:
        """What may be stored here in all: `max_bytes`, or what is used and what the file system has left."""
        if self.max_bytes:
            return self.max_bytes
        status = os.statvfs(self.path)
        return self.used_bytes + status.f_bavail * status.f_frsize

    def has_room(self) -> bool:
        """Whether it is worth trying to store an image."""
        if self.failing and time.monotonic() < self._retry_at:
            return False
        return self.may_grow()

    def may_grow(self) -> bool:
        """Whether one more image is within `max_bytes`."""
        return not self.max_bytes or self.used_bytes + SLOT_BYTES <= self.max_bytes

    def check_size(self, device_bytes: int) -> None:
        """NbdramError if the file system's files can't be as large as such a device may need."""
        fd = self.open_file()
        try:
            os.ftruncate(fd, 2 * SLOT_BYTES * (round_up(device_bytes, CLUSTER) // CLUSTER))
        except OSError as error:
            raise NbdramError(
                f"the file system of {self.path} has too small files for an export of {device_bytes >> 30} GiB "
                f"({error.strerror}): use one on xfs or btrfs, or a smaller export"
            ) from error
        finally:
            os.close(fd)

    def written(self) -> None:
        if self.failing:
            log.warning("%s: swap can be written again", self.path)
        self.failing = False

    def refused(self, error: OSError) -> None:
        if not self.failing:
            log.error("%s: can't write swap: %s; cold data stays in RAM for now", self.path, error.strerror)
        self.failing = True
        self._retry_at = time.monotonic() + _RETRY_S

    def made_room(self) -> None:
        self._retry_at = 0.0

    def seal(self, image: bytes, identity: bytes) -> bytes:
        return self._seal.seal(image, identity)

    def open_sealed(self, sealed: bytes | bytearray, identity: bytes) -> bytes:
        return self._seal.open(sealed, identity)


class DiskTier:
    """The images of one device, spread over the server's swap areas.

    Each cluster has an area of its own, and goes to the next one that has room where that is full or fails. Above the
    lowest bit of what is called a slot here is how many areas further that is: `far_slot` of a word.
    """

    tier: Final = Tier.DISK

    def __init__(self, areas: list[SwapArea], writer: ThreadPoolExecutor, identity: UUID, *, kept: bool) -> None:
        """`kept`: files that have names, and what is in them from before."""
        self.areas = areas
        self.writer = writer  # its only thread runs every store and drop
        self.files: list[int] = []
        self._name = identity.bytes
        try:
            for area in areas:
                self.files.append(area.open_file(identity if kept else None))
                area.used_bytes += allocated_bytes(self.files[-1])
        except OSError as error:
            self.close()
            raise NbdramError(f"can't open the swap file of a device in {area.path}: {error.strerror}") from error

    def close(self) -> None:
        for fd, area in zip(self.files, self.areas, strict=False):
            area.used_bytes -= allocated_bytes(fd)
            os.close(fd)
        self.files.clear()

    def has_room(self) -> bool:
        return any(area.has_room() for area in self.areas)

    def place(self, cluster: int) -> int:
        """How many areas further than its own a cluster finds room; 0 if there is none."""
        places = range(min(len(self.areas), _MOST_PLACES))
        return next((place for place in places if self.areas[self.number(cluster, place << 1)].has_room()), 0)

    def number(self, cluster: int, slot: int) -> int:
        """Which area has a slot of a cluster."""
        return (cluster + (slot >> 1)) % len(self.areas)

    def store(self, cluster: int, slot: int, image: bytes) -> None:
        """Seal an image into a free slot. OSError if the disk refuses it; then the slot is empty."""
        area, fd = self._where(cluster, slot)
        if not area.may_grow():  # others were on their way there when it had room
            raise OSError(errno.ENOSPC, "there is as much as was allowed")
        sealed = area.seal(image, self._label(cluster, slot))
        at = _offset(cluster, slot)
        try:
            written = os.pwrite(fd, sealed, at)
            if written != len(sealed):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            area.refused(error)
            with suppress(OSError):
                punch_hole(fd, at, SLOT_BYTES)
            raise
        area.written()
        area.used_bytes += round_up(len(sealed), PAGE)

    def submit(self, cluster: int, slot: int, image: bytes) -> "Future[None]":
        """Store an image in its turn; OSError as `store` gives it."""
        return self.writer.submit(self.store, cluster, slot, image)

    def load(self, cluster: int, slot: int, length: int) -> bytes:
        """An image of `length` bytes; OSError if the disk fails twice, IntegrityError if it is not what was stored."""
        area, fd = self._where(cluster, slot)
        for attempt in (1, 2):
            try:
                sealed = os.pread(fd, length + SEAL_BYTES, _offset(cluster, slot))
                if len(sealed) != length + SEAL_BYTES:
                    raise OSError(errno.EIO, "short read from swap")
                return area.open_sealed(sealed, self._label(cluster, slot))
            except OSError:
                if attempt == 2:
                    raise
        raise AssertionError

    def load_now(self, cluster: int, slot: int, length: int) -> bytes | None:
        """An image that the kernel has in its page cache. None if that would wait for the disk, or does not go well."""
        area, fd = self._where(cluster, slot)
        sealed = bytearray(length + SEAL_BYTES)
        try:
            if os.preadv(fd, [sealed], _offset(cluster, slot), os.RWF_NOWAIT) != len(sealed):
                return None
            return area.open_sealed(sealed, self._label(cluster, slot))
        except OSError:  # it would block, or the file system can't say; what else it is `load` finds out
            return None

    def drop(self, cluster: int, slot: int, length: int) -> None:
        """Give a slot back to the disk, some time soon."""
        self.writer.submit(self._drop, cluster, slot, length)

    def _drop(self, cluster: int, slot: int, length: int) -> None:
        area, fd = self._where(cluster, slot)
        try:
            punch_hole(fd, _offset(cluster, slot), SLOT_BYTES)
        except OSError as error:
            log.error("%s: can't punch swap: %s", area.path, error.strerror)
            return
        area.used_bytes -= round_up(length + SEAL_BYTES, PAGE)
        area.made_room()

    def give_back(self, number: int, start: int, end: int) -> None:
        """Punch bytes of file `number` that hold no image, in its turn among stores and drops."""
        self.writer.submit(self._give_back, number, start, end)

    def _give_back(self, number: int, start: int, end: int) -> None:
        area, fd = self.areas[number], self.files[number]
        before = allocated_bytes(fd)
        try:
            punch_hole(fd, start, end - start)
        except OSError as error:
            log.error("%s: can't punch swap: %s", area.path, error.strerror)
        area.used_bytes += allocated_bytes(fd) - before

    def _where(self, cluster: int, slot: int) -> tuple[SwapArea, int]:
        number = self.number(cluster, slot)
        return self.areas[number], self.files[number]

    def _label(self, cluster: int, slot: int) -> bytes:
        return self._name + cluster.to_bytes(8, "big") + bytes((slot,))


def _offset(cluster: int, slot: int) -> int:
    return (2 * cluster + (slot & 1)) * SLOT_BYTES


def swap_file(directory: Path, identity: UUID) -> Path:
    """The file of a device that is kept in a swap directory."""
    return directory / f"{identity}.swap"


def filesystem(path: Path) -> str:
    """The type of the file system that holds `path`."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == number:
            return fields[fields.index("-") + 1]
    return ""
