"""What a user may write, and what a mistake is told."""

import os
from pathlib import Path

import pytest

from nbdram.access import Rules
from nbdram.config import (
    ClientTls,
    Endpoint,
    ExportSettings,
    ServeSettings,
    SwapSettings,
    absolute_uri,
    default_listen,
    format_size,
    parse_listen,
    parse_metrics,
    parse_nbd_uri,
    parse_size,
    runtime_directory,
)
from nbdram.errors import UsageError
from tests.helpers import GIB, KIB, MIB, TIB

RAM = ExportSettings("ram", TIB)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("64M", 64 * MIB), ("16g", 16 * GIB), ("1TiB", TIB), ("2 KB", 2 * KIB), ("5B", 5)],
)
def test_sizes_are_powers_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1.5G", "1e3", "0x10", "1GG", "16 giga", "1Gi", "٣", "9" * 5000])
def test_what_is_no_size_is_told_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size: write a whole number and K, M, G or T, as in 16G"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (KIB, "1 KiB"), (1536, "1.5 KiB"), (64 * MIB, "64 MiB"), (TIB, "1 TiB")],
)
def test_sizes_are_said_in_the_largest_unit(size: int, text: str) -> None:
    assert format_size(size) == text


# -- exports -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("a=1G", ExportSettings("a", GIB)),
        ("a=64T", ExportSettings("a", 64 * TIB)),
        ("a b/ü=4096", ExportSettings("a b/ü", 4096)),
        ("a=1G,ro", ExportSettings("a", GIB, read_only=True)),
        ("a=1G,density,ro", ExportSettings("a", GIB, read_only=True, dense=True)),
        ("a=1G,description=x, y=z,ro", ExportSettings("a", GIB, description="x, y=z,ro")),
        (
            "a=1G,network=10.0.0.0/8,user=0,group=7,ro,network=::1,certificate=*.b,iops=5,bandwidth=1M,description=x",
            ExportSettings(
                "a",
                GIB,
                read_only=True,
                description="x",
                rules=Rules.parse(
                    {
                        "networks": ["10.0.0.0/8", "::1"],
                        "users": [0],
                        "groups": [7],
                        "certificates": ["*.b"],
                        "iops": 5,
                        "bandwidth": MIB,
                    }
                ),
            ),
        ),
        ("a=1G,ro,description=", ExportSettings("a", GIB, read_only=True)),
    ],
)
def test_an_export_is_a_name_a_size_and_options(text: str, settings: ExportSettings) -> None:
    assert ExportSettings.parse(text) == settings


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "write NAME=MAXSIZE, as in scratch=16G"),
        ("scratch", "write NAME=MAXSIZE"),
        ("=16G", "write NAME=MAXSIZE"),
        ("a=", "is not a size"),
        ("a=many", "'many' is not a size"),
        ("a=0", "must be a multiple of 4096 bytes, above 0"),
        ("a=4097", "must be a multiple of 4096 bytes"),
        ("a=65T", "can have at most 64 TiB"),
        ("a=1G,rw", "there is no option 'rw'; known are ro, density, network=, user=, .* and description=TEXT"),
        ("a=1G,network=10.0.0.1/8", "networks: '10.0.0.1/8' is not a network: write 10.0.0.0/8"),
        ("a=1G,user=nobody-at-all", "users: there is no user called 'nobody-at-all' here"),
        ("a=1G,iops=many", "iops: 'many' is not a number of requests a second"),
        ("a=1G,ro,,", "there is no option ''"),
        ("x" * 4097 + "=1G", "name may have at most 4096 bytes"),
        ("ü" * 2049 + "=1G", "name may have at most 4096 bytes"),
        ("a\nb=1G", "can't be printed"),
        ("a\udcff=1G", "can't be printed"),
        ("a=1G,description=" + "x" * 4097, "at most 4096 bytes"),
        ("a=1G,description=a\x1b[2J", "can't be printed"),
        ("a=1G,description=\udcff", "can't be printed"),
    ],
)
def test_a_malformed_export_is_told_what_is_wrong(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        ExportSettings.parse(text)


def test_two_exports_of_one_name_are_refused() -> None:
    settings = ServeSettings(exports=(RAM, RAM), listen=(), memory=GIB)
    with pytest.raises(UsageError, match="there are two exports called 'ram': give each a name of its own"):
        settings.check()


def test_too_little_memory_for_the_server_itself_is_refused() -> None:
    with pytest.raises(UsageError, match="--memory must be at least 32 MiB"):
        ServeSettings(exports=(RAM,), listen=(), memory=32 * MIB - 1).check()


def test_swap_is_a_directory_and_a_maximum() -> None:
    assert SwapSettings.parse("disk:/var/swap") == SwapSettings(Path("/var/swap"))
    assert SwapSettings.parse("disk:/a,b,max=2G") == SwapSettings(Path("/a,b"), 2 * GIB)


@pytest.mark.parametrize(
    "text", ["", "disk", "disk:", "/var/swap", "tape:/x", "disk:/x,max=lots", "disk:/x,size=1G", "disk:/x,max=0"]
)
def test_malformed_swap_is_told_the_form(text: str) -> None:
    with pytest.raises(
        UsageError,
        match=r"^--swap '.*': ('lots' is not a size|write disk:PATH or|there is no option 'size'|max must be at least)",
    ):
        SwapSettings.parse(text)


# -- addresses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("fd", Endpoint(inherited=True)),
        ("unix:/run/a b.sock", Endpoint(path="/run/a b.sock")),
        ("unix:relative", Endpoint(path="relative")),
        ("tcp://127.0.0.1", Endpoint(host="127.0.0.1")),
        ("tcp://127.0.0.1:0", Endpoint(host="127.0.0.1", port=0)),
        ("tcp://[::1]:10810/", Endpoint(host="::1", port=10810)),
        ("tcp://localhost:1", Endpoint(host="localhost", port=1)),
    ],
)
def test_a_server_listens_where_it_is_told(text: str, endpoint: Endpoint) -> None:
    assert parse_listen(text) == endpoint


