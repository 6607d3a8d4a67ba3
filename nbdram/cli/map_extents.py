"""nbdram map: which parts of an export are allocated."""

import argparse
import json

from nbdram.client.session import Session
from nbdram.config import format_size, parse_nbd_uri
from nbdram.errors import NbdramError
from nbdram.protocol.wire import BASE_ALLOCATION, STATE_HOLE


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("map", help="show which parts of an export are allocated")
    parser.add_argument("uri", metavar="URI", help="nbd://HOST/NAME or nbd+unix:///NAME?socket=PATH")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    endpoint, name = parse_nbd_uri(arguments.uri)
    with Session(endpoint) as session:
        export = session.open(name, (BASE_ALLOCATION,))
        if BASE_ALLOCATION not in session.contexts.values():
            raise NbdramError(f"the server can't tell what is allocated: it has no {BASE_ALLOCATION}")
        extents = list(session.map_extents(BASE_ALLOCATION, export.size))
        session.disconnect()
    if arguments.json:
        rows = [{"offset": o, "length": n, "hole": bool(f & STATE_HOLE)} for o, n, f in extents]
        print(json.dumps(rows))
        return 0
    data = 0
    print(f"{'offset':>18} {'length':>18}")
    for offset, length, flags in extents:
        if not flags & STATE_HOLE:
            data += length
            print(f"{offset:>18} {length:>18}")
    print(f"{format_size(data)} allocated of {format_size(export.size)}")
    return 0
