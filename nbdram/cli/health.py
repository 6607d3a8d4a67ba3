"""nbdram health: whether a server, or the keeper, of this host works, as an exit code, for health checks."""

import argparse
import http.client

from nbdram.client.ask_keeper import ask_if_running
from nbdram.client.attachment import default_directory
from nbdram.config import DEFAULT_METRICS, Endpoint, parse_metrics
from nbdram.errors import NbdramError, UsageError

_TIMEOUT_S = 4.0


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("health", help="succeed if a server serves: for health checks")
    parser.add_argument(
        "--metrics",
        metavar="ADDRESS:PORT",
        default=DEFAULT_METRICS.netloc,
        help="where it serves its metrics (default: %(default)s)",
    )
    parser.add_argument("--live", action="store_true", help="succeed while it runs, also when it starts or drains")
    parser.add_argument("--keeper", action="store_true", help="ask the keeper of attached devices instead")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.keeper:
        return _keeper()
    endpoint = parse_metrics(arguments.metrics)
    if endpoint is None:
        raise UsageError("--metrics off: a server without metrics can't be asked for its health")
    said, healthy = ask(endpoint, "/healthz" if arguments.live else "/readyz")
    print(said)
    return 0 if healthy else 1


def _keeper() -> int:
    answer = ask_if_running(default_directory(), "status")
    if answer is None:
        raise NbdramError("no keeper runs: start one with `nbdram keeper`")
    print(f"keeping {len(answer['devices'])} devices")
    return 0


def ask(endpoint: Endpoint, path: str) -> tuple[str, bool]:
    """What the server says, and whether that is good news."""
    connection = http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.read().decode(errors="replace").strip(), response.status == 200
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or error
        raise NbdramError(
            f"no server answers at {endpoint.netloc} ({reason}): is it running, with --metrics {endpoint.netloc}?"
        ) from error
    finally:
        connection.close()
