"""nbdram detach: take a device from the kernel that `nbdram attach` made."""

import argparse
import errno
import os

from nbdram.client import sysfs
from nbdram.client.ask_keeper import ask
from nbdram.client.attachment import default_directory
from nbdram.client.capability import need_sys_admin
from nbdram.errors import NbdramError


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("detach", help="detach a device that was attached")
    parser.add_argument("device", metavar="/dev/nbdX")
    parser.add_argument(
        "--force", action="store_true", help="even if it is in use or its server is gone: I/O on it fails"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    index = sysfs.index_of(arguments.device)
    need_sys_admin("detaching a device")
    detach(index, force=arguments.force)
    return 0


def detach(index: int, *, force: bool = False) -> None:
    """Write what is cached, and detach. NbdramError if the device is in use or its server is gone, without `force`."""
    path = sysfs.path_of(index)
    directory = default_directory()
    if not sysfs.is_connected(index):
        raise NbdramError(f"{path} is not attached")
    for device in ask(directory, "status")["devices"]:
        if device["device"] == str(path) and device["state"] != "connected" and not force:
            raise NbdramError(
                f"{path} has no server now ({device['trouble']}): bring it back, or use --force to lose data"
            )
    if not force:
        try:
            descriptor = sysfs.open_exclusively(index)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise NbdramError(f"{path} is in use: unmount it first") from error
            raise NbdramError(f"can't open {path}: {error.strerror}") from error
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    ask(directory, "detach", index=index)
