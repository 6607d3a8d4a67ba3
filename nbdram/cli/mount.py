"""nbdram mount: a file system in RAM, in one command: server, device, file system, mount."""

import argparse
import grp
import logging
import os
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nbdram.cli import attach
from nbdram.client import sysfs
from nbdram.client.capability import need_sys_admin
from nbdram.client.mount_notes import MountNote, all_notes, check_mount_name, name_for
from nbdram.config import (
    MIN_MEMORY,
    SwapSettings,
    absolute_uri,
    check_size,
    format_size,
    limited_memory,
    parse_metrics,
    parse_size,
)
from nbdram.errors import NbdramError, UsageError

if TYPE_CHECKING:
    from nbdram.client.mounting import Wanted


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("mount", help="mount a file system in RAM, or an export of any NBD server")
    parser.add_argument("what", metavar="SIZE|URI", nargs="?", help="as in 64G, or nbd://HOST/NAME; nothing: list them")
    parser.add_argument("point", metavar="DIR", nargs="?", type=Path, help="where: an empty directory")
    parser.add_argument("--name", help="what it is called (default: made of DIR)")
    parser.add_argument(
        "--fs", default="", metavar="KIND", help="ext4, xfs or btrfs (default: what is there, else ext4)"
    )
    parser.add_argument("--journal", action="store_true", help="make ext4 with a journal")
    parser.add_argument(
        "-o", "--options", default="", metavar="OPTIONS", help="more options for the mount, as in nosuid"
    )
    parser.add_argument("--memory", metavar="SIZE", help="RAM that it may take (default: half of what is available)")
    parser.add_argument(
        "--swap", action="append", metavar="disk:PATH[,max=SIZE]", help="where cold data goes from there"
    )
    parser.add_argument("--uid", help="owner of its root, a name or number (default: DIR's)")
    parser.add_argument("--gid", help="group of its root (default: DIR's)")
    parser.add_argument("--mode", help="permissions of its root, as in 1777 (default: DIR's)")
    parser.add_argument("--keep", action="store_true", help="the data stays in RAM when it is unmounted")
    parser.add_argument("--nonempty", action="store_true", help="hide what is in DIR")
    parser.add_argument("--device", metavar="/dev/nbdX", help="which device (default: one that is free)")
    parser.add_argument("--metrics", default="off", metavar="ADDRESS:PORT", help="where its server serves metrics")
    attach.add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.what is None:
        return _list()
    if arguments.point is None:
        raise UsageError("say what to mount, and where: nbdram mount 64G DIR")
    logging.basicConfig(format="nbdram: %(message)s")
    wanted = _wanted(arguments)
    need_sys_admin("mounting a file system")
    from nbdram.client.mounting import mount

    try:
        note = mount(wanted)
    except OSError as error:
        raise NbdramError(f"mounting at {wanted.point} failed: {error.strerror or error}") from error
    print(_sentence(note, wanted.memory))
    return 0


def _wanted(arguments: argparse.Namespace) -> "Wanted":
    """What is asked for, as far as that can be checked without doing anything."""
    from nbdram.client.filesystems import FILE_SYSTEMS, cannot_make
    from nbdram.client.mounting import Wanted, check_point

    point = Path(os.path.realpath(arguments.point))
    is_uri = "://" in arguments.what
    uri = absolute_uri(arguments.what) if is_uri else ""
    kind = arguments.fs
    if kind and kind not in FILE_SYSTEMS and not is_uri:
        raise UsageError(cannot_make(kind))
    if arguments.journal and kind not in ("", "ext4"):
        raise UsageError(f"--journal is for ext4: {kind} always has its own")
    if is_uri and (arguments.memory or arguments.swap or arguments.keep):
        raise UsageError("--memory, --swap and --keep are for a SIZE: the server of a URI decides for itself")
    parse_metrics(arguments.metrics)
    size = 0 if is_uri else check_size(parse_size(arguments.what))
    check_point(point, nonempty=arguments.nonempty)
    return Wanted(
        point=point,
        name=check_mount_name(arguments.name) if arguments.name else name_for(point),
        size=size,
        memory=0 if is_uri else _memory(arguments.memory),
        uri=uri,
        kind=kind,
        journal=arguments.journal,
        options=arguments.options,
        uid=_id(arguments.uid, "user", lambda name: pwd.getpwnam(name).pw_uid),
        gid=_id(arguments.gid, "group", lambda name: grp.getgrnam(name).gr_gid),
        mode=_mode(arguments.mode),
        keep=arguments.keep,
        nonempty=arguments.nonempty,
        index=sysfs.index_of(arguments.device) if arguments.device else -1,
        swap=tuple(SwapSettings.parse(text) for text in arguments.swap or ()),
        metrics=arguments.metrics,
        attach=attach.settings_of(arguments),
    )


def _memory(text: str | None) -> int:
    from nbdram.memory.available import default_budget

    try:
        memory = parse_size(text) if text else default_budget()
    except UsageError as error:
        raise UsageError(f"--memory {error}") from None
    if memory < MIN_MEMORY:
        raise UsageError(f"--memory must be at least {format_size(MIN_MEMORY)}: the server itself needs half of it")
    return limited_memory(memory)


def _id(text: str | None, what: str, look_up: Callable[[str], int]) -> int | None:
    if text is None:
        return None
    if text.isdecimal() and int(text) < (1 << 32) - 1:
        return int(text)
    try:
        return look_up(text)
    except KeyError:
        raise UsageError(f"there is no {what} called {text!r}") from None


def _mode(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o7777:
        raise UsageError(f"--mode {text!r}: write permissions in octal, as in 1777")
    return mode


def _sentence(note: MountNote, memory: int) -> str:
    what = f"{note.point} is {format_size(note.size)} of {note.kind} on {note.device}"
    if note.server:
        return f"{what}, in at most {format_size(memory)} of RAM"
    return f"{what}, which is {note.uri}"


def _list() -> int:
    for note in all_notes():
        print(f"{note.point:24} {format_size(note.size):>10} {note.kind:6} {note.device or 'kept':12} {note.name}")
    return 0
