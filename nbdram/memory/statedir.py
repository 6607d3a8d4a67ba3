"""A state directory: devices as files that outlive the process, best on tmpfs.

    manifest.json                        what is here; written to a second file that then takes its name
    UUID.hot, UUID.cold, UUID.index      the memory files of each device, in the geometry of `backing.py`
    UUID.remote                          which images it has in a remote, if it ever had any (`tiers/generations.py`)

Killing the process loses nothing that is in these files: the kernel has it. Rules:

1. The directory is locked for as long as it is open. Whoever comes second waits a moment, because a server that was
   killed may still be busy dying.
2. Nothing is changed before everything was checked: what is missing, too short, damaged or from a newer format is
   refused with a sentence that names the file. Files that the manifest does not know are never touched.
3. Files are removed only if the manifest lists their device, under "leftovers", which is where a device is
   from before its first file is made until it is complete, and from when it is removed until its last file is gone.
4. The sizes in the manifest are those of the devices. Files may be longer: they grow before the manifest is written,
   and never shrink.
"""

import json
import os
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar
from uuid import UUID

import xxhash

from nbdram.errors import NbdramError
from nbdram.memory.backing import OpenFile, file_lengths
from nbdram.memory.layout import CLUSTER, MAX_DEVICE_BYTES, PAGE, SECRET_BYTES
from nbdram.memory.locking import lock_patiently
from nbdram.memory.tiers.disk import swap_file
from nbdram.memory.tiers.generations import GENERATIONS_BYTES

FORMAT: Final = 2
_READABLE: Final = (1, FORMAT)  # 1 has no dense images
MANIFEST: Final = "manifest.json"
_NEW_MANIFEST: Final = "manifest.json.new"
_REMOTE: Final = "remote"
_KINDS: Final = (*file_lengths(0), _REMOTE)
_GEOMETRY: Final = {"page": PAGE, "cluster": CLUSTER}

T = TypeVar("T")


@dataclass(frozen=True)
class StoredDevice:
    """What the manifest says of a device. `size` in bytes; `dense`: its images are one block of 64 KiB."""

    identity: UUID
    name: str
    size: int
    read_only: bool = False
    description: str = ""
    dense: bool = False
    rules: dict[str, Any] = field(default_factory=dict)  # of access; of no concern to the memory


