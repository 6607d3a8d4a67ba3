"""What the user asked for, checked and with units. Knows no sockets and no devices."""

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final
from urllib.parse import SplitResult, quote, unquote_to_bytes, urlsplit

from nbdram.access import OPEN, RULE_OPTIONS, Rules, take_rule
from nbdram.errors import UsageError
from nbdram.memory.available import most_memory
from nbdram.memory.layout import MAX_DEVICE_BYTES, PAGE
from nbdram.memory.tiers.remote_settings import RemoteSettings
from nbdram.protocol.wire import DEFAULT_PORT, MAX_STRING_BYTES

log = logging.getLogger("nbdram")

DEFAULT_EXPORT_NAME: Final = "ram"
DEFAULT_EXPORT_SIZE: Final = 1 << 40

# The process itself takes about 16 MiB, and all of it counts.
MIN_MEMORY: Final = 32 << 20
_LEAST_SWAP: Final = 1 << 20

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SIZE = re.compile(r"(\d{1,20})\s*([KMGTP]?)(?:i?B)?", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """Bytes of `64M`, `16G`, `1TiB`: powers of 1024."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise UsageError(f"{text!r} is not a size: write a whole number and K, M, G or T, as in 16G")
    return int(match[1]) << _UNITS[match[2].upper()]


def format_size(count: int) -> str:
    """`count` bytes as people say it: exact if it is a whole number of a unit, else with one decimal."""
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << shift:
            exact = count % (1 << shift) == 0
            return f"{count >> shift} {unit}" if exact else f"{count / (1 << shift):.1f} {unit}"
    return f"{count} bytes"


def limited_memory(asked: int) -> int:
    """The budget asked for, or less: never more than the machine has, or a control group allows."""
    most, why = most_memory()
    if asked > most:
        log.warning("--memory %s is more than %s: using %s", format_size(asked), why, format_size(most))
    return min(asked, most)


def parse_swap_size(text: str) -> int:
    """The `max=` of a --swap."""
    size = parse_size(text)
    if size < _LEAST_SWAP:
        raise UsageError(f"max must be at least {format_size(_LEAST_SWAP)}; without it there is no limit")
    return size


def check_name(name: str) -> str:
    """An export's name as the protocol allows it."""
    if len(name.encode(errors="surrogateescape")) > MAX_STRING_BYTES:
        raise UsageError(f"an export name may have at most {MAX_STRING_BYTES} bytes")
    if not name.isprintable():
        raise UsageError(f"the export name {name!r} contains characters that can't be printed")
    return name


def check_description(text: str) -> str:
    """An export's description as the protocol allows it."""
    if len(text.encode(errors="surrogateescape")) > MAX_STRING_BYTES:
        raise UsageError(f"an export's description may have at most {MAX_STRING_BYTES} bytes")
    if not text.isprintable():
        raise UsageError(f"the description {text!r} contains characters that can't be printed")
    return text


def check_size(size: int) -> int:
    """An export's maximum in bytes, as it can be."""
    if size <= 0 or size % PAGE:
        raise UsageError(f"the size must be a multiple of {PAGE} bytes, above 0")
    if size > MAX_DEVICE_BYTES:
        raise UsageError(f"an export can have at most {format_size(MAX_DEVICE_BYTES)}")
    return size


@dataclass(frozen=True)
class ExportSettings:
    """One export: its name, its maximum in bytes, and what clients may do.

    `dense`: cold data is compressed 64 KiB at a time, not 16: a little less RAM, slower faults.
    """

    name: str
    size: int
    read_only: bool = False
    description: str = ""
    dense: bool = False
    rules: Rules = OPEN

    @classmethod
    def parse(cls, text: str, before: str = "--export ") -> "ExportSettings":
        """From NAME=MAXSIZE[,ro][,density][,RULE=VALUE]...[,description=TEXT]; the text runs to the end.

        `before`: what was typed before it, for complaints.
        """
        name, equals, rest = text.partition("=")
        if not equals or not name:
            raise UsageError(f"{before}{text!r}: write NAME=MAXSIZE, as in scratch=16G")
        size_text, _, options = rest.partition(",")
        flags: set[str] = set()
        rules: dict[str, Any] = {}
        description = ""
        try:
            size = check_size(parse_size(size_text))
            while options:
                if options.startswith("description="):
                    description, options = options.removeprefix("description="), ""
                    continue
                option, _, options = options.partition(",")
                if not take_rule(option, rules):
                    if option not in ("ro", "density"):
                        known = f"known are ro, density, {', '.join(RULE_OPTIONS)} and description=TEXT"
                        raise UsageError(f"there is no option {option!r}; {known}")
                    flags.add(option)
            access = Rules.parse(rules)
        except UsageError as error:
            raise UsageError(f"{before}{text!r}: {error}") from None
        description = check_description(description)
        return cls(check_name(name), size, "ro" in flags, description, "density" in flags, access)


@dataclass(frozen=True)
class Limits:
    """What clients may take together, and each; times in seconds, 0 is for ever.

    `idle_timeout_s` is for a client that asks for nothing, `stall_timeout_s` for one that does not take a reply or does
    not finish a request.
    """

    connections: int = 4096
    handshakes: int = 1024
    handshake_timeout_s: float = 10.0
    requests_in_flight: int = 128
    idle_timeout_s: float = 0.0
    stall_timeout_s: float = 300.0
    newcomers: int = 300  # a second


@dataclass(frozen=True)
class SwapSettings:
    """A directory on disk for cold data; `max_bytes` 0: as much as the disk has."""

    path: Path
    max_bytes: int = 0

    @classmethod
    def parse(cls, text: str) -> "SwapSettings":
        """From disk:PATH[,max=SIZE]."""
        kind, _, rest = text.partition(":")
        path, comma, option = rest.rpartition(",max=")
        if not comma:
            path, option = rest, ""
        if unknown := re.search(r",(\w+)=", path):  # rather an option than part of a path
            raise UsageError(f"--swap {text!r}: there is no option {unknown[1]!r}; known is max=SIZE")
        if kind != "disk" or not path:
            raise UsageError(f"--swap {text!r}: write disk:PATH or disk:PATH,max=SIZE, or redis://HOST:PORT,...")
        try:
            return cls(Path(path), parse_swap_size(option) if comma else 0)
        except UsageError as error:
            raise UsageError(f"--swap {text!r}: {error}") from None


@dataclass(frozen=True)
class TlsSettings:
    """Certificates, all in PEM form, and whether TCP clients must use them.

    `client_ca`: clients must show a certificate of one of these authorities.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None
    required: bool = True


@dataclass(frozen=True)
class ClientTls:
    """How a client does TLS: its files as libnbd names them, or the system's authorities; the name to be shown."""

    certificates: Path | None = None
    hostname: str = ""


@dataclass(frozen=True)
class Endpoint:
    """A place to listen on or to dial: a Unix socket's path, or host and port; or inherited sockets.

    `tls` is for dialling.
    """

    path: str = ""
    host: str = ""
    port: int = DEFAULT_PORT
    inherited: bool = False
    tls: ClientTls | None = None

    @property
    def is_loopback(self) -> bool:
        try:
            return ip_address(self.host).is_loopback
        except ValueError:  # a name may mean anything, but for this one
            return self.host == "localhost"

    def check_plaintext(self, allowed: bool) -> None:
        """Refuse what others could reach, and listen in on."""
        if self.host and not self.is_loopback and not allowed:
            raise UsageError(
                f"{self} can be reached by others and would be served without encryption: "
                "listen on a Unix socket or loopback, require TLS, or allow it with --allow-plaintext"
            )

    def __str__(self) -> str:
        if self.inherited:
            return "fd"
        return f"unix:{self.path}" if self.path else f"tcp://{self.netloc}"

    @property
    def netloc(self) -> str:
        """HOST:PORT, IPv6 in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def uri(self, export: str, *, tls: bool = False) -> str:
        """The NBD URI of an export that is served here."""
        name = quote(export)
        scheme = "nbds" if tls else "nbd"
        if self.path:
            return f"{scheme}+unix:///{name}?socket={quote(self.path, errors='surrogateescape')}"
        port = "" if self.port == DEFAULT_PORT else f":{self.port}"
        host = self.netloc.removesuffix(f":{self.port}")
        return f"{scheme}://{host}{port}/{name}"


_LISTEN_FORMS = "write unix:PATH, tcp://HOST:PORT or fd"


def parse_listen(text: str) -> Endpoint:
    """`unix:PATH`, `tcp://HOST[:PORT]` (IPv6 in brackets) or `fd`."""
    if text == "fd":
        return Endpoint(inherited=True)
    if text.startswith("unix:") and len(text) > len("unix:"):
        path = text.removeprefix("unix:")
        if len(os.fsencode(path)) > 107:
            raise UsageError(f"--listen {text!r}: a Unix socket's path may have at most 107 bytes")
        return Endpoint(path=path)
    if text.startswith("tcp://"):
        try:
            parts = split_uri(text)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise UsageError(f"--listen {text!r}: {_LISTEN_FORMS}") from error
        extra = parts.path.strip("/") or parts.query or parts.fragment or parts.username is not None
        if host and not extra:
            return Endpoint(host=host, port=DEFAULT_PORT if port is None else port)
    raise UsageError(f"--listen {text!r}: {_LISTEN_FORMS}")


def parse_metrics(text: str) -> Endpoint | None:
    """Where metrics are to be served: `ADDRESS:PORT` (IPv6 in brackets), or `off`."""
    if text == "off":
        return None
    try:
        parts = split_uri(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if host is None or port is None or parts.path or parts.query:
        raise UsageError(f"--metrics {text!r}: write ADDRESS:PORT, as in {DEFAULT_METRICS.netloc}, or off")
    return Endpoint(host=host, port=port)


def parse_nbd_uri(text: str) -> tuple[Endpoint, str]:
    """Where to dial and the export's name, of `nbd://HOST[:PORT]/NAME` or `nbd+unix:///NAME?socket=PATH`.

    With TLS, `nbds://` and `nbds+unix://`, and of their options tls-certificates=DIR and tls-hostname=NAME.
    """
    try:
        parts = split_uri(text)
        port = parts.port
    except ValueError:
        forms = "the port is 0 to 65535, an IPv6 address in brackets, a control character % and two digits"
        raise UsageError(f"{text!r} is not an NBD URI: {forms}") from None
    name = _unquote(parts.path.removeprefix("/"))
    if not _is_utf8(name):
        raise UsageError(f"{text!r} names an export that is not in UTF-8")
    options = {key: _unquote(value) for key, _, value in (pair.partition("=") for pair in parts.query.split("&"))}
    tls = None
    if parts.scheme.startswith("nbds"):
        directory = options.get("tls-certificates")
        hostname = options.get("tls-hostname") or parts.hostname or "localhost"
        tls = ClientTls(Path(directory) if directory else None, hostname)
    if parts.scheme in ("nbd+unix", "nbds+unix"):
        if options.get("socket"):
            return Endpoint(path=options["socket"], tls=tls), name
        raise UsageError(f"{text!r} names no socket: write {parts.scheme}:///NAME?socket=PATH")
    if parts.scheme in ("nbd", "nbds") and parts.hostname:
        return Endpoint(host=parts.hostname, port=DEFAULT_PORT if port is None else port, tls=tls), name
    raise UsageError(f"{text!r} is not an NBD URI: write nbd://HOST/NAME or nbd+unix:///NAME?socket=PATH")


def split_uri(text: str) -> SplitResult:
    """The parts of a URI; ValueError if it has control characters, of which `urlsplit` would leave some out."""
    if _CONTROL.search(text):
        raise ValueError("write control characters as % and two digits")
    return urlsplit(text)


def _unquote(text: str) -> str:
    """With the bytes that are written as %XX, as Python names a file: one text for the same bytes, however written."""
    return os.fsdecode(unquote_to_bytes(os.fsencode(text)))


def _is_utf8(text: str) -> bool:
    """Whether what a user wrote is that, and not bytes that only a file can be named by."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


DEFAULT_METRICS: Final = Endpoint(host="127.0.0.1", port=9810)


def absolute_uri(text: str) -> str:
    """The same NBD URI for a process in another directory; UsageError if it is none."""
    endpoint, name = parse_nbd_uri(text)
    if endpoint.tls:
        raise UsageError(
            "a kernel speaks no TLS: let nbd-client do it (nbd-client HOST DEVICE -N NAME -enable-tls); "
            "with certificates: docs/security.md"
        )
    if endpoint.path:
        endpoint = replace(endpoint, path=os.path.abspath(endpoint.path))
    return endpoint.uri(name)


def runtime_directory() -> Path:
    """Where sockets belong: /run for root, the user's own runtime directory otherwise."""
    if os.geteuid() == 0:
        return Path("/run")
    return Path(os.environ.get("XDG_RUNTIME_DIR") or "/tmp")


def default_listen() -> tuple[Endpoint, ...]:
    return (
        Endpoint(path=str(runtime_directory() / "nbdram.sock")),
        Endpoint(host="127.0.0.1"),
    )


@dataclass(frozen=True)
class ServeSettings:
    """All of `nbdram serve`. `memory` is the budget in bytes.

    `exports` may be empty: then the one export by default is made, unless the state directory has some.
    """

    exports: tuple[ExportSettings, ...]
    listen: tuple[Endpoint, ...]
    memory: int
    allow_plaintext: bool = False
    swap: tuple[SwapSettings, ...] = ()
    write_wait_s: float = 20.0
    control: Path | None = None
    follow_pressure: bool = False
    metrics: Endpoint | None = None
    metrics_required: bool = False  # else the server goes without if the port is taken
    state_dir: Path | None = None
    remote: RemoteSettings | None = None
    remote_first: bool = False  # before the directories of `swap`
    tls: TlsSettings | None = None
    limits: Limits = Limits()
    asked_memory: int | None = None  # what `memory` was computed from; None: it was left to us
    default_rules: Rules = OPEN  # for exports that are made while the server runs
    verbose: bool = False
    log_format: str = "text"
    same_host: bool = False

    @property
    def plaintext_may_listen(self) -> bool:
        """Whether addresses that others can reach are in order."""
        return self.allow_plaintext or (self.tls is not None and self.tls.required)

    def check(self) -> None:
        """The first of `mistakes` as an error."""
        for _, told in self.mistakes():
            raise UsageError(told)

    def mistakes(self) -> Iterator[tuple[str, str]]:
        """What can be said without opening anything: the setting, and what is wrong."""
        seen: set[str] = set()
        for export in self.exports:
            if export.name in seen:
                yield "exports", f"there are two exports called {export.name!r}: give each a name of its own"
            seen.add(export.name)
        for endpoint in self.listen:
            try:
                endpoint.check_plaintext(self.plaintext_may_listen)
            except UsageError as error:
                yield "listen", str(error)
        directories = [os.path.realpath(area.path) for area in self.swap]
        for number, area in enumerate(self.swap):
            if directories[number] in directories[:number]:
                yield "swap", f"{area.path} is named twice: name each directory once"
        if self.memory < MIN_MEMORY:
            told = f"must be at least {format_size(MIN_MEMORY)}: the server itself needs half of it"
            yield "memory", f"--memory {told}"
