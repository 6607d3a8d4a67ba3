"""STARTTLS on a real server: what is agreed inside, what is refused, and what nobody must suffer from."""

import asyncio
import os
import re
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from nbdram.config import Endpoint, Limits, TlsSettings
from nbdram.errors import NbdramError
from nbdram.protocol.handshake import Failure, ReplyMode
from nbdram.protocol.wire import Command, Option, OptionReply
from nbdram.server import doors
from nbdram.server.tls import Tls, load, names_of
from tests.certificates import Authority, Certificates
from tests.helpers import (
    ALL_MODES,
    MIB,
    PATIENCE_S,
    REPLY_MAGIC,
    Client,
    OptionAnswer,
    Served,
    eventually,
    go,
    info_payload,
    option,
    served,
)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@dataclass
class Secured(Served):
    """A server with TLS on loopback, too, and a client's view of its certificates."""

    certificates: Certificates

    @property
    def tls(self) -> Tls:
        assert self.server.service.tls
        return self.server.service.tls

    @property
    def failures(self) -> dict[str, int]:
        return self.server.service.counters.handshake_failures

    async def plain(self, source: str = "127.0.0.1") -> Client:
        """Connected over TCP, and greeted."""
        port = next(endpoint.port for endpoint in self.server.endpoints if endpoint.host)
        client = Client(*await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0)))
        try:
            await client.greet()
        except BaseException:
            client.kill()
            raise
        return client

    async def inside(self, context: ssl.SSLContext | None = None, source: str = "127.0.0.1") -> Client:
        """Over TCP, greeted, and in TLS."""
        client = await self.plain(source)
        assert await client.ask(Option.STARTTLS) == [OptionAnswer(Option.STARTTLS, OptionReply.ACK)]
        await upgrade(client, context or trusting(self.certificates.ca))
        return client


async def upgrade(client: Client, context: ssl.SSLContext) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await client.writer.start_tls(context, server_hostname="localhost")


def trusting(authority: Path, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority)
    if certificate:
        context.load_cert_chain(certificate, key)
    return context


async def go_on(client: Client, mode: ReplyMode = ReplyMode.SIMPLE) -> None:
    """From the greeting into the transmission phase."""
    await client.agree(mode)
    answers = await client.ask(Option.GO, info_payload("ram"))
    assert answers[-1].kind == OptionReply.ACK, answers


def open_sockets() -> int:
    """How many this process has."""
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith("socket:") for link in links if link.is_symlink())


@asynccontextmanager
async def secured(directory: Path, certificates: Certificates, **settings: Any) -> AsyncIterator[Secured]:
    listen = (Endpoint(path=str(directory / "nbd.sock")), Endpoint(host="127.0.0.1", port=0))
    files = TlsSettings(certificates.server, certificates.server_key, **settings)
    async with served(directory, "ram=1G", listen=listen, tls=files) as here:
        yield Secured(here.server, here.path, certificates)


# -- inside ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ALL_MODES)
async def test_inside_tls_everything_is_as_outside(tmp_path: Path, certificates: Certificates, mode: ReplyMode) -> None:
    async with secured(tmp_path, certificates) as here, await here.inside() as client:
        await go_on(client, mode)
        for offset, length in ((0, 1), (4096, 4096), (1 << 20, 3 * MIB + 5)):
            data = os.urandom(length)
            await client.write(offset, data)
            assert await client.read(offset, length) == data
        requests = [client.request(Command.READ, at * 4096, 4096) for at in range(500)]
        await client.send(b"".join(requests))
        assert len(await client.replies(500)) == 500
        await client.send(client.request(Command.DISC))
        await here.all_gone()


async def test_what_was_agreed_before_tls_is_forgotten(tmp_path: Path, certificates: Certificates) -> None:
    async with secured(tmp_path, certificates, required=False) as here, await here.plain() as client:
        await client.agree(ReplyMode.STRUCTURED)
        await client.ask(Option.STARTTLS)
        await upgrade(client, trusting(certificates.ca))
        client.mode = ReplyMode.SIMPLE
        await go_on(client)
        await client.write(0, b"simple replies")
        assert await client.read(0, 14) == b"simple replies"


