"""`nbdram umount`: the way back, from whatever state a mount is in. What is gone already is passed over."""

import errno
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Final

from nbdram.client import filesystems, local_server, sysfs
from nbdram.client.ask_keeper import ask
from nbdram.client.attachment import Attachment, default_directory
from nbdram.client.mount_notes import MountNote, Place
from nbdram.client.mountinfo import mounted_at, mounts, users_of
from nbdram.errors import NbdramError

_SYNC_S: Final = 5.0  # so long has a server that is connected, but perhaps does not answer


def unmount(note: MountNote, *, free: bool = False, force: bool = False, leftovers: bool = False) -> int:
    """Unmount, detach, stop the server, and give its memory back unless it is kept; how many bytes that were.

    `free`: also what was to be kept. `force`: also if the server is gone; then what was not written yet is lost.
    `leftovers`: only what is left when somebody else has unmounted it.
    """
    place = Place(note.name)
    with place.locked():
        found = place.read()
        if found is None or (leftovers and found.is_mounted):
            return 0
        note = found
        if force and _is_ours(note) and not _is_synced(note):
            ask(default_directory(), "detach", index=sysfs.index_of(note.device))
        place.write(replace(note, kind=""))  # so that the keeper does not clear up meanwhile
        try:
            if _is_ours(note):
                ask(default_directory(), "status")  # a keeper is there then, for what is still to be written
            _unmount(note)
        except BaseException:
            place.write(note)
            raise
        if _is_ours(note):
            _detach(note)
        if note.server:
            local_server.stop(place.state)
        if note.keep and not free:
            place.write(replace(note, device=""))
            return 0
        freed = _free(place)
        place.remove()
    return freed


def _is_synced(note: MountNote) -> bool:
    """Whether the server is there after all, and has taken what was still to be written."""
    attached = ask(default_directory(), "status")["devices"]
    if not any(device["device"] == note.device and device["state"] == "connected" for device in attached):
        return False
    if not note.is_mounted:
        return True
    syncing = subprocess.Popen(["sync", "-f", note.point], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return syncing.wait(_SYNC_S) == 0
    except subprocess.TimeoutExpired:  # it ends when the device is detached
        return False


def _unmount(note: MountNote) -> None:
    point = Path(note.point)
    there = mounted_at(point)
    if there is None or not note.is_mounted:
        return
    elsewhere = [mount.point for mount in mounts() if mount.source == note.device and mount.point != point]
    if elsewhere:
        raise NbdramError(f"{point} is mounted at {elsewhere[0]} too: unmount that first")
    try:
        filesystems.unmount(point)
    except NbdramError:
        users = users_of(there)
        if not users:
            raise
        raise NbdramError(f"{point} is in use by {users}: end that first, or leave the directory") from None


def _is_ours(note: MountNote) -> bool:
    """Whether the device that was noted is attached, and to the same export."""
    if not note.device:
        return False
    index = sysfs.index_of(note.device)
    return sysfs.is_connected(index) and sysfs.identifier_of(index) in ("", Attachment(note.uri).identifier)


def _detach(note: MountNote) -> None:
    index = sysfs.index_of(note.device)
    try:
        os.close(sysfs.open_exclusively(index))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise NbdramError(
                f"{note.device} is in use, though it is not mounted here: is it, in a container or another namespace?"
            ) from error
        raise NbdramError(f"can't open {note.device}: {error.strerror}") from error
    ask(default_directory(), "detach", index=index)


def _free(place: Place) -> int:
    """Drop the state; what is on disk as well."""
    from nbdram.memory.statedir import MANIFEST, StateDirectory  # which brings cryptography, and takes its time

    if not mounted_at(place.state):
        return 0
    status = os.statvfs(place.state)
    if (place.state / MANIFEST).exists():
        state = StateDirectory(place.state, make=False)
        try:
            state.remove()
        finally:
            state.close()
    filesystems.unmount(place.state)
    return (status.f_blocks - status.f_bfree) * status.f_frsize
