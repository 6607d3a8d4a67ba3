"""The `nbdram` command: one module per subcommand; each has `add(subparsers)` and `run(arguments)`."""

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence

from nbdram import __version__
from nbdram.cli.parser import Parser
from nbdram.errors import NbdramError, UsageError

# The module of each command. Only the one that is asked for is imported: `attach` needs no server, `serve` no netlink.
_COMMANDS = {
    "serve": "serve",
    "health": "health",
    "stats": "stats",
    "exports": "exports",
    "create": "create",
    "resize": "resize",
    "rm": "rm",
    "check": "check",
    "gc-remote": "gc_remote",
    "config": "config",
    "reload": "reload",
    "top": "top",
    "list": "list_exports",
    "info": "info",
    "map": "map_extents",
    "mount": "mount",
    "umount": "umount",
    "attach": "attach",
    "detach": "detach",
    "keeper": "keeper",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 1 on failure, 2 for a mistake in what was asked."""
    try:
        parsed = _parse(sys.argv[1:] if arguments is None else list(arguments))
        code: int = parsed.run(parsed)
        sys.stdout.flush()
    except UsageError as error:
        print(f"nbdram: {error}", file=sys.stderr)
        return 2
    except NbdramError as error:
        print(f"nbdram: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            print("nbdram: too many open files: allow this process more of them (ulimit -n)", file=sys.stderr)
            return 1
        if not isinstance(error, BrokenPipeError):
            raise
        # The reader of our output has seen enough: nothing more is to be flushed into it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return code


def _parse(words: list[str]) -> argparse.Namespace:
    """What was asked for; whoever asks for what there is not is told so, and sent away with 2."""
    parser: argparse.ArgumentParser = Parser(prog="nbdram", description="NBD devices that live in RAM.")
    parser.add_argument("--version", action="version", version=f"nbdram {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    modules = [_COMMANDS[words[0]]] if words and words[0] in _COMMANDS else _COMMANDS.values()
    for module in modules:
        importlib.import_module(f"nbdram.cli.{module}").add(commands)
    parsed, unknown = parser.parse_known_args(words)
    if unknown:
        command = f"nbdram {words[0]}" if words[0] in _COMMANDS else "nbdram"
        Parser(prog=command).error(f"unrecognized arguments: {' '.join(unknown)}")
    return parsed
