"""What is noted of each mount, so that `umount` and the next `mount` know what belongs to it.

Below /run/nbdram/mounts, for each name:

    NAME.lock          held by who mounts or unmounts it
    .DEVICE.lock       held by who mounts that device of a server, under whatever name
    NAME/mount.json    the note
    NAME/state         the server's state directory: a tmpfs of its own
    NAME/nbd.sock      where the server listens, and NAME/control, NAME/server.log
"""

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final

from nbdram.client.attachment import default_directory
from nbdram.client.mountinfo import mounted_at
from nbdram.errors import NbdramError, UsageError

# A Unix socket's path has 107 bytes at most.
_MAX_NAME: Final = 60
PATIENCE_S: Final = 10.0
_NAME: Final = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,{_MAX_NAME - 1}}}")


@dataclass(frozen=True)
class MountNote:
    """`device` is "" as long as none is attached; `server` is the command that starts the server, if it is ours.

    `size` in bytes; `kind` is the file system, "" until it is mounted; `keep`: the data stays when it is unmounted.
    """

    name: str
    point: str
    uri: str
    device: str = ""
    size: int = 0
    kind: str = ""
    keep: bool = False
    server: tuple[str, ...] = ()

    @property
    def is_mounted(self) -> bool:
        there = mounted_at(Path(self.point))
        return bool(self.device and there and there.source == self.device)


@dataclass(frozen=True)
class Place:
    """The directory of one mount."""

    name: str

    @property
    def directory(self) -> Path:
        return mounts_directory() / self.name

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def socket(self) -> Path:
        return self.directory / "nbd.sock"

    @property
    def control(self) -> Path:
        return self.directory / "control"

    @property
    def log(self) -> Path:
        return self.directory / "server.log"

    def make(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def remove(self) -> None:
        """All of it; `state` must be unmounted."""
        with suppress(FileNotFoundError):
            self.state.rmdir()
        with suppress(FileNotFoundError):
            for path in self.directory.iterdir():
                path.unlink(missing_ok=True)
            self.directory.rmdir()

    def read(self) -> MountNote | None:
        try:
            known = json.loads((self.directory / "mount.json").read_text())
            values = {item.name: known[item.name] for item in fields(MountNote)}
            return MountNote(**values | {"server": tuple(known["server"])})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, note: MountNote) -> None:
        draft = self.directory / "mount.json.new"
        draft.write_text(json.dumps(asdict(note)))
        os.replace(draft, self.directory / "mount.json")

    def locked(self) -> AbstractContextManager[None]:
        """Keep others from mounting or unmounting the same name meanwhile; NbdramError if somebody is long at it."""
        return _locked(self.name, repr(self.name))


def device_locked(device: str) -> AbstractContextManager[None]:
    """Likewise for a server's device, by its identity or its URI, under whatever name."""
    return _locked(f".{hashlib.blake2s(os.fsencode(device), digest_size=16).hexdigest()}", device)


@contextmanager
def _locked(name: str, what: str) -> Iterator[None]:
    mounts_directory().mkdir(mode=0o700, parents=True, exist_ok=True)
    path = mounts_directory() / f"{name}.lock"
    deadline = time.monotonic() + PATIENCE_S
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file_of(path, descriptor):  # else who had it before us has removed it
                break
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise NbdramError(f"{what} is being mounted or unmounted right now: wait for it") from None
        os.close(descriptor)
        time.sleep(0.05)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def mounts_directory() -> Path:
    return default_directory() / "mounts"


def all_notes() -> list[MountNote]:
    """Those of mounts that are there, that are kept, or that were cut short."""
    with suppress(FileNotFoundError):
        names = sorted(path.name for path in mounts_directory().iterdir() if path.is_dir())
        return [note for name in names if (note := Place(name).read())]
    return []


def note_of(what: str) -> MountNote | None:
    """The note of a mount, by its name or its mount point."""
    point = os.path.realpath(what)
    notes = all_notes()
    by_point = [note for note in notes if note.point == point]
    # Of several that were kept, the one that is there now.
    by_point.sort(key=lambda note: note.device == "")
    return next(iter([*by_point, *(note for note in notes if note.name == what)]), None)


def name_for(point: Path) -> str:
    """A name made of a mount point: `mnt-build` of /mnt/build."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", str(point).strip("/").replace("/", "-")).lstrip(".-") or "root"
    if len(plain) <= _MAX_NAME and plain.replace("-", "/") == str(point).strip("/"):
        return plain
    # Something was left out: what tells it from others is added.
    return f"{plain[-40:].lstrip('.-')}-{hashlib.blake2s(os.fsencode(point), digest_size=4).hexdigest()}"


def check_mount_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} can't be a mount's name: at most {_MAX_NAME} letters, digits, '.', '_' and '-'")
    return name


def _is_file_of(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
