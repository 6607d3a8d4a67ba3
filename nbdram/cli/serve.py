"""nbdram serve: run a server in the foreground."""

import argparse
import logging
from pathlib import Path

import uvloop

from nbdram.client.resident import stay_out_of_the_way
from nbdram.config import (
    DEFAULT_METRICS,
    ExportSettings,
    ServeSettings,
    TlsSettings,
    default_listen,
    format_size,
    parse_listen,
    parse_metrics,
    parse_size,
)
from nbdram.config_remote import parse_swap
from nbdram.errors import UsageError
from nbdram.memory.available import cgroup_limits, default_budget
from nbdram.observe import logs
from nbdram.server.connection import WRITE_WAIT_S
from nbdram.server.server import serve

log = logging.getLogger("nbdram")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("serve", help="run a server in the foreground")
    parser.add_argument(
        "--export",
        action="append",
        metavar="NAME=MAXSIZE[,ro][,density][,description=TEXT]",
        help="serve a device of at most MAXSIZE, as in scratch=16G (default: ram=1T); "
        "density: cold data takes a little less RAM, and longer to read",
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
        type=Path,
        metavar="DIR",
        help="keep all data, names and sizes there, so that a server started again on it goes on where this one ended; "
        "on tmpfs, as /run or /dev/shm are",
    )
    parser.add_argument(
        "--write-wait",
        type=_seconds,
        default=WRITE_WAIT_S,
        metavar="SECONDS",
        help="how long a write may wait for memory before it gets ENOSPC (default: %(default)g)",
    )
    parser.add_argument(
        "--allow-plaintext",
        action="store_true",
        help="allow addresses that others can reach, without encryption",
    )
    parser.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="the server's certificate, and those behind it (PEM)"
    )
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key (PEM)")
    parser.add_argument(
        "--tls-client-ca", type=Path, metavar="FILE", help="clients must show a certificate of these authorities (PEM)"
    )
    parser.add_argument(
        "--tls",
        choices=("require", "allow"),
        default="require",
        help="whether TCP clients must use TLS where there is a certificate (default: %(default)s)",
    )
    parser.add_argument(
        "--control",
        type=Path,
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
        help="its devices are mounted on this host: be spared, and wait for none of them, when memory is short",
    )
    parser.add_argument("--log-format", choices=logs.FORMATS, default="text", help="json: one object a line")
    parser.add_argument("-v", "--verbose", action="store_true", help="log every connection")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    logs.set_up(arguments.log_format, verbose=arguments.verbose)
    exports = tuple(ExportSettings.parse(text) for text in arguments.export or ())
    swap, remote, remote_first = parse_swap(arguments.swap or ())
    listen = tuple(parse_listen(text) for text in arguments.listen or ())
    settings = ServeSettings(
        exports=exports,
        listen=listen or default_listen(),
        memory=_memory(arguments.memory),
        follow_pressure=arguments.memory == "auto",
        allow_plaintext=arguments.allow_plaintext,
        swap=swap,
        remote=remote,
        remote_first=remote_first,
        write_wait_s=arguments.write_wait,
        control=arguments.control,
        metrics=DEFAULT_METRICS if arguments.metrics is None else parse_metrics(arguments.metrics),
        metrics_required=arguments.metrics is not None,
        state_dir=arguments.state_dir,
        tls=_tls(arguments),
    )
    settings.check()
    if arguments.same_host:
        stay_out_of_the_way()
    uvloop.run(serve(settings))
    return 0


def _tls(arguments: argparse.Namespace) -> TlsSettings | None:
    certificate, key, client_ca = arguments.tls_cert, arguments.tls_key, arguments.tls_client_ca
    if certificate and key:
        return TlsSettings(certificate, key, client_ca, arguments.tls == "require")
    if certificate or key or client_ca:
        raise UsageError("TLS takes both a certificate and its key: give --tls-cert FILE and --tls-key FILE")
    return None


def _memory(text: str | None) -> int:
    """The budget asked for, or the default; never more than a control group allows."""
    if text is None or text == "auto":
        return default_budget()
    try:
        asked = parse_size(text)
    except UsageError as error:
        raise UsageError(f"--memory {error}") from None
    allowed = min(cgroup_limits(), default=asked)
    if asked > allowed:
        log.warning(
            "--memory %s is more than the control group allows: using %s", format_size(asked), format_size(allowed)
        )
    return min(asked, allowed)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 3600")
    return seconds
