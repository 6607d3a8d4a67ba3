"""nbdram info: size, flags, block sizes and contexts of an export."""

import argparse
import json

from nbdram.client.session import Session
from nbdram.config import format_size, parse_nbd_uri
from nbdram.protocol import client_handshake as handshake
from nbdram.protocol.handshake import ReplyMode
from nbdram.protocol.wire import IDENTITY_CONTEXT, TransmissionFlag


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("info", help="show what an export offers")
    parser.add_argument("uri", metavar="URI", help="nbd://HOST/NAME or nbd+unix:///NAME?socket=PATH")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    endpoint, name = parse_nbd_uri(arguments.uri)
    modes = (ReplyMode.EXTENDED, ReplyMode.STRUCTURED)
    with Session(endpoint) as session:
        mode = session.run(handshake.agree_on_replies(modes))
        export = session.run(handshake.info(name))
        contexts, identity = [], ""
        if mode is not ReplyMode.SIMPLE:
            listed = session.run(handshake.list_contexts(name))
            contexts = [context for context in listed if not context.startswith(IDENTITY_CONTEXT)]
            identity = session.run(handshake.identity(name))
        session.run(handshake.abort())
    flags = [flag.name.lower() for flag in TransmissionFlag if flag & export.flags and flag.name]
    minimum, preferred, maximum = export.blocks
    if arguments.json:
        facts = {
            "name": export.name,
            "description": export.description,
            "identity": identity,
            "size": export.size,
            "flags": flags,
            "block_size": {"minimum": minimum, "preferred": preferred, "maximum": maximum},
            "contexts": contexts,
            "replies": mode.value,
        }
        print(json.dumps(facts))
        return 0
    rows = [
        ("name", export.name),
        ("description", export.description),
        ("identity", identity),
        ("size", f"{export.size} ({format_size(export.size)})"),
        ("flags", " ".join(flags)),
        ("block size", f"minimum {minimum}, preferred {preferred}, maximum {maximum}"),
        ("contexts", " ".join(contexts)),
        ("replies", mode.value),
    ]
    for label, value in rows:
        if value:
            print(f"{label:12} {value}")
    return 0
