"""nbdram attach: make an export of any NBD server a device of this kernel, and keep it connected."""

import argparse
import json
from pathlib import Path
from typing import Any

from nbdram.client import sysfs
from nbdram.client.ask_keeper import ask, ask_if_running
from nbdram.client.attachment import Notes, default_directory
from nbdram.client.capability import need_sys_admin
from nbdram.config import absolute_uri, format_size
from nbdram.errors import UsageError

_MAX_CONNECTIONS = 16
DEAD_TIMEOUT_S = 600


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("attach", help="attach an export as /dev/nbdX and keep it connected")
    parser.add_argument("uri", metavar="URI", nargs="?", help="nbd://HOST/NAME or nbd+unix:///NAME?socket=PATH")
    parser.add_argument("device", metavar="/dev/nbdX", nargs="?", help="which device (default: one that is free)")
    parser.add_argument("--status", action="store_true", help="list the devices that are attached")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    add_options(parser)
    parser.set_defaults(run=run)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that `nbdram mount` has as well."""
    parser.add_argument("--connections", type=int, default=1, metavar="N", help="sockets for the device (default: 1)")
    parser.add_argument("--block-size", type=int, default=0, metavar="BYTES", help="sector size (default: 4096)")
    parser.add_argument(
        "--dead-timeout",
        type=int,
        default=DEAD_TIMEOUT_S,
        metavar="SECONDS",
        help="how long I/O waits for a server that is gone before it fails (default: %(default)s)",
    )
    parser.add_argument(
        "--retry-after",
        type=float,
        metavar="SECONDS",
        help="after how long a request is sent again if its connection was replaced; with several connections, a "
        "slower one is given up (default: 0.2; with several 0.3 if the server is nbdram, else 3)",
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.status:
        return _status(as_json=arguments.json)
    if not arguments.uri:
        raise UsageError("say what to attach, a URI, or --status")
    settings = settings_of(arguments)
    index = sysfs.index_of(arguments.device) if arguments.device else -1
    uri = absolute_uri(arguments.uri)
    need_sys_admin("attaching a device")
    made = ask(default_directory(), "attach", uri=uri, index=index, **settings)
    print(json.dumps(made) if arguments.json else f"{made['device']} is {uri}, {format_size(made['size'])}")
    return 0


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the keeper is to be told, checked."""
    if not 1 <= arguments.connections <= _MAX_CONNECTIONS:
        raise UsageError(f"--connections must be 1 to {_MAX_CONNECTIONS}")
    if arguments.block_size not in (0, 512, 1024, 2048, 4096):
        raise UsageError("--block-size must be 512, 1024, 2048 or 4096")
    if arguments.dead_timeout < 1:
        raise UsageError("--dead-timeout must be at least 1 second")
    retry_after = arguments.retry_after
    if retry_after is not None and not 0.1 <= retry_after <= 60:
        raise UsageError("--retry-after must be 0.1 to 60 seconds")
    return {
        "connections": arguments.connections,
        "block_size": arguments.block_size,
        "dead_timeout_s": arguments.dead_timeout,
        "retry_after_ms": round((retry_after or 0) * 1000),
    }


def _status(*, as_json: bool) -> int:
    directory: Path = default_directory()
    answer = ask_if_running(directory, "status")
    if answer is None and Notes(directory).find():  # it was killed, and so was its parent: the devices need another
        answer = ask(directory, "status")
    devices = answer["devices"] if answer else []
    if as_json:
        print(json.dumps(devices))
        return 0
    for device in devices:
        links = f"{device['connected']}/{device['connections']}"
        state = device["state"] + (f": {device['trouble']}" if device["trouble"] else "")
        print(f"{device['device']:12} {format_size(device['size']):>10} {links:>5}  {state}  {device['uri']}")
    return 0
