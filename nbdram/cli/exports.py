"""nbdram exports: the exports of a running server, as its control socket tells them."""

import argparse
import json
from pathlib import Path

from nbdram.config import format_size
from nbdram.observe.control import ask, default_path


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("exports", help="show the exports of a running server")
    add_control(parser)
    parser.add_argument("--json", action="store_true", help="everything, machine-readable")
    parser.set_defaults(run=run)


def add_control(parser: argparse.ArgumentParser) -> None:
    """The option that says which server is meant."""
    help_text = f"the server's control socket (default: {default_path()})"
    parser.add_argument("--control", metavar="PATH", type=Path, default=default_path(), help=help_text)


def run(arguments: argparse.Namespace) -> int:
    exports = ask(arguments.control, "exports")["exports"]
    if arguments.json:
        print(json.dumps(exports))
        return 0
    for export in exports:
        flags = [word for word, is_so in (("ro", export["read_only"]), ("density", export["density"])) if is_so]
        words = [*flags, f"{export['connections']} connections", export["description"]]
        print(f"{export['name']:24}{format_size(export['size']):>12}  {', '.join(filter(None, words))}")
    return 0
