"""What a keeper knows of a device, and where it writes that down so that the next keeper can go on."""

import json
import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Final

from nbdram.client import sysfs
from nbdram.config import parse_nbd_uri, runtime_directory
from nbdram.errors import NbdramError

_PREFIX: Final = "nbdram:"  # of the backend identifier in the kernel, before the URI


@dataclass(frozen=True)
class Attachment:
    """An export and the kernel's device of it. `index` is -1 before the kernel has chosen one.

    `flags` are the transmission flags, 0 if unknown; `identity` is "" if the server tells none. `retry_after_ms`
    is how long a request may go unanswered before the kernel looks whether its socket was replaced, 0 to leave that
    to the keeper. `server` is the command that starts the server, for one that the keeper shall start again.
    """

    uri: str
    index: int = -1
    connections: int = 1
    size: int = 0
    flags: int = 0
    block_size: int = 4096
    identity: str = ""
    dead_timeout_s: int = 600
    retry_after_ms: int = 0
    server: list[str] = field(default_factory=list)

    @property
    def identifier(self) -> str:
        return _PREFIX + self.uri


def default_directory() -> Path:
    """Where the keeper has its socket and its notes: on a tmpfs, so that writing there never waits for a device."""
    return runtime_directory() / "nbdram"


class Notes:
    """A small file for each device that is kept: nbdN.json."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def write(self, attachment: Attachment) -> None:
        path = self._path(attachment.index)
        draft = path.with_suffix(".new")
        draft.write_text(json.dumps(asdict(attachment)))
        os.replace(draft, path)

    def remove(self, index: int) -> None:
        self._path(index).unlink(missing_ok=True)

    def find(self) -> list[Attachment]:
        """The devices to go on with: those noted that the kernel still has, and those that bear our identifier."""
        found = []
        for index in sysfs.connected():
            identifier = sysfs.identifier_of(index)
            noted = self._read(index)
            if noted and identifier in ("", noted.identifier):
                found.append(replace(noted, size=sysfs.size_of(index)))
            elif identifier.startswith(_PREFIX) and _is_uri(uri := identifier.removeprefix(_PREFIX)):
                found.append(Attachment(uri, index, size=sysfs.size_of(index)))
        return found

    def _path(self, index: int) -> Path:
        return self._directory / f"nbd{index}.json"

    def _read(self, index: int) -> Attachment | None:
        try:
            known = json.loads(self._path(index).read_text())
            return Attachment(**{item.name: known[item.name] for item in fields(Attachment)})
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _is_uri(text: str) -> bool:
    try:
        parse_nbd_uri(text)
    except NbdramError:
        return False
    return True
