"""The commands of nbdram, as its own parsers know them."""

import argparse
import importlib
import re

from nbdram import cli
from nbdram.errors import NbdramError


def parsers() -> dict[str, argparse.ArgumentParser]:
    """One for each command."""
    commands = argparse.ArgumentParser(exit_on_error=False).add_subparsers()
    for module in cli._COMMANDS.values():
        importlib.import_module(f"nbdram.cli.{module}").add(commands)
    return dict(commands.choices)


def flags() -> dict[str, set[str]]:
    """The options of each command."""
    return {
        name: set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", parser.format_help())) for name, parser in parsers().items()
    }


def understood(words: list[str]) -> argparse.Namespace:
    """What is asked for by the words after `nbdram`; an AssertionError if it makes no sense."""
    command, *arguments = words
    try:
        return parsers()[command].parse_args(arguments)
    except (SystemExit, NbdramError) as error:
        raise AssertionError(f"nbdram {' '.join(words)}: {error}") from error
