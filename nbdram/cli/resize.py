"""nbdram resize: change the maximum of an export, while clients use it, and the file system on it."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nbdram.cli.exports import add_control
from nbdram.config import check_size, format_size, parse_size
from nbdram.errors import NbdramError
from nbdram.observe.control import ask, default_path


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("resize", help="change the maximum of an export while it is in use")
    parser.add_argument("name", metavar="NAME|DIR", help="an export, or where `nbdram mount` has mounted one")
    parser.add_argument("size", metavar="SIZE", help="the new maximum, as in 64G")
    parser.add_argument("--shrink", action="store_true", help="allow a smaller one, above all data")
    parser.add_argument("--grow-fs", action="store_true", help="let the file system that is mounted have it all")
    add_control(parser)
    parser.set_defaults(control=None)  # given, it is a server's, not a mount's
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from nbdram.client.mount_notes import Place, note_of

    size = check_size(parse_size(arguments.size))
    name, control = arguments.name, arguments.control or default_path()
    note = None if arguments.control else note_of(name)
    if note and note.server:
        name, control = note.name, Place(note.name).control
    elif Path(name).is_absolute() and not arguments.control:
        raise NbdramError(f"no server of this host has mounted anything at {name}: see `nbdram mount`")
    resized = resize(control, name, size, shrink=arguments.shrink)
    if note and note.server:
        Place(note.name).write(replace(note, size=size))
    print(f"{resized['name']} has {format_size(resized['size'])} now")
    if not arguments.grow_fs:
        return 0
    from nbdram.client import growing
    from nbdram.client.capability import need_sys_admin

    need_sys_admin("growing a file system")
    for point in growing.grow_file_systems(growing.tell_kernel(resized["identity"], size)):
        print(f"the file system at {point} has grown")
    return 0


def resize(control: Path, name: str, size: int, *, shrink: bool = False) -> dict[str, Any]:
    """Ask the server for a new maximum of an export; what it is now. A keeper that holds it tells the kernel."""
    return ask(control, f"exports/{quote(name, safe='')}/resize", "POST", {"size": size, "shrink": shrink})
