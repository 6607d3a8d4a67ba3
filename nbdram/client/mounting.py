"""`nbdram mount`: server, device, file system, mount; all of it or nothing.

The steps, each with its undo: a tmpfs for the server's state; the server; the device, held by the keeper, which also
starts the server again if it dies; a file system, unless there is one; the mount. What was kept from a mount before
is taken up instead of made.
"""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from nbdram.client import filesystems, local_server, sysfs
from nbdram.client.ask_keeper import ask
from nbdram.client.attachment import default_directory
from nbdram.client.filesystems import FILE_SYSTEMS
from nbdram.client.mount_notes import MountNote, Place, device_locked
from nbdram.client.mountinfo import mounted_at, mounts
from nbdram.client.undoing import Steps, all_or_nothing, uninterrupted
from nbdram.config import SwapSettings
from nbdram.errors import NbdramError, UsageError

MODULE: Final = Path("/sys/module/nbd")
_DEFAULT_KIND: Final = "ext4"
_UNKNOWN_OPTIONS: Final = "noatime"
# Besides the budget: a server must never find its file system full, and a limit costs nothing.
_STATE_ROOM_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class Wanted:
    """What is to be mounted where: an export of `uri`, or if that is "", a device of `size` bytes on this host.

    `kind` is "" to leave the file system to us. `owner` and `mode` of its root are None to take the mount point's.
    `attach` is for the keeper, as `nbdram attach` tells it.
    """

    point: Path
    name: str
    size: int = 0
    memory: int = 0
    uri: str = ""
    kind: str = ""
    journal: bool = False
    options: str = ""
    uid: int | None = None
    gid: int | None = None
    mode: int | None = None
    keep: bool = False
    nonempty: bool = False
    index: int = -1
    swap: tuple[SwapSettings, ...] = ()
    metrics: str = "off"
    attach: dict[str, Any] = field(default_factory=dict)


def mount(wanted: Wanted) -> MountNote:
    """Do it; the note of it. NbdramError says what is in the way, and nothing is left then."""
    check_point(wanted.point, nonempty=wanted.nonempty)
    _need_module()
    place = Place(wanted.name)
    with ExitStack() as lock, all_or_nothing() as steps:  # what is undone is undone under the lock
        lock.enter_context(place.locked())
        lock.enter_context(_alone_at(wanted.point))
        kept = _what_was_kept(place)
        note = _note(wanted, place, kept)
        steps.undo_with(_forget, place, kept)
        place.make()
        place.write(note)
        if note.server:
            _serve(wanted, place, note, steps, kept)
        note = _attach(wanted, place, note, steps)
        with _alone_with(note):
            note = _mount(wanted, place, note, steps)
        if kept and note.size > kept.size and note.kind in FILE_SYSTEMS:
            filesystems.grow(FILE_SYSTEMS[note.kind], Path(note.device), wanted.point)
        return note


