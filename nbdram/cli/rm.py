"""nbdram rm: remove an export of a running server, or free a state directory that no server uses. Data is gone."""

import argparse
from pathlib import Path
from urllib.parse import quote

from nbdram.cli.exports import add_control
from nbdram.memory.statedir import StateDirectory
from nbdram.observe.control import ask


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("rm", help="remove an export, or a state directory, with all data")
    parser.add_argument("what", metavar="NAME|DIR", help="an export's name; with a slash in it, a state directory")
    parser.add_argument("--force", action="store_true", help="hang up on those who use the export")
    add_control(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if "/" in arguments.what:
        state = StateDirectory(Path(arguments.what), make=False)
        count = len(state.manifest.devices)
        state.remove()
        state.close()
        print(f"removed {arguments.what} with {count} exports")
        return 0
    force = "?force" if arguments.force else ""
    ask(arguments.control, f"exports/{quote(arguments.what, safe='')}{force}", "DELETE")
    print(f"removed {arguments.what}")
    return 0
