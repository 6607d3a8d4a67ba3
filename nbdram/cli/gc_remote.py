"""nbdram gc-remote: whose cold data is in a Redis or Valkey cluster, and the removal of what is nobody's any more."""

import argparse
import sys
import time
from contextlib import closing
from uuid import UUID

from nbdram.config import format_size
from nbdram.config_remote import parse_remote
from nbdram.errors import UsageError


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("gc-remote", help="list and remove what servers have left in a remote")
    parser.add_argument("url", metavar="URL", help="as in --swap: redis://HOST:PORT[,HOST:PORT...]")
    parser.add_argument("--remove", action="store_true", help="remove what belongs to no device any more")
    parser.add_argument(
        "--device",
        metavar="UUID",
        type=_uuid,
        action="append",
        help="with --remove: all that this device has, although it may still be needed; may be given more than once",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from nbdram.memory.tiers.orphans import Orphans  # the library takes its time

    if arguments.device and not arguments.remove:
        raise UsageError("--device is for --remove: without it everything is listed")
    with closing(Orphans(parse_remote(arguments.url, "gc-remote"))) as orphans:
        found = orphans.survey()
        if not arguments.remove:
            print(f"{'device':38}{'images':>10}{'stored':>12}  whose")
            for holding in found:
                size = format_size(holding.stored_bytes)
                print(f"{holding.identity!s:38}{holding.images:>10}{size:>12}  {_whose(holding.record)}")
            return 0
        devices = arguments.device or []
        wanted = [holding for holding in found if holding.identity in devices]
        if devices and not wanted:
            print(f"nbdram: there is nothing of {', '.join(map(str, devices))}", file=sys.stderr)
            return 1
        leftovers = wanted or [holding for holding in found if holding.record is None]
        if not leftovers:
            print("nothing is left over")
        for holding in leftovers:
            print(f"removed {orphans.remove(holding.identity)} images of {holding.identity}")
    return 0


def _whose(record: dict[str, object] | None) -> str:
    if record is None:
        return "nobody's"
    seen = time.strftime("%Y-%m-%d %H:%M", time.localtime(int(str(record["seen"]))))
    kept = ", in a state directory" if record["kept"] else ""
    return f"{record['export']!r} on {record['host']}{kept}, seen {seen}"


def _uuid(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a UUID") from None
