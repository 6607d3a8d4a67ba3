"""What users write: sizes, exports, addresses. Anything is either understood or refused by one sentence.

The first byte chooses the parser; the rest is the text.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from nbdram.access import parse_bandwidth, parse_certificates, parse_networks
from nbdram.config import ExportSettings, SwapSettings, parse_listen, parse_metrics, parse_nbd_uri, parse_size
from nbdram.config_remote import parse_swap
from nbdram.errors import UsageError


def _uri(text: str) -> None:
    endpoint, name = parse_nbd_uri(text)
    if endpoint.tls:  # such an address is never written again
        return
    again = endpoint.uri(name)
    assert parse_nbd_uri(again) == (endpoint, name), "an address means something else when it is written again"


def _export(text: str) -> None:
    settings = ExportSettings.parse(text)
    assert settings.size > 0
    assert len(settings.name.encode(errors="surrogateescape")) <= 4096


def _size(text: str) -> None:
    assert parse_size(text) >= 0


def _swap(text: str) -> None:
    if "auth-file" not in text:  # which is read
        parse_swap(text.split(" "))


PARSERS: Final[tuple[Callable[[str], Any], ...]] = (
    _size,
    _export,
    _uri,
    parse_listen,
    parse_metrics,
    SwapSettings.parse,
    _swap,
    lambda text: parse_networks(text.split(" ")),
    parse_certificates,
    parse_bandwidth,
)


def one(data: bytes) -> None:
    """An execution; raises if anything is wrong."""
    if not data:
        return
    text = data[1:].decode(errors="surrogateescape")
    with suppress(UsageError):
        PARSERS[data[0] % len(PARSERS)](text)


# What users are told to write; the number is that of the parser.
SEEDS: Final = (
    *((0, text) for text in ("64M", "16G", "1TiB", "512", "1.5G", "0x10")),
    *((1, text) for text in ("scratch=64G", "a=1M,ro,description=for builds", "disk=1T,density,allow=10.0.0.0/8")),
    (2, "nbd+unix:///scratch?socket=/run/nbdram.sock"),
    (2, "nbd://[::1]:10809/a%20name"),
    (2, "nbds://example.org/x"),
    *((3, text) for text in ("unix:/run/nbd.sock", "tcp://127.0.0.1:10809", "unix:/a,mode=0660,group=disk", "vsock:1")),
    *((4, text) for text in ("127.0.0.1:9810", "off", "unix:/run/metrics", "[::]:1")),
    (5, "disk:/var/swap,max=10G"),
    *((6, text) for text in ("disk:/a,max=1G disk:/b", "redis://h:6379,h2:1/0?prefix=x", "remote:a:1,b:2 disk:/a")),
    *((7, text) for text in ("10.0.0.0/8 ::1 192.168.1.7", "fe80::/10")),
    (8, "client.example.org"),
    *((9, text) for text in ("100M", "1G/s", "unlimited")),
)
