"""mount.nbdram: what mount(8), and with it /etc/fstab and systemd, calls if it is in /sbin.

scratch          /scratch  nbdram  size=64g,mode=1777  0 0
nbd://host/data  /data     nbdram  connections=4       0 0
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Final

from nbdram.cli import main
from nbdram.cli.parser import Parser
from nbdram.client.mount_notes import note_of

# Options that are ours, of which `keep` and the like have no value; all others are the kernel's.
_WITH_VALUE: Final = (
    *("name", "fs", "memory", "swap", "uid", "gid", "mode", "device", "metrics"),
    *("connections", "block-size", "dead-timeout", "retry-after"),
)
_FLAGS: Final = ("journal", "keep", "nonempty")
# What is for those who read /etc/fstab.
_FOR_OTHERS: Final = ("defaults", "auto", "noauto", "user", "users", "owner", "group", "nofail", "_netdev")
_WRONG_CALL, _MOUNT_FAILED = 1, 32  # mount(8) says which exit codes mean what


def mount(arguments: Sequence[str] | None = None) -> int:
    """mount.nbdram NAME|URI DIR [-sfnv] [-o OPTIONS]"""
    parser = Parser(prog="mount.nbdram", description="`nbdram mount` for mount(8) and /etc/fstab.")
    parser.add_argument("source", metavar="NAME|URI")
    parser.add_argument("point", metavar="DIR")
    parser.add_argument("-o", dest="options", default="", help="size=64g, and what `nbdram mount` knows")
    parser.add_argument("-f", dest="fake", action="store_true", help="do nothing")
    parser.add_argument("-t", dest="kind", help=argparse.SUPPRESS)
    parser.add_argument("-s", "-n", "-v", dest="ignored", action="store_true", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    source = _as_written(parsed.source)
    words = translate(source, parsed.point, parsed.options)
    if _is_there(source, parsed.point):  # `mount -a` calls for it each time: the kernel knows a device, not the name
        print(f"mount.nbdram: {source} is mounted at {parsed.point} already", file=sys.stderr)
        return 0
    return 0 if parsed.fake else _exit_code(main(words))


def _as_written(source: str) -> str:
    """mount(8) makes a path of a name if there is a file of that name where it is called: /scratch of scratch, in /."""
    directory, name = os.path.split(source)
    return name if os.path.isabs(source) and directory == os.getcwd() else source


def _is_there(source: str, point: str) -> bool:
    note = note_of(point)
    if note is None or note.point != os.path.realpath(point) or not note.is_mounted:
        return False
    return source == note.uri if "://" in source else bool(note.server) and source in ("none", "nbdram", note.name)


def translate(source: str, point: str, options: str) -> list[str]:
    """The arguments of `nbdram mount` that mean the same."""
    size, ours, kernels = "", [], []
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if key == "size":
            size = value
        elif key in _WITH_VALUE:
            ours.append(f"--{key}={value}")
        elif key in _FLAGS:
            ours.append(f"--{key}")
        elif key not in _FOR_OTHERS and not key.startswith(("x-", "comment")):
            kernels.append(option)
    is_uri = "://" in source
    if not is_uri and source not in ("none", "nbdram"):
        ours.append(f"--name={source}")
    if kernels:
        ours.append(f"--options={','.join(kernels)}")
    if not is_uri and not size:
        print("mount.nbdram: say how large it is, as in -o size=64g", file=sys.stderr)
        raise SystemExit(_WRONG_CALL)
    return ["mount", *ours, "--", source if is_uri else size, point]


def _exit_code(code: int) -> int:
    return {0: 0, 2: _WRONG_CALL}.get(code, _MOUNT_FAILED)
