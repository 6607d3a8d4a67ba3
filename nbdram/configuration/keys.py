"""Every key of the configuration: what it takes, what it means, and whether it can change while the server runs.

The table is all there is to know of them: the loader, `nbdram config check`, docs/configuration.md and the tests are
made from it. Parsers take what TOML has (text, numbers, lists), or the text of a flag or a variable.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nbdram import access
from nbdram.config import (
    DEFAULT_METRICS,
    ExportSettings,
    Limits,
    check_description,
    check_size,
    parse_listen,
    parse_metrics,
    parse_size,
)
from nbdram.errors import UsageError

Parser = Callable[[Any], Any]

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|min|h|d)?", re.ASCII)
_SECONDS: Final = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_LONGEST_S: Final = 365 * 86400.0


@dataclass(frozen=True)
class Key:
    """`name` as in the file, dotted; `default` as people say it; `flag` of `nbdram serve`, if there is one.

    `many`: a list, whose members flags give one by one and a variable separates by spaces. `running`: a reload
    applies it.
    """

    name: str
    parse: Parser
    default: str
    help: str
    flag: str = ""
    many: bool = False
    running: bool = False

    @property
    def variable(self) -> str:
        return "NBDRAM_" + self.name.upper().replace(".", "_")


# -- what values look like -----------------------------------------------------------------------------


def text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise UsageError(f'{_shown(value)} is not what is expected: text in quotes, as in "text"')
    return value


def path(value: Any) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise UsageError(f'{_shown(value)} is not a path: write it in quotes, as in "/run/nbdram"')
    return Path(value)


def switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in (*_TRUE, *_FALSE):
        return value.lower() in _TRUE
    raise UsageError(f"{_shown(value)} is neither true nor false")


def size(value: Any) -> int:
    if isinstance(value, str):
        return parse_size(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UsageError(f'{_shown(value)} is not a size: write it with a unit and in quotes, as in "16G"')
    return value


def memory(value: Any) -> int | None:
    """Bytes; None for `auto`."""
    if isinstance(value, str) and value.lower() == "auto":
        return None
    try:
        return size(value)
    except UsageError as error:
        raise UsageError(f"{error}, or auto") from None


def number(least: int, most: int) -> Parser:
    def parse(value: Any) -> int:
        if isinstance(value, str) and value.isascii() and value.isdigit():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise UsageError(f"{_shown(value)} is not a whole number from {least} to {most}")
        return value

    return parse


def duration(most_s: float = _LONGEST_S, *, least_s: float = 0.0, endless: bool = False) -> Parser:
    """Seconds; with `endless`, `off` is 0, which stands for ever."""
    meant = 'write seconds, or a unit too, as in "90s", "5min" or "2h"' + (', or "off"' if endless else "")

    def parse(value: Any) -> float:
        seconds = -1.0
        if isinstance(value, int | float) and not isinstance(value, bool):
            seconds = float(value)
        elif isinstance(value, str) and (match := _DURATION.fullmatch(value.strip())):
            seconds = float(match[1]) * _SECONDS[match[2] or "s"]
        elif endless and value in ("off", False):
            return 0.0
        if not least_s <= seconds <= most_s:
            most = f" of at most {most_s:g} s" if most_s < _LONGEST_S else ""
            raise UsageError(f"{_shown(value)} is not a time{most}: {meant}")
        return seconds

    return parse


def choice(*known: str) -> Parser:
    def parse(value: Any) -> str:
        if value not in known:
            raise UsageError(f"{_shown(value)} is not one of {', '.join(known)}")
        return str(value)

    return parse


def listen(value: Any) -> Any:
    return tuple(parse_listen(one) for one in texts(value))


def metrics(value: Any) -> Any:
    return parse_metrics(value if isinstance(value, str) else text(value))


def exports(value: Any) -> tuple[ExportSettings, ...]:
    return tuple(ExportSettings.parse(one) for one in texts(value))


def texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise UsageError(f'{_shown(value)} is not a list of texts: write ["ONE", "ANOTHER"]')
    return value


def _shown(value: Any) -> str:
    """A value as it may stand in TOML, cut short."""
    shown = {True: "true", False: "false"}.get(value, repr(value)) if isinstance(value, bool) else repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _rule(parse: Parser) -> Parser:
    """For variables, members that are numbers are ids."""

    def numbers_too(value: Any) -> Any:
        if isinstance(value, list):
            value = [int(one) if isinstance(one, str) and one.isascii() and one.isdigit() else one for one in value]
        return parse(value)

    return numbers_too


# -- the keys ------------------------------------------------------------------------------------------

_LIMITS: Final = Limits()

_RULES: Final = (
    ("networks", access.parse_networks, "Networks whose TCP clients may use it."),
    ("users", _rule(access.parse_users), "Users, by name or number, who may use it over a Unix socket."),
    ("groups", _rule(access.parse_groups), "Groups whose members may."),
    ("certificates", access.parse_certificates, "Names in clients' certificates, one of which must be shown besides."),
)

KEYS: Final = (
    Key(
        "listen",
        listen,
        "`nbdram.sock` in the runtime directory, and `tcp://127.0.0.1:10809`",
        "Where to listen: `unix:PATH`, `tcp://HOST:PORT`, or `fd` for sockets handed over by a service manager.",
        flag="--listen",
        many=True,
    ),
    Key(
        "memory",
        memory,
        "half of what is available",
        "RAM for everything the server holds; `auto`: the default, and less while memory is short on the host.",
        flag="--memory",
        running=True,
    ),
    Key(
        "swap",
        texts,
        "none",
        "Where cold data goes that compressed RAM has no room for, in this order: `disk:PATH[,max=SIZE]`, "
        "`redis://HOST:PORT/?max=SIZE`.",
        flag="--swap",
        many=True,
    ),
    Key(
        "state_dir",
        path,
        "none: devices are gone with the process",
        "A directory on tmpfs where all data, names and sizes are kept for the next server.",
        flag="--state-dir",
    ),
    Key(
        "write_wait",
        duration(3600),
        "20s",
        "How long a write may wait for memory before it gets ENOSPC.",
        flag="--write-wait",
        running=True,
    ),
    Key(
        "control",
        path,
        "`nbdram.control` in the runtime directory",
        "The control socket.",
        flag="--control",
    ),
    Key(
        "metrics",
        metrics,
        f"`{DEFAULT_METRICS.netloc}`, if that is free",
        "Where metrics and the status page are served: `ADDRESS:PORT`, or `off`.",
        flag="--metrics",
    ),
    Key(
        "same_host",
        switch,
        "false",
        "The devices are mounted on this host: the server is spared, and waits for none of them, when memory is short.",
        flag="--same-host",
    ),
    Key("log_format", choice("text", "json"), "text", "`json`: one object a line.", flag="--log-format"),
    Key("verbose", switch, "false", "Log every connection.", flag="--verbose", running=True),
    Key(
        "allow_plaintext",
        switch,
        "false",
        "Allow addresses that others can reach without TLS being required.",
        flag="--allow-plaintext",
    ),
    Key(
        "tls.certificate",
        path,
        "none",
        "The server's certificate, and those behind it, in PEM form.",
        flag="--tls-cert",
        running=True,
    ),
    Key("tls.key", path, "none", "Its private key, in PEM form, without a passphrase.", flag="--tls-key", running=True),
    Key(
        "tls.client_ca",
        path,
        "none",
        "Authorities: clients must show a certificate of one of them.",
        flag="--tls-client-ca",
        running=True,
    ),
    Key(
        "tls.mode",
        choice("require", "allow"),
        "require",
        "Whether TCP clients must use TLS, once there is a certificate. Over Unix sockets it is offered.",
        flag="--tls",
        running=True,
    ),
    Key(
        "limits.connections",
        number(1, 1_000_000),
        str(_LIMITS.connections),
        "Connections in all; fewer, if the limit of open files has no room for them.",
        running=True,
    ),
    Key(
        "limits.handshakes",
        number(1, 1_000_000),
        str(_LIMITS.handshakes),
        "Connections that have not opened an export yet; beyond, one that has not got on for longest makes room.",
        running=True,
    ),
    Key(
        "limits.newcomers",
        number(0, 1_000_000),
        str(_LIMITS.newcomers),
        "New connections a second, half as many with TLS; when they get short, addresses share them. 0: no limit.",
        running=True,
    ),
    Key(
        "limits.handshake_timeout",
        duration(600, least_s=0.1),
        "10s",
        "How long a client may take to open an export.",
        running=True,
    ),
    Key(
        "limits.requests_in_flight",
        number(1, 65536),
        str(_LIMITS.requests_in_flight),
        "Requests of one connection that are under way at once; beyond, nothing more is received.",
        running=True,
    ),
    Key(
        "limits.idle_timeout",
        duration(endless=True),
        "off",
        "How long a client may ask for nothing. A file system that is mounted may do so for days.",
        running=True,
    ),
    Key(
        "limits.stall_timeout",
        duration(endless=True),
        "5min",
        "How long a client may leave a reply unread, or a write unfinished.",
        running=True,
    ),
    *(
        Key(
            f"access.{name}",
            parse,
            "everybody",
            f"For exports without rules of their own. {help}",
            many=True,
            running=True,
        )
        for name, parse, help in _RULES
    ),
)

# Of each export, in a table [exports.NAME].
EXPORT_KEYS: Final = (
    Key("size", lambda value: check_size(size(value)), "must be there", "The most it may grow to.", running=True),
    Key("read_only", switch, "false", "Clients can't write.", running=True),
    Key("description", lambda value: check_description(text(value)), "none", "Text that clients see.", running=True),
    Key("density", switch, "false", "Cold data takes a little less RAM, and longer to read."),
    *(Key(name, parse, "as in `[access]`", help, many=True, running=True) for name, parse, help in _RULES),
    Key("iops", access.parse_iops, "0: no limit", "Requests a second, of all its clients together.", running=True),
    Key(
        "bandwidth",
        access.parse_bandwidth,
        "0: no limit",
        "Bytes a second that are read and written, of all its clients together.",
        running=True,
    ),
)

# Exports of flags and variables, which have no key in the file.
EXPORT_FLAG: Final = Key("export", exports, "`ram=1T`, if there is none at all", "", flag="--export", many=True)
RULE_NAMES: Final = tuple(name for name, _, _ in _RULES)
