"""nbdram config check: whether a configuration is in order, before a server is started with it or told to reload."""

import argparse
import os
from pathlib import Path

from nbdram.cli.serve import add_file
from nbdram.config import format_size
from nbdram.configuration.loader import DEFAULT_FILE, find_file, load
from nbdram.errors import UsageError


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("config", help="check a configuration")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    check = actions.add_parser("check", help="tell all mistakes in a file and in NBDRAM_* variables")
    add_file(check)
    check.add_argument("file", metavar="FILE", nargs="?", type=Path, help="the same as -c FILE")
    check.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    file = find_file(arguments.config or arguments.file, os.environ)
    if file is None and not any(name.startswith("NBDRAM_") for name in os.environ):
        raise UsageError(f"there is nothing to check: {DEFAULT_FILE} does not exist; name another file with -c FILE")
    settings = load(file, os.environ, {})
    names = ", ".join(export.name for export in settings.exports) or "none of its own"
    print(f"{file or 'the environment'} is in order")
    print(f"exports   {names}")
    print(f"memory    {format_size(settings.memory)}")
    print(f"listen    {' '.join(map(str, settings.listen))}")
    print(f"TLS       {'required' if settings.tls and settings.tls.required else 'offered' if settings.tls else 'no'}")
    return 0
