"""`python -m tests.soak --minutes 60`: prints a report in Markdown; 1 if anything was wrong."""

import argparse
import tempfile
from pathlib import Path

import uvloop

from tests import program

from .running import soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between the steps of each client")
    parser.add_argument("--samples", type=Path, help="where all samples go, as CSV")
    arguments = parser.parse_args()
    if arguments.minutes <= 0:
        parser.error("--minutes must be above 0")
    if arguments.samples and not arguments.samples.absolute().parent.is_dir():
        parser.error(f"--samples {arguments.samples}: there is no such directory: make it first")
    with tempfile.TemporaryDirectory(prefix="nbdram-soak-") as directory:
        report = uvloop.run(soak(Path(directory), arguments.minutes * 60, arguments.pause, arguments.samples))
    print(report)
    return 0


if __name__ == "__main__":
    program.run(main)
