"""nbdram top: a live view of a running server."""

import argparse
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager

from nbdram.cli.exports import add_control
from nbdram.errors import NbdramError, UsageError
from nbdram.observe.control import ask

_FIRST_LOOK_S = 0.2
_COLUMNS_OF_A_FILE = 120  # or of a pipe


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("top", help="watch a running server: rates, latencies, memory, connections")
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="SECONDS", help="how often to look (default: %(default)g)"
    )
    parser.add_argument("--once", action="store_true", help="print one screen, and no more")
    add_control(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if not 0.1 <= arguments.interval <= 60:
        raise UsageError("--interval must be 0.1 to 60 seconds")
    try:
        from rich.console import Console
        from rich.live import Live

        from nbdram.observe.top import screen
    except ImportError:
        raise NbdramError("nbdram top draws with the library rich, which is not there: pip install rich") from None
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=_COLUMNS_OF_A_FILE)
    before = ask(arguments.control, "status")
    if arguments.once or not console.is_terminal:
        time.sleep(_FIRST_LOOK_S)
        console.print(screen(before, ask(arguments.control, "status")))
        return 0
    with _keys_at_once(), Live(console=console, screen=True, auto_refresh=False) as live:
        wait = _FIRST_LOOK_S
        while not _wants_to_leave(wait):
            now = ask(arguments.control, "status")
            live.update(screen(before, now, console.height), refresh=True)
            before, wait = now, arguments.interval
    return 0


@contextmanager
def _keys_at_once() -> Iterator[None]:
    """Keys arrive when they are pressed, and are not shown."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _wants_to_leave(seconds: float) -> bool:
    """Wait so long; True once q is pressed."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if not sys.stdin.isatty():
            time.sleep(left)
        elif select.select([sys.stdin], [], [], left)[0] and os.read(sys.stdin.fileno(), 1) in (b"q", b"Q"):
            return True
    return False