MALFORMED_LISTENERS = """
    unix: tcp: tcp:// tcp://:10809 tcp://h:99999 tcp://h:x tcp://[::1 tcp://h/export tcp://h?a=b tcp://h#x tcp://user@h
    udp://h 127.0.0.1:10809 /run/nbd.sock FD
"""


@pytest.mark.parametrize("text", ["", *MALFORMED_LISTENERS.split()])
def test_a_malformed_listener_is_told_the_forms(text: str) -> None:
    with pytest.raises(UsageError, match="write unix:PATH, tcp://HOST:PORT or fd"):
        parse_listen(text)


def test_a_path_too_long_for_a_unix_socket_is_told_so() -> None:
    assert parse_listen("unix:" + "x" * 107).path
    with pytest.raises(UsageError, match="at most 107 bytes"):
        parse_listen("unix:" + "ü" * 54)


def is_good(settings: ServeSettings) -> bool:
    try:
        settings.check()
    except UsageError:
        return False
    return True


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_permission(host: str) -> None:
    assert is_good(ServeSettings((RAM,), (Endpoint(host=host),), GIB))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "fe80::1", "example.org", "127.example.org", "127.1"])
def test_plaintext_for_others_is_refused_unless_it_is_allowed(host: str) -> None:
    listen = (Endpoint(path="/run/x"), Endpoint(host=host))
    with pytest.raises(UsageError, match=r"without encryption: listen on .* or allow it with --allow-plaintext"):
        ServeSettings((RAM,), listen, GIB).check()
    assert is_good(ServeSettings((RAM,), listen, GIB, allow_plaintext=True))


NAMES = ["ram", "", "a b", "100%", "ü/ö", "/dev/x", "a?b#c&socket=d", "n+m"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "endpoint",
    [
        Endpoint(path="/run/nbd.sock"),
        Endpoint(path="/run/a b+c&d?e#f=g.sock"),
        Endpoint(host="127.0.0.1"),
        Endpoint(host="::1", port=10810),
        Endpoint(host="localhost", port=1),
    ],
    ids=str,
)
def test_the_uri_that_is_printed_leads_back(endpoint: Endpoint, name: str) -> None:
    assert parse_nbd_uri(endpoint.uri(name)) == (endpoint, name)


