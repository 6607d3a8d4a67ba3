"""nbdram umount: unmount what `nbdram mount` has mounted, detach, and give the memory back."""

import argparse
import os

from nbdram.client.capability import need_sys_admin
from nbdram.client.mount_notes import note_of
from nbdram.config import format_size
from nbdram.errors import NbdramError


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("umount", help="unmount, detach, and give the memory back")
    parser.add_argument("what", metavar="DIR|NAME")
    parser.add_argument("--free", action="store_true", help="give the memory back though it was mounted with --keep")
    parser.add_argument(
        "--force", action="store_true", help="even if its server is gone: then what was not written is lost"
    )
    parser.add_argument("--leftovers", action="store_true", help="only clear up after a plain umount(8)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    need_sys_admin("unmounting a file system")
    note = note_of(arguments.what)
    if note is None and arguments.leftovers:
        return 0
    if note is None:
        raise NbdramError(f"nbdram has mounted nothing at {os.path.realpath(arguments.what)}: see `nbdram mount`")
    from nbdram.client.unmounting import unmount

    os.chdir("/")  # called from within, at least this process is not in the way
    try:
        freed = unmount(note, free=arguments.free, force=arguments.force, leftovers=arguments.leftovers)
    except OSError as error:
        raise NbdramError(f"unmounting {note.point} failed: {error.strerror or error}") from error
    if note.keep and not arguments.free:
        print(f"{note.point} is unmounted; its data is kept: mount it again, or free it with --free")
    elif note.server:
        print(f"{note.point} is unmounted, {format_size(freed)} are free again")
    else:
        print(f"{note.point} is unmounted")
    return 0
