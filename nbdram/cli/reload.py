"""nbdram reload: have a running server read its settings again, and say what came of it."""

import argparse

from nbdram.cli.exports import add_control
from nbdram.observe.control import ask


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("reload", help="have a running server read its settings and certificates again")
    parser.add_argument(
        "--remove", action="store_true", help="remove exports that have left the settings, though they have data"
    )
    add_control(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """0 if all settings are in force, 1 if some could not be applied or wait for a restart."""
    changes = ask(arguments.control, "reload", "POST", {"remove": arguments.remove})
    for told in changes["applied"]:
        print(told)
    for told in changes["kept"]:
        print(f"not changed: {told}")
    if changes["restart"]:
        print(f"needs a restart: {', '.join(changes['restart'])}")
    if not any(changes.values()):
        print("nothing has changed")
    return 1 if changes["kept"] or changes["restart"] else 0
