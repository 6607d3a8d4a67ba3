"""nbdram keeper: keep attached devices connected, in the foreground (as a service)."""

import argparse
import importlib
import logging
import os
import signal
import time
from pathlib import Path

from nbdram.client.attachment import default_directory
from nbdram.client.log_file import Bounded
from nbdram.errors import NbdramError

_RESTART_S = 0.05


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("keeper", help="keep attached devices connected, in the foreground")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where its socket and notes are")
    parser.add_argument(
        "--until-idle",
        action="store_true",
        help="end when nothing is attached any more, and start again if killed: how `nbdram attach` starts it",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    form = "%(asctime)s %(name)s %(levelname)s: %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, handlers=[Bounded()])
    directory = arguments.directory or default_directory()
    if not arguments.until_idle:
        return _keep(directory, until_idle=False)
    # All that the keeper needs is loaded before: the next one is at work a few milliseconds after this one was killed.
    importlib.import_module("nbdram.client.keeper")
    while (pid := os.fork()) != 0:
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            return os.WEXITSTATUS(status)
        logging.getLogger("nbdram.keeper").warning("killed by signal %d: starting again", os.WTERMSIG(status))
        time.sleep(_RESTART_S)
    return _keep(directory, until_idle=True)


def _keep(directory: Path, *, until_idle: bool) -> int:
    from nbdram.client.keeper import Keeper  # brings netlink, which takes its time and which nobody else needs
    from nbdram.client.resident import stay_resident

    stay_resident()
    keeper = Keeper(directory)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: keeper.stop())
    try:
        keeper.run(until_idle=until_idle)
    except NbdramError as error:
        logging.getLogger("nbdram.keeper").error("%s", error)
        return 1
    return 0