async def test_a_second_starttls_is_invalid_and_harmless(tmp_path: Path, certificates: Certificates) -> None:
    async with secured(tmp_path, certificates) as here, await here.inside() as client:
        assert (await client.ask(Option.STARTTLS))[-1].kind == OptionReply.ERR_INVALID
        await go_on(client)
        assert await client.read(0, 1) == b"\0"


async def test_requests_in_flight_are_answered_inside_tls_when_the_server_stops(
    tmp_path: Path, certificates: Certificates
) -> None:
    async with secured(tmp_path, certificates) as here, await here.inside() as client:
        await go_on(client)
        await client.write(0, b"x" * MIB)
        await client.send(client.request(Command.READ, 0, MIB))
        await eventually(lambda: here.server.exports.at("ram").counters.read_bytes == MIB)
        stopping = asyncio.create_task(here.server.stop())
        assert (await client.replies(1)).popitem()[1].data == b"x" * MIB
        await stopping


# -- outside -----------------------------------------------------------------------------------------


async def test_where_tls_is_required_nothing_is_told_without_it(tmp_path: Path, certificates: Certificates) -> None:
    async with secured(tmp_path, certificates) as here, await here.plain() as client:
        for number, payload in ((Option.LIST, b""), (Option.INFO, info_payload("ram")), (Option.GO, b"x" * 60000)):
            assert await client.ask(number, payload) == [
                OptionAnswer(number, OptionReply.ERR_TLS_REQD, b"this server requires TLS")
            ]
        await client.send(option(Option.EXPORT_NAME, b"ram"))
        assert await client.rest() == b""


async def test_over_a_unix_socket_tls_is_offered_but_not_required(tmp_path: Path, certificates: Certificates) -> None:
    async with secured(tmp_path, certificates) as here:
        await here.still_answers()
        async with await here.client() as client:
            await client.greet()
            await client.ask(Option.STARTTLS)
            await upgrade(client, trusting(certificates.ca))
            await go_on(client)
            assert await client.read(0, 1) == b"\0"


@pytest.mark.parametrize("behind", [go(), b"\x16\x03\x01"], ids=["an option", "a TLS hello"])
async def test_bytes_behind_starttls_end_the_connection(
    tmp_path: Path, certificates: Certificates, behind: bytes
) -> None:
    async with secured(tmp_path, certificates) as here, await here.plain() as client:
        await client.send(option(Option.STARTTLS) + behind)
        assert await client.rest() == b""
        assert here.failures[Failure.PLAINTEXT_BEHIND_STARTTLS] == 1