def test_a_socket_may_have_any_name_and_an_export_one_in_utf_8() -> None:
    endpoint = Endpoint(path=os.fsdecode(b"/run/\xff\xfe"))
    assert parse_nbd_uri(endpoint.uri("a")) == (endpoint, "a")
    for name in ("%FF", os.fsdecode(b"\xff")):
        with pytest.raises(UsageError, match="not in UTF-8"):
            parse_nbd_uri(f"nbd://localhost/{name}")


@pytest.mark.parametrize(("written", "raw"), [("%D1%8A", b"\xd1\x8a"), ("\udcd1%8A%91", b"\xd1\x8a\x91")])
def test_a_socket_is_known_by_its_bytes_however_they_are_written(written: str, raw: bytes) -> None:
    endpoint, name = parse_nbd_uri(f"nbd+unix:///a?socket=/{written}")
    assert endpoint.path == os.fsdecode(b"/" + raw)
    assert parse_nbd_uri(endpoint.uri(name)) == (endpoint, name)


@pytest.mark.parametrize("character", ["\t", "\r", "\n", "\0", "\x7f"])
def test_a_control_character_in_a_uri_is_not_left_out(character: str) -> None:
    with pytest.raises(UsageError, match="a control character % and two digits"):
        parse_nbd_uri(f"nbd+unix:///a?socket=/b{character}c")
    for parse, address in ((parse_listen, "tcp://127.0.0.1{}:1"), (parse_metrics, "127.0.0.1:981{}0")):
        with pytest.raises(UsageError, match="write"):
            parse(address.format(character))
    endpoint, _ = parse_nbd_uri(f"nbd+unix:///a?socket=/b%{ord(character):02x}c")
    assert endpoint.path == f"/b{character}c"


def test_uris_of_other_hands_are_understood() -> None:
    assert parse_nbd_uri("nbd://localhost") == (Endpoint(host="localhost"), "")
    assert parse_nbd_uri("nbd+unix:///?socket=/tmp/a+b") == (Endpoint(path="/tmp/a+b"), "")
    tls = ClientTls(Path("/certificates"), "localhost")
    assert parse_nbd_uri("nbds+unix:///x?socket=/s&tls-certificates=/certificates") == (Endpoint("/s", tls=tls), "x")
    tls = ClientTls(None, "h")
    assert parse_nbd_uri("nbds://h:1/x") == (Endpoint(host="h", port=1, tls=tls), "x")
    assert parse_nbd_uri("nbds://h:1/?tls-hostname=n") == (Endpoint(host="h", port=1, tls=ClientTls(None, "n")), "")
    with pytest.raises(UsageError, match="a kernel speaks no TLS: let nbd-client do it"):
        absolute_uri("nbds://h/x")
    assert parse_nbd_uri("nbd+unix:///x?tls-psk-file=/k&socket=%2Ftmp%2Fs") == (Endpoint(path="/tmp/s"), "x")


@pytest.mark.parametrize(
    "text",
    ["", "ram", "nbd:", "nbd://", "nbd:///x", "http://h/x", "nbds:///x", "nbdx://h/x", "nbd://h:x/", "nbd://[::1/x"],
)
def test_what_is_no_nbd_uri_is_told_so(text: str) -> None:
    with pytest.raises(UsageError, match="is not an NBD URI"):
        parse_nbd_uri(text)


@pytest.mark.parametrize("text", ["nbd+unix:///x", "nbd+unix:///x?socket=", "nbd+unix:///x?sock=/a"])
def test_a_unix_uri_without_a_socket_is_told_so(text: str) -> None:
    with pytest.raises(UsageError, match="names no socket: write nbd"):
        parse_nbd_uri(text)


def test_sockets_are_in_the_runtime_directory_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert runtime_directory() == Path("/run")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert default_listen() == (Endpoint(path="/run/user/1000/nbdram.sock"), Endpoint(host="127.0.0.1"))
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert runtime_directory() == Path("/tmp")
