"""After an export has grown: the kernel is told, and the file system on it gets all of it."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from nbdram.client import filesystems, sysfs
from nbdram.client.ask_keeper import ask_if_running
from nbdram.client.attachment import default_directory
from nbdram.client.filesystems import FILE_SYSTEMS
from nbdram.client.mountinfo import Mounted, mounts
from nbdram.config import format_size
from nbdram.errors import NbdramError

_TIMEOUT_S: Final = 20.0


def tell_kernel(identity: str, size: int) -> list[int]:
    """Have the keeper look at its exports; the devices that lead to this one, once they have `size` bytes."""
    directory = default_directory()
    answer = ask_if_running(directory, "status")
    kept = answer["devices"] if answer else []
    found = [sysfs.index_of(device["device"]) for device in kept if device["identity"] == identity]
    if not found:
        return []
    ask_if_running(directory, "look")
    deadline = time.monotonic() + _TIMEOUT_S
    for index in found:
        while sysfs.size_of(index) < size:
            if time.monotonic() > deadline:
                raise NbdramError(
                    f"{sysfs.path_of(index)} has not grown to {format_size(size)}: see `nbdram attach --status`"
                )
            time.sleep(0.02)
    return found


def grow_file_systems(indices: list[int]) -> list[Path]:
    """Grow what is mounted of these devices; where. NbdramError if there is nothing that can be grown."""
    grown = []
    for mount in _mounted(indices):
        system = FILE_SYSTEMS.get(mount.kind)
        if system is None:
            raise NbdramError(f"nbdram can't grow {mount.kind} at {mount.point}: do it with the program for it")
        filesystems.grow(system, Path(mount.source), mount.point)
        grown.append(mount.point)
    if not grown:
        raise NbdramError("the export has grown, but no file system of it is mounted on this host: grow that yourself")
    return grown


def _mounted(indices: list[int]) -> Iterator[Mounted]:
    """One mount of each device that is mounted."""
    seen: set[str] = set()
    devices = {str(sysfs.path_of(index)) for index in indices}
    for mount in mounts():
        if mount.source in devices - seen:
            seen.add(mount.source)
            yield mount
