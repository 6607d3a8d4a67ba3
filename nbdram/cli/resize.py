"""nbdram resize: change the maximum of an export, while clients use it."""

import argparse
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nbdram.cli.exports import add_control
from nbdram.config import check_size, format_size, parse_size
from nbdram.observe.control import ask


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("resize", help="change the maximum of an export while it is in use")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("size", metavar="SIZE", help="the new maximum, as in 64G")
    parser.add_argument("--shrink", action="store_true", help="allow a smaller one, above all data")
    add_control(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    size = check_size(parse_size(arguments.size))
    resized = resize(arguments.control, arguments.name, size, shrink=arguments.shrink)
    print(f"{resized['name']} has {format_size(resized['size'])} now")
    return 0


def resize(control: Path, name: str, size: int, *, shrink: bool = False) -> dict[str, Any]:
    """Ask the server for a new maximum of an export; what it is now. A keeper that holds it tells the kernel."""
    return ask(control, f"exports/{quote(name, safe='')}/resize", "POST", {"size": size, "shrink": shrink})
