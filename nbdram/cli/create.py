"""nbdram create: add an export to a running server."""

import argparse

from nbdram.cli.exports import add_control
from nbdram.config import ExportSettings, format_size
from nbdram.observe.control import ask


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("create", help="add an export to a running server")
    parser.add_argument(
        "export", metavar="NAME=MAXSIZE[,ro][,density][,description=TEXT]", help="as serve --export takes it"
    )
    add_control(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    wanted = ExportSettings.parse(arguments.export)
    fields = {
        "name": wanted.name,
        "size": wanted.size,
        "read_only": wanted.read_only,
        "description": wanted.description,
        "density": wanted.dense,
    }
    made = ask(arguments.control, "exports", "POST", fields)
    print(f"made {made['name']}: {format_size(made['size'])}")
    return 0