@dataclass
class Manifest:
    """What is in a directory.

    `swap`: the swap areas that its devices have files in, in their order; `remote`: where they may have images.
    """

    secret: bytes = field(default_factory=lambda: secrets.token_bytes(SECRET_BYTES))
    swap: list[Path] = field(default_factory=list)
    devices: dict[UUID, StoredDevice] = field(default_factory=dict)
    leftovers: set[UUID] = field(default_factory=set)
    remote: str = ""
    found_format: int = FORMAT  # of what was read; it is written as FORMAT

    def to_json(self) -> str:
        body = {
            "program": "nbdram",
            "format": FORMAT,
            "geometry": _GEOMETRY,
            "secret": self.secret.hex(),
            "swap": [str(path) for path in self.swap],
            "remote": self.remote,
            "devices": [asdict(device) | {"identity": str(device.identity)} for device in self.devices.values()],
            "leftovers": sorted(map(str, self.leftovers)),
        }
        return json.dumps(body | {"checksum": _checksum(body)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: bytes, path: Path) -> "Manifest":
        """NbdramError if it is not what `to_json` wrote."""
        try:
            body: Any = json.loads(text)
            program, version = body["program"], body["format"]
        except (ValueError, KeyError, TypeError):
            raise NbdramError(
                f"{path} is damaged or not ours: put it back from a copy, or remove {path.parent}"
            ) from None
        if program == "nbdram" and isinstance(version, int) and version > FORMAT:
            raise NbdramError(
                f"{path} was written by a newer nbdram (format {version}, this one knows {FORMAT}): "
                "use that one, nothing was changed"
            )
        try:
            if body.pop("checksum") != _checksum(body) or program != "nbdram" or version not in _READABLE:
                raise ValueError
            if body["geometry"] != _GEOMETRY:
                raise ValueError
            devices = [StoredDevice(**entry | {"identity": UUID(entry["identity"])}) for entry in body["devices"]]
            return cls(
                bytes.fromhex(body["secret"]),
                [Path(path) for path in body["swap"]],
                {device.identity: device for device in devices},
                {UUID(text) for text in body["leftovers"]},
                body.get("remote", ""),
                version,
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise NbdramError(f"{path} is damaged: put it back from a copy, or remove {path.parent}") from None


def _checksum(body: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(body, sort_keys=True).encode())


class StateDirectory:
    """An open, locked state directory."""

    def __init__(self, path: Path, *, make: bool = True) -> None:
        """Open it, or make it; with `make` false it must exist. NbdramError if it can't be used."""
        self.path = path
        if make:
            if os.path.isfile(path):
                raise NbdramError(f"can't use {path}: it is not a directory, name one on tmpfs")
            _or_complain(path, lambda: path.mkdir(mode=0o700, exist_ok=True))
        self._fd = _or_complain(path, lambda: os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        try:
            lock_patiently(self._fd, f"{path} is in use by another server: stop it or choose another directory")
            self.manifest, is_new = self._read(make)
            self._check_files()
            if is_new:
                self.save()
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def lock_fd(self) -> int:
        """The descriptor by which the directory is locked: whoever has it too keeps it locked."""
        return self._fd

    def close(self) -> None:
        """Let others have it."""
        os.close(self._fd)

    def room_bytes(self) -> int:
        """How much memory the file system lets our devices have: what they have already, and what is free."""
        status = os.statvfs(self._fd)
        files = [self.file(identity, kind) for identity in self.manifest.devices for kind in _KINDS]
        ours = sum(file.stat().st_blocks * 512 for file in files if file.exists())
        return ours + status.f_bavail * status.f_frsize

    def _read(self, make: bool) -> tuple[Manifest, bool]:
        path = self.path / MANIFEST
        try:
            return Manifest.from_json(path.read_bytes(), path), False
        except FileNotFoundError:
            foreign = sorted(set(os.listdir(self.path)) - {_NEW_MANIFEST})
            if not make:
                raise NbdramError(f"{path} is missing: {self.path} is not a state directory") from None
            if foreign:
                raise NbdramError(
                    f"{path} is missing, but {self.path} is not empty (there is {foreign[0]}): "
                    "choose an empty directory, or one that nbdram has made"
                ) from None
            return Manifest(), True
        except OSError as error:
            raise NbdramError(f"can't read {path}: {error.strerror}") from error

    def _check_files(self) -> None:
        for device in self.manifest.devices.values():
            if not (0 < device.size <= MAX_DEVICE_BYTES) or device.size % PAGE:
                raise NbdramError(f"{self.path / MANIFEST} is damaged: {device.name!r} can't have {device.size} bytes")
            for kind, length in file_lengths(device.size).items():
                path = self.file(device.identity, kind)
                try:
                    found = os.stat(path, follow_symlinks=False).st_size
                except OSError as error:
                    raise NbdramError(
                        f"can't use {path}: {error.strerror}; put it back, nothing was changed"
                    ) from error
                if found < length:
                    raise NbdramError(
                        f"{path} is too short ({found} bytes, not {length}): put it back whole, nothing was changed"
                    )

    def save(self) -> None:
        """Write the manifest; a crash leaves the old one or the new one."""
        new = self.path / _NEW_MANIFEST

        def write() -> None:
            flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(new, flags, 0o600), "w") as file:
                file.write(self.manifest.to_json())
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self.path / MANIFEST)
            os.fsync(self._fd)

        _or_complain(new, write)

    # -- devices -----------------------------------------------------------------------------------

    def opener(self, identity: UUID, *, new: bool = False) -> OpenFile:
        """Opens a device's files, or makes them."""

        def open_file(kind: str, length: int) -> int:
            path = self.file(identity, kind)
            return _open(path, os.O_CREAT | os.O_EXCL, length) if new else _open(path)

        return open_file

    def begin(self, identity: UUID) -> None:
        """A device is going to be made: from here on its files are ours to remove, until it is put."""
        self.manifest.leftovers.add(identity)
        self.save()

    def put(self, device: StoredDevice) -> None:
        """Remember a device that is complete, or has changed."""
        if self.manifest.devices.get(device.identity) == device:
            return
        self.manifest.leftovers.discard(device.identity)
        self.manifest.devices[device.identity] = device
        self.save()

    def forget(self, identity: UUID) -> None:
        """A device is removed; its files go in `sweep`."""
        self.manifest.devices.pop(identity, None)
        self.begin(identity)

    def sweep(self, swap: Iterable[Path] = ()) -> None:
        """Remove the files of devices that are gone, or that were never finished; what there is has our format now."""
        if not self.manifest.leftovers and self.manifest.found_format == FORMAT:
            return
        areas = {*self.manifest.swap, *swap}
        for identity in self.manifest.leftovers:
            paths = [self.file(identity, kind) for kind in _KINDS]
            paths += [swap_file(area, identity) for area in areas]
            for path in paths:
                _or_complain(path, partial(path.unlink, missing_ok=True))
        self.manifest.leftovers.clear()
        self.manifest.found_format = FORMAT
        self.save()

    def use_swap(self, areas: list[Path]) -> None:
        """From now on devices have files in these areas, and in no others."""
        if areas == self.manifest.swap:
            return
        gone = [area for area in self.manifest.swap if area not in areas]
        self.manifest.swap = areas
        self.save()
        for area in gone:
            for identity in self.manifest.devices:
                with suppress(OSError):
                    swap_file(area, identity).unlink()

    def open_generations(self, identity: UUID) -> int:
        """The file of the images that a device has in a remote, made if there is none."""
        return _open(self.file(identity, _REMOTE), os.O_CREAT, GENERATIONS_BYTES)

    def has_generations(self, identity: UUID) -> bool:
        """Whether a device ever had images in a remote."""
        return self.file(identity, _REMOTE).exists()

    def check_generations(self, identity: UUID) -> None:
        """NbdramError if the file of images in a remote, which is needed, is not whole."""
        path = self.file(identity, _REMOTE)
        if not path.exists() or path.stat().st_size < GENERATIONS_BYTES:
            raise NbdramError(f"{path} is missing or too short, and there is data in a remote: put it back")

    def use_remote(self, url: str) -> None:
        """From now on devices may have images there."""
        if url != self.manifest.remote:
            self.manifest.remote = url
            self.save()

    def remove(self) -> None:
        """Free everything: all devices, the manifest, and the directory if nothing else is in it."""
        for identity in list(self.manifest.devices):
            self.manifest.devices.pop(identity)
            self.manifest.leftovers.add(identity)
        self.save()
        self.sweep()
        _or_complain(self.path, (self.path / MANIFEST).unlink)
        with suppress(OSError):
            self.path.rmdir()

    def file(self, identity: UUID, kind: str) -> Path:
        return self.path / f"{identity}.{kind}"


def _open(path: Path, how: int = 0, length: int = 0) -> int:
    """A file of a device, made as long as that if `length` is given."""
    fd = _or_complain(path, lambda: os.open(path, how | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    if length:
        try:
            _or_complain(path, lambda: os.ftruncate(fd, length))
        except BaseException:
            os.close(fd)
            raise
    return fd


def _or_complain(path: Path, work: Callable[[], T]) -> T:
    """Do something to a file; what the kernel says against it becomes a sentence."""
    try:
        return work()
    except OSError as error:
        raise NbdramError(f"can't use {path}: {error.strerror}") from error