@contextmanager
def _alone_at(point: Path) -> Iterator[None]:
    """Keep mounts of other names from the same directory meanwhile: one would hide the other."""
    descriptor = os.open(point, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise NbdramError(f"something is being mounted at {point} right now: choose another directory") from None
    finally:
        os.close(descriptor)


def check_point(point: Path, *, nonempty: bool) -> None:
    """UsageError if something is in the way at the mount point."""
    if not point.exists():
        raise UsageError(f"{point} does not exist: make it, with mkdir")
    if not point.is_dir():
        raise UsageError(f"{point} is not a directory: choose one to mount on")
    if there := mounted_at(point):
        raise UsageError(
            f"{there.source} ({there.kind}) is mounted at {point}: unmount it, or choose another directory"
        )
    if not nonempty and any(point.iterdir()):
        raise UsageError(f"{point} is not empty: choose an empty directory, or hide what is in it with --nonempty")


def _need_module() -> None:
    if not MODULE.exists() and (modprobe := shutil.which("modprobe", path="/usr/sbin:/sbin")):
        subprocess.run([modprobe, "--quiet", "nbd"], stdin=subprocess.DEVNULL, check=False)
    if not MODULE.exists():
        raise NbdramError("this kernel has no network block devices: load the module with `modprobe nbd`")


def _what_was_kept(place: Place) -> MountNote | None:
    """The note of a mount of this name whose data is there and is not mounted."""
    note = place.read()
    if note is None:
        return None
    if note.is_mounted:
        raise NbdramError(f"{place.name!r} is mounted at {note.point}: unmount it, or give this one another --name")
    if note.device or not note.keep or not mounted_at(place.state):
        raise NbdramError(f"a mount of {place.name!r} was cut short: clean up with `nbdram umount {note.point}`")
    return note


def _note(wanted: Wanted, place: Place, kept: MountNote | None) -> MountNote:
    if wanted.uri:
        if kept:
            raise NbdramError(f"data is kept under the name {place.name!r}: give this mount another --name")
        return MountNote(place.name, str(wanted.point), wanted.uri)
    # What has grown does not shrink; what shall be larger does grow.
    size = max(wanted.size, kept.size if kept else 0)
    server = local_server.command(place, size, wanted.memory, wanted.swap, wanted.metrics)
    uri = f"nbd+unix:///{place.name}?socket={place.socket}"
    return MountNote(place.name, str(wanted.point), uri, size=size, keep=wanted.keep, server=server)


def _forget(place: Place, kept: MountNote | None) -> None:
    if kept:
        place.write(kept)
    else:
        place.remove()


def _serve(wanted: Wanted, place: Place, note: MountNote, steps: Steps, kept: MountNote | None) -> None:
    limit = f"size={2 * wanted.memory + _STATE_ROOM_BYTES}"
    if kept:
        filesystems.remount_tmpfs(place.state, limit)
    else:
        place.state.mkdir(mode=0o700, exist_ok=True)
        steps.undo_with(_drop_state, place)
        filesystems.mount_tmpfs(place.state, limit)
    with uninterrupted():
        process = local_server.start(place, note.server)
        steps.undo_with(local_server.end, process)
    local_server.wait_until_ready(place, process)


def _drop_state(place: Place) -> None:
    if mounted_at(place.state):
        filesystems.unmount(place.state)


def _attach(wanted: Wanted, place: Place, note: MountNote, steps: Steps) -> MountNote:
    with uninterrupted():
        details = {"uri": note.uri, "index": wanted.index, "server": note.server, **wanted.attach}
        made = ask(default_directory(), "attach", **details)
        steps.undo_with(_detach, made["device"])
        note = replace(note, device=made["device"], size=made["size"])
        place.write(note)
    return note


def _detach(device: str) -> None:
    ask(default_directory(), "detach", index=sysfs.index_of(device))


def _mount(wanted: Wanted, place: Place, note: MountNote, steps: Steps) -> MountNote:
    device, point = Path(note.device), wanted.point
    under = point.stat()
    found = filesystems.found_on(device)
    if found and wanted.kind and found != wanted.kind:
        raise NbdramError(f"there is {found} on {note.uri}, not {wanted.kind}: leave --fs out to mount what is there")
    note = replace(note, kind=found or wanted.kind or _DEFAULT_KIND)
    system = FILE_SYSTEMS.get(note.kind)
    if not found:
        if system is None:
            raise UsageError(filesystems.cannot_make(note.kind))
        if "ro" in wanted.options.split(","):
            raise UsageError(f"there is no file system on {note.uri} yet: make one first, without the option ro")
        filesystems.make(system, device, journal=wanted.journal)
    check_point(point, nonempty=True)  # a mount of another name may have been quicker
    options = [system.options if system else _UNKNOWN_OPTIONS]
    if system and note.server:
        options.append(system.options_in_ram)
    options.append(wanted.options)
    steps.undo_with(_unmount, point, note.device)
    filesystems.mount(note.kind, ",".join(filter(None, options)), device, point)
    if not found:
        os.chown(point, _or(wanted.uid, under.st_uid), _or(wanted.gid, under.st_gid))
        point.chmod(_or(wanted.mode, under.st_mode & 0o7777))
    place.write(note)
    return note


def _attached() -> dict[str, Any]:
    """What the keeper holds, by the device's path."""
    return {device["device"]: device for device in ask(default_directory(), "status")["devices"]}


@contextmanager
def _alone_with(note: MountNote) -> Iterator[None]:
    """Keep others from mounting the same export meanwhile: two mounts of one file system would destroy it.

    NbdramError if it is in use on this host already, as another device.
    """
    ours = _attached().get(note.device)
    if ours is None:
        raise NbdramError(f"{note.device} was detached while it was to be mounted: mount it again")
    same = "identity" if ours["identity"] else "uri"
    with device_locked(ours[same]):
        for device, other in _attached().items():
            if device != note.device and other[same] == ours[same] and sysfs.is_in_use(sysfs.index_of(device)):
                points = [f" at {mount.point}" for mount in mounts() if mount.source == device]
                raise NbdramError(
                    f"{note.uri} is in use already, as {device}{''.join(points[:1])}, and mounted twice it would be "
                    "destroyed: unmount that first, or show it in a second place with `mount --bind`"
                )
        yield


def _unmount(point: Path, device: str) -> None:
    there = mounted_at(point)
    if there and there.source == device:
        filesystems.unmount(point)


def _or(asked: int | None, default: int) -> int:
    return default if asked is None else asked
