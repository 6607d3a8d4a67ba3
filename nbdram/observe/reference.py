"""Writes docs/metrics.md out of the table of metrics: python -m nbdram.observe.reference > docs/metrics.md"""

from typing import Final

from nbdram.observe.families import FAMILIES, Family
from nbdram.protocol.handshake import Failure
from nbdram.server.counters import COMMANDS, HANG_UPS

_VALUES: Final = {
    "cause": ", ".join(HANG_UPS),
    "command": ", ".join(COMMANDS.values()),
    "export": "the name of an export",
    "path (of a request)": "inline, task",
    "path (of a swap directory)": "the directory, as it was given",
    "phase": "handshake, transmission",
    "reason": ", ".join(Failure),
    "result": "compressed, dropped_clean, zeros, incompressible, demoted, moved_on, made_denser, thrown_away",
    "remote": "its URL, without options",
    "source": "ram, disk, remote",
    "version": "the version of nbdram",
}

_HEAD: Final = """\
# Metrics

<!-- Made by `python -m nbdram.observe.reference`; a test holds it against the code. -->

The server answers `GET /metrics` at 127.0.0.1:9810 (`--metrics ADDRESS:PORT|off`) for Prometheus; `/healthz` is 200
while the event loop runs, `/readyz` while the server serves, and `/` is a page for people. All of it can only be
looked at. It is not encrypted and asks nobody who they are: export names, sizes and client addresses are all it tells,
but keep it on loopback or a network that you trust. On loopback, only requests for `localhost` or a loopback address
are answered, so that no web site can read it through a visitor's browser.

Nothing is done for a metric while requests are served: these are counters that are read when somebody asks. A scrape
rests every few hundred lines, so that it does not hold up requests; with 1000 exports it has 2 MB and took 27 ms
of CPU. `process_*` are Prometheus' usual ones. Dashboards, recording rules and alerts are in `grafana/`.

| metric | kind | labels | meaning |
|--------|------|--------|---------|
"""

_LABELS: Final = """
## Labels

Clients can't make series: all labels but the names of exports and directories are from these sets.

| label | values |
|-------|--------|
"""


def text() -> str:
    """All of docs/metrics.md."""
    rows = "".join(map(_row, FAMILIES))
    labels = "".join(f"| {name} | {values} |\n" for name, values in _VALUES.items())
    return f"{_HEAD}{rows}{_LABELS}{labels}"


def _row(family: Family) -> str:
    labels = ", ".join(family.labels)
    return f"| `{family.name}` | {family.kind} | {labels} | {family.help} |\n"


if __name__ == "__main__":
    print(text(), end="")