@pytest.mark.parametrize("said", [go(), os.urandom(64 * 1024), b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x03"])
async def test_what_is_no_tls_fails_by_itself(tmp_path: Path, certificates: Certificates, said: bytes) -> None:
    async with secured(tmp_path, certificates) as here, await here.plain() as client:
        await client.ask(Option.STARTTLS)
        await client.send(said)
        assert REPLY_MAGIC not in await client.rest()
        await here.all_gone()
        assert here.failures[Failure.TLS_FAILED] == 1
        await here.still_answers()


async def test_silence_after_starttls_has_the_deadline_of_the_handshake(
    tmp_path: Path, certificates: Certificates
) -> None:
    async with secured(tmp_path, certificates) as here:
        here.server.service.limits = Limits(handshake_timeout_s=0.2)
        async with await here.plain() as client:
            await client.ask(Option.STARTTLS)
            assert await client.rest() == b""
        await here.all_gone()
        assert here.failures[Failure.LATE] == 1


async def test_half_tls_handshakes_make_room_for_others_and_leave_nothing_behind(
    tmp_path: Path, certificates: Certificates
) -> None:
    async with secured(tmp_path, certificates) as here:
        here.server.service.limits = Limits(handshakes=5)
        before = open_sockets()
        idle = [await here.plain() for _ in range(20)]
        for client in idle[-5:]:
            await client.ask(Option.STARTTLS)
        async with await here.inside() as client:
            await go_on(client)
            assert await client.read(0, 1) == b"\0"
        for client in idle:
            client.kill()
        await here.all_gone()
        assert here.failures[Failure.CROWDED_OUT] == 16
        assert here.failures[Failure.HUNG_UP] + here.failures[Failure.TLS_FAILED] == 4
        await eventually(lambda: open_sockets() <= before)


async def test_newcomers_get_in_while_a_crowd_of_half_open_ones_keeps_coming(
    tmp_path: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From more addresses than would be sure of a place each, and to a server that has places for less of them."""
    monkeypatch.setattr(doors, "_HELD_S", 0.02)
    been_in: Counter[str] = Counter()

    async def half_open(here: Secured, source: str) -> None:
        async with await here.plain(source) as client:
            await client.ask(Option.STARTTLS)
            await client.send(b"\x16\x03\x01\x02\x00\x01\x00")
            been_in[source] += 1
            await client.rest()

    async def comes_back(here: Secured, source: str) -> None:
        while True:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await half_open(here, source)
            await asyncio.sleep(0.01)

    async with secured(tmp_path, certificates) as here:
        here.server.service.limits = Limits(newcomers=100, handshakes=50)
        sources = [f"127.0.0.{number}" for number in range(2, 62)]
        crowd = [asyncio.create_task(comes_back(here, source)) for source in sources]
        await eventually(lambda: all(been_in[source] >= 2 for source in sources))
        had_their_shares = been_in.total()
        await eventually(lambda: been_in.total() > had_their_shares)
        for number in range(100, 110):
            async with await here.inside(source=f"127.0.0.{number}") as client:
                await go_on(client)
                assert await client.read(0, 1) == b"\0"
        assert here.failures[Failure.TOO_FAST]
        assert here.failures[Failure.CROWDED_OUT]
        for one in crowd:
            one.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)
        await here.all_gone()


async def test_who_never_reads_inside_tls_stalls_only_itself(tmp_path: Path, certificates: Certificates) -> None:
    async with secured(tmp_path, certificates) as here, await here.inside() as deaf:
        await go_on(deaf)
        deaf.writer.transport.pause_reading()  # type: ignore[attr-defined]
        here.device().write(0, bytes(b"x" * 65536))
        await deaf.send(b"".join(deaf.request(Command.READ, 0, 65536) for _ in range(5000)))
        (stalled,) = here.connections
        await eventually(lambda: bool(stalled._unsent))
        await here.still_answers()
        async with await here.inside() as client:
            await go_on(client)
            assert await client.read(MIB, MIB) == bytes(MIB)
        assert here.server.exports.at("ram").counters.read_bytes < 50 * MIB


async def test_too_many_open_files_end_only_the_connection_that_would_turn_to_tls(
    tmp_path: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> int:
        raise OSError(24, "Too many open files")

    async with secured(tmp_path, certificates) as here, await here.plain() as client:
        with monkeypatch.context() as patched:
            patched.setattr(os, "dup", refuse)
            await client.send(option(Option.STARTTLS))
            assert len(await client.rest()) == 20
        await here.still_answers()


# -- clients' certificates ---------------------------------------------------------------------------


async def test_clients_show_a_certificate_of_the_right_authority_or_are_refused(
    tmp_path: Path, certificates: Certificates
) -> None:
    other = Certificates(tmp_path / "other")
    ours, theirs = certificates.directory, other.directory
    async with secured(tmp_path, certificates, client_ca=certificates.ca) as here:
        shown = trusting(certificates.ca, ours / "client-cert.pem", ours / "client-key.pem")
        async with await here.inside(shown) as client:
            await go_on(client)
            assert here.connection().client.names == {"alice.example.org"}
        await here.all_gone()
        strange = trusting(certificates.ca, theirs / "client-cert.pem", theirs / "client-key.pem")
        for context in (trusting(certificates.ca), strange):
            # With TLS 1.3 a client learns that it was refused from its first read.
            async with await here.inside(context) as client:
                assert await client.rest() == b""
        await eventually(lambda: here.failures[Failure.TLS_FAILED] == 2)


def test_names_are_those_that_people_give_to_clients() -> None:
    certificate = {
        "subject": ((("countryName", "XX"),), (("commonName", "alice"),)),
        "subjectAltName": (
            ("DNS", "a.example"),
            ("email", "a@example"),
            ("URI", "spiffe://x/a"),
            ("IP Address", "::1"),
        ),
    }
    assert names_of(certificate) == {"alice", "a.example", "a@example", "spiffe://x/a"}
    assert names_of(None) == names_of({}) == frozenset()


# -- files -------------------------------------------------------------------------------------------


async def test_new_certificates_are_for_new_connections_and_bad_ones_change_nothing(
    tmp_path: Path, certificates: Certificates
) -> None:
    other = Certificates(tmp_path / "other")
    async with secured(tmp_path, certificates) as here, await here.inside() as old:
        await go_on(old)
        files = TlsSettings(other.server, other.server_key)
        with pytest.raises(NbdramError, match="give the two that match"):
            here.tls.reload(replace(files, key=certificates.server_key))
        async with await here.inside() as client:
            await go_on(client)
        here.tls.reload(files)
        async with await here.inside(trusting(other.ca)) as client:
            await go_on(client)
            await client.write(0, b"hello")
        assert await old.read(0, 5) == b"hello"
        async with await here.plain() as client:
            await client.ask(Option.STARTTLS)
            with pytest.raises(ssl.SSLCertVerificationError):
                await upgrade(client, trusting(certificates.ca))


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("no certificate", "can't read .*server-cert.pem: No such file or directory"),
        ("no key", "can't read .*server-key.pem: No such file or directory"),
        ("no authority", "can't read .*ca-cert.pem: No such file or directory"),
        ("a directory", "can't read .*server-cert.pem: Is a directory"),
        ("an empty certificate", "server-cert.pem holds no certificate in PEM form"),
        ("an empty key", "server-key.pem holds no private key in PEM form"),
        ("garbage for authority", "ca-cert.pem holds no certificate in PEM form"),
        ("another key", r"the key in .*server-key.pem is not that of the certificate in .*server-cert.pem: give"),
        ("a locked key", "server-key.pem is locked by a passphrase: give it without one"),
        ("expired", r"server-cert.pem has expired on \d{4}-\d\d-\d\d \d\d:\d\d UTC"),
        ("too early", r"server-cert.pem is not valid before \d{4}-"),
    ],
)
def test_certificates_that_can_not_be_used_are_told_with_file_and_reason(
    tmp_path: Path, broken: str, told: str
) -> None:
    made = Certificates(tmp_path)
    match broken:
        case "no certificate":
            made.server.unlink()
        case "no key":
            made.server_key.unlink()
        case "no authority":
            made.ca.unlink()
        case "a directory":
            made.server.unlink()
            made.server.mkdir()
        case "an empty certificate":
            made.server.write_text("")
        case "an empty key":
            made.server_key.write_text("")
        case "garbage for authority":
            made.ca.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        case "another key":
            made.authority.issue(tmp_path / "x", made.server_key, "localhost")
        case "a locked key":
            made.authority.issue(made.server, made.server_key, "localhost", password=b"secret")
        case "expired":
            made.authority.issue(made.server, made.server_key, "localhost", days=-1)
        case "too early":
            made.authority.issue(made.server, made.server_key, "localhost", begins=1)
    with pytest.raises(NbdramError, match=told) as raised:
        load(TlsSettings(made.server, made.server_key, made.ca))
    assert "\n" not in str(raised.value)


async def test_a_server_does_not_start_with_an_expired_certificate(tmp_path: Path) -> None:
    made = Certificates(tmp_path)
    Authority(made.ca, "another").issue(made.server, made.server_key, "localhost", days=-1)
    with pytest.raises(NbdramError, match=re.escape(str(made.server)) + " has expired"):
        async with secured(tmp_path, made):
            pytest.fail("it started")
    assert not (tmp_path / "nbd.sock").exists()
