"""TLS: certificates, and the upgrade of a connection that has said STARTTLS.

    client --TLS-- _Side (outer) | _Side (inner) --socket pair-- Connection
                         the TLS thread          |     the server's own loop

A thread with a loop of its own does all of TLS: handshakes, in which a signature alone takes a millisecond and more,
and afterwards what is encrypted and decrypted, both of which let go of the interpreter's lock. The Connection goes on
at the near end of a socket pair. So the hot loop has a plain socket under it whoever is at the other end, the server's
loop is never held by cryptography, and what TLS costs is paid by those who use it.

Rules:
1. From STARTTLS until TLS is up, an Upgrade stands in for the connection's transport. The connection counts as one
   that haggles, with the deadline that it had.
2. Neither side reads more than the other one can write: a client that does not read stalls its connection, as ever.
3. Nothing is resumed (no session tickets): who comes back shows its certificate again, to the authorities of now.
"""

import asyncio
import logging
import socket
import ssl
import threading
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import uvloop

from nbdram.config import TlsSettings
from nbdram.errors import NbdramError

if TYPE_CHECKING:  # what is not for types is imported by who needs it: it takes a seventh of a server's start
    from cryptography import x509

    from nbdram.server.connection import Connection

log = logging.getLogger("nbdram.tls")

_HANDSHAKE_TIMEOUT_S: Final = 60.0  # the connection's own deadline comes first
_SHUTDOWN_TIMEOUT_S: Final = 5.0  # a client that is to be hung up on has so long to take what is left
_WRITE_BUFFER_BYTES: Final = 256 * 1024
_SOCKET_BUFFER_BYTES: Final = 1024 * 1024


@dataclass(frozen=True)
class Credentials:
    """A certificate with its key and the authorities for clients, ready for use. `expires` in seconds since 1970."""

    context: ssl.SSLContext
    expires: float
    fingerprint: bytes


