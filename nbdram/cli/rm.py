"""nbdram rm: remove an export of a running server, or free a state directory that no server uses. Data is gone."""

import argparse
import sys
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from nbdram.cli.exports import add_control
from nbdram.cli.remote_of import add_swap, remote_of
from nbdram.errors import NbdramError
from nbdram.memory.statedir import StateDirectory
from nbdram.observe.control import ask


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("rm", help="remove an export, or a state directory, with all data")
    parser.add_argument("what", metavar="NAME|DIR", help="an export's name; with a slash in it, a state directory")
    parser.add_argument("--force", action="store_true", help="hang up on those who use the export")
    add_swap(parser)
    add_control(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if "/" in arguments.what:
        _remove_directory(Path(arguments.what), arguments.swap)
        return 0
    force = "?force" if arguments.force else ""
    ask(arguments.control, f"exports/{quote(arguments.what, safe='')}{force}", "DELETE")
    print(f"removed {arguments.what}")
    return 0


def _remove_directory(path: Path, swap: str | None) -> None:
    with closing(StateDirectory(path, make=False)) as state:
        count = len(state.manifest.devices)
        left = _remove_from_remote(state, swap)
        state.remove()
    print(f"removed {path} with {count} export{'s' * (count != 1)}")
    if left:
        print(f"nbdram: {left}", file=sys.stderr)


def _remove_from_remote(state: StateDirectory, swap: str | None) -> str:
    """What the devices have there; a sentence if it must stay."""
    settings = remote_of(state, swap)
    devices = [identity for identity in state.manifest.devices if state.has_generations(identity)]
    if settings is None or not devices:
        return ""
    from nbdram.memory.tiers.orphans import Orphans  # the library takes its time

    try:
        with closing(Orphans(settings)) as orphans:
            for identity in devices:
                orphans.remove(identity)
    except NbdramError as error:
        options = " ".join(f"--device {identity}" for identity in devices)
        return f"{error}; what is left there goes with: nbdram gc-remote {settings} --remove {options}"
    return ""
