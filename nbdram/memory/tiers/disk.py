"""The second tier: sealed images in sparse files on disk, with the same geometry as the RAM tier.

One directory is one swap area, shared by all devices of a server and locked by it. Each device has a file there
that has no name (so that nothing is left behind), is never larger than what is stored in it, and holds nothing
readable: every image is sealed with AES-GCM under a key that exists only in this process.

    slot: nonce (12 bytes), then the sealed image with its tag (16 bytes)

The cluster, the slot and the device are authenticated with the image, so that images can't be exchanged.
All calls block, and may be made from worker threads; stores and drops come from a single one, in order.
"""

import ctypes
import errno
import fcntl
import logging
import os
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from nbdram.errors import NbdramError
from nbdram.memory.codec import IntegrityError
from nbdram.memory.layout import CLUSTER, PAGE, round_up

log = logging.getLogger("nbdram.disk")

_NONCE_BYTES: Final = 12
_SEAL_BYTES: Final = _NONCE_BYTES + 16
_SLOT_BYTES: Final = CLUSTER + PAGE
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
    """A directory for swap files, of at most `max_bytes` together (0: as much as the disk has)."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self.failing = False  # it has refused the last write
        self._retry_at = 0.0
        self._key = AESGCM(AESGCM.generate_key(256))
        self._sealed = 0
        try:
            path.mkdir(mode=0o700, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise NbdramError(f"can't use {path} for swap: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check_sparse()
        except BlockingIOError:
            os.close(self._lock)
            raise NbdramError(f"{path} is in use by another server: give each its own directory") from None
        except BaseException:
            os.close(self._lock)
            raise
        if _filesystem(path) == "tmpfs":
            log.warning("%s is on tmpfs: what is swapped there stays in RAM", path)

    def close(self) -> None:
        os.close(self._lock)

    def open_file(self) -> int:
        """A new file without a name."""
        return os.open(self.path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)

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
        return not self.max_bytes or self.used_bytes + _SLOT_BYTES <= self.max_bytes

    def check_size(self, device_bytes: int) -> None:
        """NbdramError if the file system's files can't be as large as such a device may need."""
        fd = self.open_file()
        try:
            os.ftruncate(fd, 2 * _SLOT_BYTES * (round_up(device_bytes, CLUSTER) // CLUSTER))
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
        self._sealed += 1
        nonce = self._sealed.to_bytes(_NONCE_BYTES, "big")
        return nonce + self._key.encrypt(nonce, image, identity)

    def open_sealed(self, sealed: bytes, identity: bytes) -> bytes:
        try:
            return self._key.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], identity)
        except (InvalidTag, ValueError):
            raise IntegrityError("an image on disk is not what was stored") from None


class DiskTier:
    """The images of one device, spread over the server's swap areas by cluster."""

    def __init__(self, areas: list[SwapArea], writer: ThreadPoolExecutor) -> None:
        self._areas = areas
        self.writer = writer  # its only thread runs every store and drop
        self._files = [area.open_file() for area in areas]
        self._name = secrets.token_bytes(16)

    def close(self) -> None:
        for fd, area in zip(self._files, self._areas, strict=True):
            area.used_bytes -= os.fstat(fd).st_blocks * 512
            os.close(fd)

    def has_room(self, cluster: int) -> bool:
        return self._areas[cluster % len(self._areas)].has_room()

    def has_any_room(self) -> bool:
        return any(area.has_room() for area in self._areas)

    def store(self, cluster: int, slot: int, image: bytes) -> None:
        """Seal an image into a free slot. OSError if the disk refuses it; then the slot is empty."""
        area, fd = self._place(cluster)
        sealed = area.seal(image, self._identity(cluster, slot))
        at = _offset(cluster, slot)
        try:
            written = os.pwrite(fd, sealed, at)
            if written != len(sealed):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            area.refused(error)
            with suppress(OSError):
                punch_hole(fd, at, _SLOT_BYTES)
            raise
        area.written()
        area.used_bytes += round_up(len(sealed), PAGE)

    def load(self, cluster: int, slot: int, length: int) -> bytes:
        """An image of `length` bytes; OSError if the disk fails twice, IntegrityError if it is not what was stored."""
        area, fd = self._place(cluster)
        for attempt in (1, 2):
            try:
                sealed = os.pread(fd, length + _SEAL_BYTES, _offset(cluster, slot))
                if len(sealed) != length + _SEAL_BYTES:
                    raise OSError(errno.EIO, "short read from swap")
                return area.open_sealed(sealed, self._identity(cluster, slot))
            except OSError:
                if attempt == 2:
                    raise
        raise AssertionError

    def drop(self, cluster: int, slot: int, length: int) -> None:
        """Give a slot back to the disk, some time soon."""
        self.writer.submit(self._drop, cluster, slot, length)

    def _drop(self, cluster: int, slot: int, length: int) -> None:
        area, fd = self._place(cluster)
        try:
            punch_hole(fd, _offset(cluster, slot), _SLOT_BYTES)
        except OSError as error:
            log.error("%s: can't punch swap: %s", area.path, error.strerror)
            return
        area.used_bytes -= round_up(length + _SEAL_BYTES, PAGE)
        area.made_room()

    def _place(self, cluster: int) -> tuple[SwapArea, int]:
        number = cluster % len(self._areas)
        return self._areas[number], self._files[number]

    def _identity(self, cluster: int, slot: int) -> bytes:
        return self._name + cluster.to_bytes(8, "big") + bytes((slot,))


def _offset(cluster: int, slot: int) -> int:
    return (2 * cluster + slot) * _SLOT_BYTES


def _filesystem(path: Path) -> str:
    """The type of the file system that holds `path`."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == number:
            return fields[fields.index("-") + 1]
    return ""
