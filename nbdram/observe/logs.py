"""Log lines: text for people, or one JSON object a line (`--log-format json`) with the name of the event.

The names are in the table below, by the text of the message, so that who writes a log line writes plain English; a
test finds lines that are missing from it. docs/logs.md is made from it:
python -m nbdram.observe.logs > docs/logs.md
"""

import json
import logging
from datetime import UTC, datetime
from typing import Any, Final, TextIO

FORMATS: Final = ("text", "json")
_TEXT: Final = "%(asctime)s %(name)s %(levelname)s: %(message)s"

# The message as it stands in the code: the event's name, and the names of what is filled in.
EVENTS: Final[dict[str, tuple[str, ...]]] = {
    "%s opened export %r (%s replies)": ("export_opened", "client", "export", "replies"),
    "%s closed export %r": ("export_closed", "client", "export"),
    "%s left in the handshake: %s": ("handshake_failed", "client", "reason"),
    "%s did not finish the handshake in %g s": ("handshake_late", "client", "seconds"),
    "%s %s: closed": ("protocol_broken", "client", "reason"),
    "%s can't be answered: %s": ("reply_failed", "client", "reason"),
    "%s: a request failed unexpectedly": ("request_crashed", "client"),
    "%s is %s for %g s: hung up on": ("hung_up", "client", "reason", "seconds"),
    "%s may not use %r any more: hung up on": ("hung_up", "client", "export"),
    "nothing was reloaded: %s": ("reload_failed", "reason"),
    "reloaded: %s": ("reloaded", "change"),
    "not changed: %s": ("reload_incomplete", "reason"),
    "these settings need a restart: %s": ("restart_needed", "settings"),
    "%d connections: more are turned away": ("connections_full", "connections"),
    "more than %d connections a second: some are turned away": ("newcomers_too_fast", "limit"),
    "nobody can be let in: %s": ("accept_failed", "reason"),
    "%s: the data at offset %d is lost: %s": ("data_lost", "export", "offset", "reason"),
    "the memory budget is used up, and nothing more can be compressed": ("memory_full",),
    "no process can be started to compress in, a thread does it: %s": ("packer_failed", "reason"),
    "the process that compresses %s: a thread goes on, and there will be another one": ("packer_lost", "how"),
    "reclaim had an error and goes on: %r": ("reclaim_error", "error"),
    "%s is on tmpfs: what is swapped there stays in RAM": ("swap_on_tmpfs", "path"),
    "%s: can't write swap: %s; cold data stays in RAM for now": ("swap_write_failed", "path", "reason"),
    "%s: swap can be written again": ("swap_recovered", "path"),
    "%s: can't punch swap: %s": ("swap_punch_failed", "path", "reason"),
    "%s: can't store cold data: %s; it goes to other nodes, or stays where it is": (
        "remote_store_failed",
        "remote",
        "reason",
    ),
    "%s: cold data can be stored again": ("remote_recovered", "remote"),
    "%s: not all data could be removed; nbdram gc-remote does the rest": ("remote_leftovers", "remote"),
    "%s: an unexpected error": ("remote_crashed", "node"),
    "%s does not answer: %s; it has %g s": ("remote_awaited", "remote", "reason", "seconds"),
    "%s has %d replicas of some of its masters: with replicas=%d nothing is stored there until it has more": (
        *("remote_few_replicas", "remote", "replicas", "asked"),
    ),
    "--memory %s is more than %s: using %s": ("memory_limited", "asked", "limit", "used"),
    "--memory auto: this kernel does not tell memory pressure; the budget stays as it is": ("pressure_unknown",),
    "took up %d exports in %.3f s": ("state_taken_up", "exports", "seconds"),
    "%s: took up %s resident, %s compressed": ("export_taken_up", "export", "resident", "compressed"),
    "%s is on %s: devices are as slow as that; use a directory on tmpfs": ("state_not_on_tmpfs", "path", "filesystem"),
    "%s has only %s of room: --memory is %s": ("state_short_of_room", "path", "room", "memory"),
    "%r keeps its %s: --export asks for %s": ("size_kept", "export", "size", "asked"),
    "%r keeps its way to compress: density can't be changed": ("density_kept", "export"),
    "%r was made": ("export_made", "export"),
    "%r has %d bytes now": ("export_resized", "export", "size"),
    "%r was removed": ("export_removed", "export"),
    "%s %s failed unexpectedly": ("control_crashed", "method", "path"),
    "no control socket: %s": ("control_off", "reason"),
    "no metrics and no status page: %s": ("metrics_off", "reason"),
    "stopping": ("stopping",),
}


class JsonFormatter(logging.Formatter):
    """One JSON object a line. A message that is not in the table is the event `other`."""

    def format(self, record: logging.LogRecord) -> str:
        event, *names = EVENTS.get(str(record.msg), ("other",))
        moment = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": event,
            "logger": record.name,
            "message": record.getMessage(),
        }
        values = record.args if isinstance(record.args, tuple) else ()
        for name, value in zip(names, values, strict=False):
            line[name] = value if isinstance(value, int | float) else str(value)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up(style: str, *, verbose: bool) -> None:
    """Log to stderr, warnings only unless `verbose`, in one of FORMATS; from the second call on, so from now on."""
    root = logging.getLogger()
    ours = next((handler for handler in root.handlers if isinstance(handler, _Stderr)), None)
    if ours is None:
        ours = _Stderr()
        logging.basicConfig(handlers=[ours])
    ours.setFormatter(JsonFormatter() if style == "json" else logging.Formatter(_TEXT))
    if ours in root.handlers:
        root.setLevel(logging.INFO if verbose else logging.WARNING)


class _Stderr(logging.StreamHandler[TextIO]):
    pass


_HEAD: Final = """\
# Logs

<!-- Made by `python -m nbdram.observe.logs`; a test holds it against the code. -->

The server logs to stderr: warnings and errors, and with `-v` every connection too. What happens for each request is
never logged, but counted: see [metrics.md](metrics.md). With `--log-format json`, each line is one JSON object with
`time` (UTC), `level`, `event`, `logger`, `message`, the fields of the event, and `exception` where there was one.

| event | fields | message |
|-------|--------|---------|
"""


def text() -> str:
    """All of docs/logs.md."""
    rows = [f"| `{event}` | {', '.join(names)} | {message} |\n" for message, (event, *names) in EVENTS.items()]
    return f"{_HEAD}{''.join(sorted(rows))}| `other` |  | anything else, such as what a library says |\n"


if __name__ == "__main__":
    print(text(), end="")