def load(settings: TlsSettings) -> Credentials:
    """Read and check all files; one NbdramError says what is wrong with which."""
    from cryptography.hazmat.primitives.hashes import SHA256

    certificate, key_path = settings.certificate, settings.key
    ours = own_certificate(certificate)
    key = private_key(key_path)
    if key.public_key() != ours.public_key():
        raise NbdramError(
            f"the key in {key_path} is not that of the certificate in {certificate}: give the two that match"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0
    try:
        context.load_cert_chain(certificate, key_path)
        if settings.client_ca:
            authorities(settings.client_ca)
            context.load_verify_locations(settings.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (ssl.SSLError, OSError) as error:
        raise NbdramError(f"{certificate} can't be used for TLS: {error.strerror or error}") from error
    return Credentials(context, ours.not_valid_after_utc.timestamp(), ours.fingerprint(SHA256()))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NbdramError(f"can't read {path}: {error.strerror}") from error


def own_certificate(path: Path) -> "x509.Certificate":
    """The first in a file; those behind it are for clients to judge."""
    first = _certificates(path)[0]
    _check_dates(first, path)
    return first


def authorities(path: Path) -> "list[x509.Certificate]":
    """All in a file."""
    found = _certificates(path)
    for authority in found:
        _check_dates(authority, path)
    return found


def _certificates(path: Path) -> "list[x509.Certificate]":
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(_read(path))
    except ValueError as error:
        raise NbdramError(f"{path} holds no certificate in PEM form") from error


def private_key(path: Path) -> Any:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        return load_pem_private_key(_read(path), None)
    except TypeError as error:
        raise NbdramError(f"the key in {path} is locked by a passphrase: give it without one") from error
    except ValueError as error:
        raise NbdramError(f"{path} holds no private key in PEM form") from error


def _check_dates(certificate: "x509.Certificate", path: Path) -> None:
    now = datetime.now(UTC)
    if certificate.not_valid_after_utc < now:
        raise NbdramError(
            f"the certificate in {path} has expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC: renew it"
        )
    if certificate.not_valid_before_utc > now:
        begins = certificate.not_valid_before_utc
        raise NbdramError(f"the certificate in {path} is not valid before {begins:%Y-%m-%d %H:%M} UTC")


def names_of(certificate: dict[str, Any] | None) -> frozenset[str]:
    """The names in a client's certificate: common name, DNS, e-mail and URI."""
    if not certificate:
        return frozenset()
    subject = [pair for part in certificate.get("subject", ()) for pair in part]
    names = [value for kind, value in subject if kind == "commonName"]
    names += [value for kind, value in certificate.get("subjectAltName", ()) if kind in ("DNS", "email", "URI")]
    return frozenset(names)


class Tls:
    """The TLS thread, and the credentials that new connections are shown."""

    def __init__(self, settings: TlsSettings) -> None:
        self.credentials: Credentials = load(settings)
        self.loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self.clients: set[_Side] = set()  # the TLS thread's
        self._thread = threading.Thread(target=self._run, name="nbdram-tls", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def reload(self, settings: TlsSettings) -> None:
        """Take new files for connections to come; NbdramError if they are no good, and then the old ones are kept."""
        self.credentials = load(settings)

    def take(self, sock: socket.socket, connection: "Connection") -> "Upgrade":
        """Begin TLS on a socket, which is ours from now on."""
        upgrade = Upgrade(self, connection)
        self.loop.call_soon_threadsafe(upgrade.begin, sock, self.credentials.context)
        return upgrade

    async def stop(self) -> None:
        """Let clients take what has been sent to them, for a while; then end."""
        done = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._part(), self.loop))
        await done
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _part(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_SHUTDOWN_TIMEOUT_S):
                while self.clients:
                    await asyncio.sleep(0.01)
        for client in list(self.clients):
            client.transport.abort()
        await asyncio.sleep(0)


class Upgrade:
    """One connection on its way into TLS, and until then what it has for a transport."""

    def __init__(self, tls: Tls, connection: "Connection") -> None:
        self._tls = tls
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._over = False
        self._task: asyncio.Task[None] | None = None  # the TLS thread's
        self._entry: asyncio.Task[None] | None = None

    # -- as a transport ----------------------------------------------------------------------------

    def get_extra_info(self, name: str) -> Any:
        return None

    def write(self, data: bytes) -> None:
        raise RuntimeError("nothing is sent while TLS is being set up")

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        raise RuntimeError("a connection turns to TLS once")

    def abort(self) -> None:
        if not self._over:
            self._over = True
            self._tls.loop.call_soon_threadsafe(self._cancel)
            self._loop.call_soon(self._connection.connection_lost, None)

    close = abort

    # -- in the TLS thread -------------------------------------------------------------------------

    def begin(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self._task = self._tls.loop.create_task(self._shake_hands(sock, context))
        # Also if the task is cancelled before it has begun. A transport keeps the socket open for as long as it lives.
        self._task.add_done_callback(lambda _: sock.close())

    def _cancel(self) -> None:
        if self._task:
            self._task.cancel()

    async def _shake_hands(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        loop = self._tls.loop
        outer, inner = _Side(self._tls.clients), _Side()
        try:
            await loop.connect_accepted_socket(
                lambda: outer,
                sock,
                ssl=context,
                ssl_handshake_timeout=_HANDSHAKE_TIMEOUT_S,
                ssl_shutdown_timeout=_SHUTDOWN_TIMEOUT_S,
            )
            outer.transport.set_write_buffer_limits(_WRITE_BUFFER_BYTES)
            near, far = socket.socketpair()
            far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
            await loop.connect_accepted_socket(lambda: inner, far)
        except OSError as error:  # what OpenSSL says, and time-outs, too
            outer.hang_up()
            self._loop.call_soon_threadsafe(self._failed, _reason(error))
            return
        except BaseException:
            outer.hang_up()
            raise
        outer.other, inner.other = inner, outer
        if outer.transport.is_closing():  # the client has gone meanwhile
            inner.hang_up()
        names = names_of(outer.transport.get_extra_info("peercert"))
        self._loop.call_soon_threadsafe(self._secured, near, names, outer)

    # -- in the server's loop ----------------------------------------------------------------------

    def _failed(self, reason: str) -> None:
        if not self._over:
            self._connection.tls_failed(reason)

    def _secured(self, near: socket.socket, names: frozenset[str], outer: "_Side") -> None:
        if self._over:
            near.close()
        else:
            self._entry = self._loop.create_task(self._enter(near, names, outer))

    async def _enter(self, near: socket.socket, names: frozenset[str], outer: "_Side") -> None:
        """Put the connection on its new socket, and only then let the client speak."""
        near.setblocking(False)
        transport, _ = await self._loop.connect_accepted_socket(asyncio.Protocol, near)
        if self._over:
            transport.abort()
            return
        self._over = True
        transport.set_protocol(self._connection)
        self._connection.secured(transport, names)
        self._tls.loop.call_soon_threadsafe(outer.resume)


class _Side(asyncio.Protocol):
    """One end of the pump: hands on to the other what it receives, as fast as that takes it.

    The TLS end begins paused, which uvloop heeds there and nowhere else.
    """

    def __init__(self, all_sides: "set[_Side] | None" = None) -> None:
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.other: _Side = self
        self._all = all_sides if all_sides is not None else set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.pause_reading()
        self._all.add(self)

    def data_received(self, data: bytes) -> None:
        if not self.other.transport.is_closing():
            self.other.transport.write(data)

    def eof_received(self) -> None:
        if not self.other.transport.is_closing() and self.other.transport.can_write_eof():
            self.other.transport.write_eof()

    def pause_writing(self) -> None:
        if not self.other.transport.is_closing():
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        self.other.resume()

    def resume(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def connection_lost(self, error: BaseException | None) -> None:
        self._all.discard(self)
        self.other.transport.close()

    def hang_up(self) -> None:
        if self.transport is not None:
            self.transport.abort()


def _reason(error: OSError) -> str:
    """What went wrong in a TLS handshake, in OpenSSL's words if they are its own."""
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return error.strerror or str(error) or "the client hung up"
