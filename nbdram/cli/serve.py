"""nbdram serve: run a server in the foreground."""

import argparse
import os
from pathlib import Path

import uvloop

from nbdram.cli.create import OPTIONS
from nbdram.client.resident import stay_out_of_the_way
from nbdram.config import DEFAULT_METRICS, ServeSettings
from nbdram.configuration.keys import EXPORT_FLAG, KEYS
from nbdram.configuration.loader import DEFAULT_FILE, find_file, load
from nbdram.memory.malloc import share_one_arena
from nbdram.observe import logs
from nbdram.server.server import serve


def add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-c",
        "--config",
        type=Path,
        metavar="FILE",
        help=f"settings (default: {DEFAULT_FILE}, if it is there); flags and NBDRAM_* variables come before them",
    )


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("serve", help="run a server in the foreground")
    add_file(parser)
    parser.add_argument(
        "--export",
        action="append",
        metavar="NAME=MAXSIZE[,OPTION]...",
        help=f"serve a device of at most MAXSIZE, as in scratch=16G (default: ram=1T); options: {OPTIONS}",
    )
    parser.add_argument(
        "--listen",
        action="append",
        metavar="URI",
        help="unix:PATH, tcp://HOST:PORT, or fd for sockets handed over by a service manager "
        "(default: nbdram.sock in the runtime directory, and tcp://127.0.0.1:10809)",
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="RAM for everything the server holds (default: half of what is available; auto: less under pressure)",
    )
    parser.add_argument(
        "--swap",
        action="append",
        metavar="disk:PATH[,max=SIZE]|redis://HOST:PORT[,HOST:PORT...][/?max=SIZE...]",
        help="a directory, or a Redis or Valkey cluster (rediss: with TLS), for cold data, encrypted, when compressed "
        "RAM is not enough; may be given several times, and is used in this order",
    )
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        help="keep all data, names and sizes there, so that a server started again on it goes on where this one ended; "
        "on tmpfs, as /run or /dev/shm are",
    )
    parser.add_argument(
        "--write-wait",
        metavar="SECONDS",
        help="how long a write may wait for memory before it gets ENOSPC (default: 20)",
    )
    parser.add_argument(
        "--allow-plaintext",
        action="store_true",
        default=None,
        help="allow addresses that others can reach, without encryption",
    )
    parser.add_argument("--tls-cert", metavar="FILE", help="the server's certificate, and those behind it (PEM)")
    parser.add_argument("--tls-key", metavar="FILE", help="its private key (PEM)")
    parser.add_argument(
        "--tls-client-ca", metavar="FILE", help="clients must show a certificate of these authorities (PEM)"
    )
    parser.add_argument(
        "--tls",
        choices=("require", "allow"),
        help="whether TCP clients must use TLS where there is a certificate (default: require)",
    )
    parser.add_argument(
        "--control",
        metavar="PATH",
        help="the control socket (default: nbdram.control in the runtime directory)",
    )
    parser.add_argument(
        "--metrics",
        metavar="ADDRESS:PORT|off",
        help=f"where Prometheus metrics and the status page are served, over HTTP (default: {DEFAULT_METRICS.netloc}, "
        "if that is free)",
    )
    parser.add_argument(
        "--same-host",
        action="store_true",
        default=None,
        help="its devices are mounted on this host: be spared, and wait for none of them, when memory is short",
    )
    parser.add_argument("--log-format", choices=logs.FORMATS, help="json: one object a line")
    parser.add_argument("-v", "--verbose", action="store_true", default=None, help="log every connection")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    logs.set_up(arguments.log_format or "text", verbose=bool(arguments.verbose))
    file = find_file(arguments.config, os.environ)
    flags = {key.name: getattr(arguments, dest(key.flag)) for key in (*KEYS, EXPORT_FLAG) if key.flag}

    def read(running: ServeSettings | None = None) -> ServeSettings:
        return load(file, os.environ, flags, running)

    settings = read()
    logs.set_up(settings.log_format, verbose=settings.verbose)
    if settings.same_host:
        stay_out_of_the_way()
    share_one_arena()
    uvloop.run(serve(settings, read))
    return 0


def dest(flag: str) -> str:
    """What argparse calls a flag's value."""
    return flag.removeprefix("--").replace("-", "_")
