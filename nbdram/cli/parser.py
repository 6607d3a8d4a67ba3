"""A command line that is not understood gets one sentence, and where all options are told."""

import argparse
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Its subcommands have parsers of this kind too."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; all that it takes: `{self.prog} --help`", file=sys.stderr)
        sys.exit(2)
