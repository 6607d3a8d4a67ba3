"""`make chaos`: puts one fault after the other into a server under load, and prints a line for each; 1 if one did harm.

python -m tests.chaos [--only NAME] [--times N]
"""

import argparse
import tempfile
import traceback
from pathlib import Path

import uvloop

from tests import program

from .faults import FAULTS
from .world import HEAD


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--only", choices=FAULTS, metavar="NAME", action="append", help=", ".join(FAULTS))
    parser.add_argument("--times", type=float, default=1.0, help="how much longer than usual each fault lasts")
    arguments = parser.parse_args()
    if arguments.times <= 0:
        parser.error("--times must be above 0")
    failed = 0
    print(HEAD, flush=True)
    for name in arguments.only or FAULTS:
        fault = FAULTS[name]
        # Its state is on tmpfs, as it should be; and short, because of the names of sockets.
        with tempfile.TemporaryDirectory(prefix="chaos-", dir="/dev/shm") as directory:
            try:
                result = uvloop.run(fault.run(Path(directory), fault.seconds * arguments.times))
            except Exception:
                failed += 1
                traceback.print_exc()
                print(f"| {name} | FAILED |", flush=True)
            else:
                print(result.line(), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    program.run(main)
