"""nbdram list: the exports of a server."""

import argparse
import json

from nbdram.client.session import Session
from nbdram.config import parse_nbd_uri
from nbdram.protocol import client_handshake as handshake


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("list", help="list the exports of a server")
    parser.add_argument("uri", metavar="URI", help="nbd://HOST or nbd+unix:///?socket=PATH")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    endpoint, _ = parse_nbd_uri(arguments.uri)
    with Session(endpoint) as session:
        exports = session.run(handshake.list_exports())
        session.run(handshake.abort())
    if arguments.json:
        print(json.dumps([{"name": e.name, "description": e.description} for e in exports]))
        return 0
    for export in exports:
        print(f"{export.name}\t{export.description}".rstrip())
    return 0
