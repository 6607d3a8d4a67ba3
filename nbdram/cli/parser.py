"""A command line that is not understood gets one sentence, and where all options are told."""

import argparse
import os
import sys
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Its subcommands have parsers of this kind too."""

    def __init__(self, **others: Any) -> None:
        super().__init__(formatter_class=_Formatter, **others)

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; all that it takes: `{self.prog} --help`", file=sys.stderr)
        sys.exit(2)


class _Formatter(argparse.HelpFormatter):
    """One is made for each option, and would have shutil tell the width, which takes 0.3 MiB with what that loads."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_columns() - 2)


def _columns() -> int:
    """The width of the terminal, as shutil tells it."""
    try:
        return int(os.environ.get("COLUMNS", 0)) or os.get_terminal_size().columns or 80
    except (OSError, ValueError):
        return 80
