"""nbdram create: add an export to a running server."""

import argparse
from typing import Final

from nbdram.cli.exports import add_control
from nbdram.config import ExportSettings, format_size
from nbdram.errors import UsageError
from nbdram.observe.control import ask

OPTIONS: Final = (
    "ro; density, cold data takes a sixth less RAM, and longer to read and to compress; who may use it, each as often "
    "as needed: network=10.0.0.0/8, user=NAME, group=NAME, certificate=NAME; caps in a second: iops=5000, "
    "bandwidth=100M; and last, description=TEXT"
)


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("create", help="add an export to a running server")
    parser.add_argument("export", metavar="NAME=MAXSIZE[,OPTION]...", help=f"as in scratch=16G; options: {OPTIONS}")
    parser.add_argument("more", nargs="*", default=[], help=argparse.SUPPRESS)
    add_control(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.more:
        raise UsageError(f"write it in one word, as in {arguments.export}={arguments.more[0]}")
    wanted = ExportSettings.parse(arguments.export, before="")
    fields = {
        "name": wanted.name,
        "size": wanted.size,
        "read_only": wanted.read_only,
        "description": wanted.description,
        "density": wanted.dense,
        **wanted.rules.plain(),
    }
    made = ask(arguments.control, "exports", "POST", fields)
    print(f"made {made['name']}: {format_size(made['size'])}")
    return 0
