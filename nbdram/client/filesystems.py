"""File systems for RAM: how each is made, mounted and grown. docs/mount.md explains each choice, with its figure."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdram.client.undoing import run
from nbdram.errors import NbdramError

# Where programs of the system are, also for users whose PATH lacks them.
_SYSTEM_PATHS: Final = ":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"


@dataclass(frozen=True)
class FileSystem:
    """`grow` gets the mount point after it, or the device if `grows_by_device`.

    `options_in_ram` are for a device of a server of our own, whose data is in the same RAM.
    """

    name: str
    package: str
    make: tuple[str, ...]
    options: str
    grow: tuple[str, ...]
    grows_by_device: bool = False
    with_journal: tuple[str, ...] = ()
    without_journal: tuple[str, ...] = ()
    options_in_ram: str = ""


# Memory is zeroed and as durable as the kernel that has it mounted: nothing is written that only says so, nothing
# is reserved, and nothing is kept for a crash that would take all data with it. meta_bg: without it, an empty ext4
# takes 4 MiB more, for descriptors of groups that are not there yet, and at 1 TiB another 8 for copies of all of them.
# btrfs: what is deleted is given back when it commits; nodatacow, because a file that is overwritten here and there
# keeps its old extents until nothing of them is used, and takes twice its size.
_EXT4: Final = FileSystem(
    "ext4",
    "e2fsprogs",
    (
        *("mkfs.ext4", "-q", "-F", "-m", "0"),
        *("-E", "nodiscard,assume_storage_prezeroed=1"),
    ),
    "noatime,discard",
    ("resize2fs",),
    grows_by_device=True,
    with_journal=("-J", "size=16", "-O", "meta_bg,^resize_inode"),
    without_journal=("-O", "^has_journal,meta_bg,^resize_inode"),
)
_XFS: Final = FileSystem(
    "xfs", "xfsprogs", ("mkfs.xfs", "-q", "-f", "-K", "-l", "size=64m"), "noatime,discard", ("xfs_growfs",)
)
_BTRFS: Final = FileSystem(
    "btrfs",
    "btrfs-progs",
    ("mkfs.btrfs", "-q", "-f", "-K", "-m", "single", "-d", "single"),
    "noatime,discard=sync",
    ("btrfs", "filesystem", "resize", "max"),
    options_in_ram="commit=1,nodatacow",
)
FILE_SYSTEMS: Final = {system.name: system for system in (_EXT4, _XFS, _BTRFS)}


def cannot_make(kind: str) -> str:
    """A sentence for those who ask for another one."""
    if kind == "ufs":
        return (
            "nbdram can't make 'ufs', because makefs can only write a whole image, zeros too: attach the device with "
            "--block-size 512 and copy an image to it, as docs/ffs.md shows"
        )
    return f"nbdram can't make {kind!r}: choose one of {', '.join(FILE_SYSTEMS)}"


def make(system: FileSystem, device: Path, *, journal: bool) -> None:
    """Make an empty file system on a device; NbdramError with what its program says against it."""
    how = system.with_journal if journal else system.without_journal
    _run([*system.make, *how, str(device)], system.package)


def mount(kind: str, options: str, device: Path, point: Path) -> None:
    """Only with what the kernel can: no helper is called, ours least of all."""
    try:
        _run(["mount", "-i", "-t", kind, "-o", options, str(device), str(point)], "mount")
    except NbdramError as error:
        if kind != "ufs":
            raise
        raise NbdramError(
            f"{error}; ufs takes --block-size 512 and -o ufstype=44bsd, or ufs2: see docs/ffs.md"
        ) from error


def mount_tmpfs(point: Path, limit: str) -> None:
    """A tmpfs for pages of which we decide where they go: none of them is swapped by the kernel, if it can be told."""
    # The last is what every kernel knows; noswap is of Linux 6.4.
    for more in (",noswap,huge=never", ",huge=never", ""):
        try:
            _run(["mount", "-i", "-t", "tmpfs", "-o", f"{limit},mode=700{more}", "nbdram", str(point)], "mount")
            return
        except NbdramError:
            if not more:
                raise


def remount_tmpfs(point: Path, limit: str) -> None:
    _run(["mount", "-i", "-o", f"remount,{limit}", str(point)], "mount")


def unmount(point: Path) -> None:
    _run(["umount", "-i", str(point)], "mount")


def grow(system: FileSystem, device: Path, point: Path) -> None:
    """Let a mounted file system have all of its device."""
    where = device if system.grows_by_device else point
    _run([*system.grow, str(where)], system.package)


def found_on(device: Path) -> str:
    """The name of what is on a device, as in `ext4`; "" if it is blank."""
    try:
        with device.open("rb") as file:  # blkid says "nothing found" also of what can't be read
            file.read(1 << 20)
    except OSError as error:
        raise NbdramError(f"can't read {device}: {error.strerror}") from error
    argv = [program("blkid", "util-linux"), "-p", "-o", "value", "-s", "TYPE", "-s", "PTTYPE", str(device)]
    done = run(argv)
    if done.returncode not in (0, 2):
        raise NbdramError(f"can't look at {device}: {_last_line(done.stderr)}")
    return done.stdout.strip().partition("\n")[0]


def program(name: str, package: str) -> str:
    """The path of a program; NbdramError that names the package of Debian that has it."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + _SYSTEM_PATHS)
    if path is None:
        raise NbdramError(f"{name} is not installed: apt-get install {package}")
    return path


def _run(argv: Sequence[str], package: str) -> None:
    done = run([program(argv[0], package), *argv[1:]])
    if done.returncode != 0:
        raise NbdramError(f"{argv[0]} failed: {_last_line(done.stderr) or f'exit code {done.returncode}'}")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() and "dmesg(1)" not in line]
    return lines[-1].rstrip(".") if lines else ""
