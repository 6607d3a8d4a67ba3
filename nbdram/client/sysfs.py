"""What the kernel shows of its network block devices in /sys/block and /dev."""

import errno
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Final

from nbdram.errors import NbdramError, UsageError

SYSTEM: Final = Path("/sys/block")
_READY_TIMEOUT_S: Final = 10.0


def index_of(path: str) -> int:
    """3 of `/dev/nbd3`."""
    match = re.fullmatch(r"/dev/nbd(\d{1,7})", path)
    if not match:
        raise UsageError(f"{path!r} is not a network block device: write /dev/nbd0, /dev/nbd1, ...")
    return int(match[1])


def path_of(index: int) -> Path:
    return Path(f"/dev/nbd{index}")


def is_connected(index: int) -> bool:
    """Whether the device is set up, its server alive or not."""
    return _of(index, "pid").exists()


def connected() -> list[int]:
    """The indices of all devices that are set up."""
    found = (re.fullmatch(r"nbd(\d+)", path.name) for path in SYSTEM.glob("nbd*"))
    return sorted(int(match[1]) for match in found if match and is_connected(int(match[1])))


def identifier_of(index: int) -> str:
    """The backend identifier that the device was given; "" if none, or if the kernel is too old (before 5.14)."""
    return _read(_of(index, "backend"))


def size_of(index: int) -> int:
    """The device's size in bytes; 0 if it is not set up."""
    return int(_read(_of(index, "size")) or 0) * 512


def set_request_timeout(index: int, milliseconds: int) -> None:
    """After how long the block layer asks the driver about a request that was not answered."""
    _of(index, "queue/io_timeout").write_text(str(milliseconds))


def wait_until_ready(index: int, size: int) -> None:
    """Return when the device has its size and its node in /dev, and udev is done with it."""
    path = path_of(index)
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while not (path.is_block_device() and size_of(index) >= size):
        if time.monotonic() > deadline:
            what = "did not get its size" if path.is_block_device() else "did not appear"
            raise NbdramError(f"{path} {what} within {_READY_TIMEOUT_S:g} s: see the kernel's messages with `dmesg`")
        time.sleep(0.01)
    if Path("/run/udev/control").exists() and (udevadm := shutil.which("udevadm")):
        subprocess.run([udevadm, "settle", "--timeout=10"], check=False)


def wait_until_free(index: int) -> None:
    """Return when a device that was detached is gone, which it is when the last who has it open closes it."""
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while is_connected(index) and time.monotonic() < deadline:
        time.sleep(0.01)


def open_exclusively(index: int) -> int:
    """A descriptor of the device that nobody else uses; OSError EBUSY if it is mounted or held otherwise."""
    return os.open(path_of(index), os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)


def is_in_use(index: int) -> bool:
    """Whether the device is mounted, in whatever namespace, or held otherwise."""
    try:
        os.close(open_exclusively(index))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def _of(index: int, name: str) -> Path:
    return SYSTEM / f"nbd{index}" / name


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
