"""What the kernel has mounted, and which processes keep it busy."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
_MAX_NAMED: Final = 5


@dataclass(frozen=True)
class Mounted:
    """A line of /proc/self/mountinfo."""

    source: str
    point: Path
    kind: str
    device: int


def mounts() -> list[Mounted]:
    """Everything that is mounted, in the order in which it was."""
    found = []
    for line in os.fsdecode((_PROC / "self/mountinfo").read_bytes()).splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, source) = before.split(" "), after.split(" ")[:2]
        major, minor = map(int, fields[2].split(":"))
        found.append(Mounted(_plain(source), Path(_plain(fields[4])), kind, os.makedev(major, minor)))
    return found


def mounted_at(point: Path) -> Mounted | None:
    """What one sees at a mount point; None if it is none."""
    return next((mount for mount in reversed(mounts()) if mount.point == point), None)


def users_of(mount: Mounted) -> str:
    """Who keeps it busy, as in `bash (process 12), vim (process 40)`; "" if nobody can be found."""
    below = [other.point for other in mounts() if mount.point in other.point.parents]
    if below:
        return f"what is mounted at {below[0]}"
    named = [f"{_name(process)} (process {process.name})" for process in processes_on(mount.device)]
    more = f" and {len(named) - _MAX_NAMED} more" if len(named) > _MAX_NAMED else ""
    return ", ".join(named[:_MAX_NAMED]) + more


def processes_on(device: int) -> Iterator[Path]:
    """Those that have a file of the device open or mapped, run a program of it, or stand in one of its directories."""
    for process in _PROC.iterdir():
        if not process.name.isdigit():
            continue
        held = [process / "cwd", process / "root", process / "exe"]
        with suppress(OSError):
            held += (process / "fd").iterdir()
        if any(_is_on(path, device) for path in held) or device in _mapped(process):
            yield process


def _is_on(path: Path, device: int) -> bool:
    try:
        return path.stat().st_dev == device
    except OSError:
        return False


def _mapped(process: Path) -> set[int]:
    with suppress(OSError):
        pairs = re.findall(rb"^\S+ \S+ \S+ ([0-9a-f]+):([0-9a-f]+) ", (process / "maps").read_bytes(), re.MULTILINE)
        return {os.makedev(int(major, 16), int(minor, 16)) for major, minor in pairs}
    return set()


def _name(process: Path) -> str:
    try:
        return (process / "comm").read_text().strip()
    except OSError:
        return "somebody"


def _plain(text: str) -> str:
    r"""A field without the kernel's escapes, as \040 for a space."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
