"""A small blocking NBD client: enough to look at a server, or to test one."""

import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from nbdram.config import ClientTls, Endpoint
from nbdram.errors import NbdramError, ProtocolError
from nbdram.protocol import client_handshake as ours
from nbdram.protocol import wire
from nbdram.protocol.client_handshake import RemoteExport, Steps, T
from nbdram.protocol.handshake import ReplyMode
from nbdram.protocol.wire import Command, ReplyType

_TIMEOUT_S = 10.0
_STATUS_STEP_BYTES = 1 << 31
_MAX_CHUNK_BYTES = 64 << 20
_NAME_IT = "tls-certificates=DIR into the options of the URI"
_BROKEN = "the server's answer breaks the NBD protocol"


class Session:
    """One connection to an NBD server, from dialling to hanging up; a context manager."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.mode = ReplyMode.SIMPLE
        self.contexts: dict[int, str] = {}
        self._cookie = 0
        self._hung_up = "the server hung up"
        try:
            self._socket = _dial(endpoint)
        except OSError as error:
            denied = endpoint.path and isinstance(error, PermissionError)
            advice = "it is its owner's, so use sudo, or be that user" if denied else "is a server there?"
            raise NbdramError(f"can't reach {endpoint}: {error.strerror or error}; {advice}") from error
        try:
            self.run(ours.greet())
            if endpoint.tls:
                self.run(ours.starttls())
                self._socket = _wrap(self._socket, endpoint.tls)
                if not _has_certificate(endpoint.tls):  # servers may hang up on those without one and not say a word
                    self._hung_up += f": if it asks for a certificate, {_what_to_show(endpoint.tls)}"
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    def run(self, steps: Steps[T]) -> T:
        """Drive one part of the handshake over the socket."""
        try:
            wanted = next(steps)
            while True:
                if isinstance(wanted, int):
                    wanted = steps.send(self._receive(wanted))
                else:
                    self._send(wanted)
                    wanted = next(steps)
        except StopIteration as stop:
            value: T = stop.value
            return value

    def open(self, name: str, contexts: tuple[str, ...] = ()) -> RemoteExport:
        """Agree on the best replies and on `contexts`, and enter the transmission phase."""
        self.mode = self.run(ours.agree_on_replies((ReplyMode.EXTENDED, ReplyMode.STRUCTURED)))
        if contexts and self.mode is not ReplyMode.SIMPLE:
            self.contexts = self.run(ours.set_contexts(name, contexts))
        return self.run(ours.go(name))

    def block_status(self, offset: int, length: int) -> dict[str, list[tuple[int, int]]]:
        """(length, flags) of extents from `offset` on, for each context; may end short of `length`."""
        self._request(Command.BLOCK_STATUS, offset, length)
        found: dict[str, list[tuple[int, int]]] = {}
        for kind, body in self._chunks():
            try:
                if kind == ReplyType.BLOCK_STATUS:
                    (number,) = wire.U32.unpack_from(body)
                    found[self.contexts[number]] = list(wire.EXTENT.iter_unpack(body[4:]))
                elif kind == ReplyType.BLOCK_STATUS_EXT:
                    number, _ = wire.EXTENDED_STATUS_HEAD.unpack_from(body)
                    extents = wire.EXTENDED_EXTENT.iter_unpack(body[wire.EXTENDED_STATUS_HEAD.size :])
                    found[self.contexts[number]] = list(extents)
            except (struct.error, KeyError) as error:
                raise ProtocolError(_BROKEN) from error
        return found

    def map_extents(self, context: str, size: int) -> Iterator[tuple[int, int, int]]:
        """(offset, length, flags) of the whole export in one context, neighbours merged."""
        offset, start, state = 0, 0, -1
        step = size if self.mode is ReplyMode.EXTENDED else _STATUS_STEP_BYTES
        while offset < size:
            extents = self.block_status(offset, min(step, size - offset)).get(context)
            if not extents:
                raise ProtocolError(f"the server sent no {context}")
            for length, flags in extents:
                if not length:
                    raise ProtocolError(_BROKEN)
                if flags != state:
                    if state >= 0:
                        yield start, offset - start, state
                    start, state = offset, flags
                offset = min(offset + length, size)
        yield start, size - start, state

    def release(self) -> socket.socket:
        """The bare socket, without a time limit, for whoever speaks on it from now on."""
        self._socket.settimeout(None)
        return self._socket

    def disconnect(self) -> None:
        self._request(Command.DISC, 0, 0)

    def _request(self, command: Command, offset: int, length: int) -> None:
        self._cookie += 1
        extended = self.mode is ReplyMode.EXTENDED
        layout = wire.EXTENDED_REQUEST if extended else wire.REQUEST
        magic = wire.EXTENDED_REQUEST_MAGIC if extended else wire.REQUEST_MAGIC
        self._send(layout.pack(magic, 0, command, self._cookie, offset, length))

    def _chunks(self) -> Iterator[tuple[int, bytes]]:
        """The chunks of the reply to the last request."""
        done = False
        while not done:
            if self.mode is ReplyMode.EXTENDED:
                header = self._receive(wire.EXTENDED_REPLY.size)
                magic, flags, kind, _, _, length = wire.EXTENDED_REPLY.unpack(header)
            else:
                header = self._receive(wire.STRUCTURED_REPLY.size)
                magic, flags, kind, _, length = wire.STRUCTURED_REPLY.unpack(header)
            if magic not in (wire.EXTENDED_REPLY_MAGIC, wire.STRUCTURED_REPLY_MAGIC):
                raise ProtocolError(_BROKEN)
            if length > _MAX_CHUNK_BYTES:
                raise ProtocolError(f"the server sends a chunk of {length} bytes")
            body = self._receive(length) if length else b""
            if kind in (ReplyType.ERROR, ReplyType.ERROR_OFFSET):
                raise NbdramError(f"the server refused: {body[6:].decode('utf-8', 'replace')}")
            yield kind, body
            done = bool(flags & wire.REPLY_FLAG_DONE)

    def _send(self, data: bytes) -> None:
        with _telling_errors(self._hung_up):
            self._socket.sendall(data)

    def _receive(self, length: int) -> bytes:
        pieces = bytearray()
        with _telling_errors(self._hung_up):
            while len(pieces) < length:
                piece = self._socket.recv(length - len(pieces))
                if not piece:
                    raise NbdramError(self._hung_up)
                pieces += piece
        return bytes(pieces)


@contextmanager
def _telling_errors(hung_up: str) -> Iterator[None]:
    """A socket's errors as sentences."""
    try:
        yield
    except TimeoutError as error:
        raise NbdramError(f"the server has not answered for {_TIMEOUT_S:.0f} s: is it one of NBD?") from error
    except OSError as error:
        raise NbdramError(f"{hung_up} ({error.strerror or error})") from error


def _wrap(sock: socket.socket, tls: ClientTls) -> socket.socket:
    try:
        return _tls_context(tls).wrap_socket(sock, server_hostname=tls.hostname)
    except ssl.SSLCertVerificationError as error:
        told = error.verify_message.rstrip(".")
        if not tls.certificates:
            told += f"; put that of its authority into DIR/ca-cert.pem, and {_NAME_IT}"
        raise NbdramError(f"the server's certificate can't be trusted: {told}") from error
    except OSError as error:
        raise NbdramError(f"TLS with the server failed: {error.strerror or error}") from error


def _tls_context(tls: ClientTls) -> ssl.SSLContext:
    """The files of a directory have the names that libnbd and qemu expect."""
    files = tls.certificates
    try:
        context = ssl.create_default_context(cafile=files / "ca-cert.pem" if files else None)
        if files and _has_certificate(tls):
            context.load_cert_chain(files / "client-cert.pem", files / "client-key.pem")
    except OSError as error:  # also what OpenSSL says of them
        raise NbdramError(f"can't use the certificates in {files}: {error.strerror or error}") from error
    return context


def _has_certificate(tls: ClientTls) -> bool:
    return tls.certificates is not None and (tls.certificates / "client-cert.pem").exists()


def _what_to_show(tls: ClientTls) -> str:
    told = f"put yours into {tls.certificates or 'DIR'}/client-cert.pem and client-key.pem"
    return told if tls.certificates else f"{told}, and {_NAME_IT}"


def read_identity(endpoint: Endpoint, name: str) -> str:
    """The UUID of the device behind an export; "" if the server does not tell. NbdramError if it can't be asked.

    Takes a connection of its own, because contexts go with structured replies, which a kernel does not speak.
    """
    with Session(endpoint) as session:
        if session.run(ours.agree_on_replies((ReplyMode.STRUCTURED,))) is ReplyMode.SIMPLE:
            return ""
        identity = session.run(ours.identity(name))
        session.run(ours.abort())
    return identity


def _dial(endpoint: Endpoint) -> socket.socket:
    if endpoint.path:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(_TIMEOUT_S)
        try:
            sock.connect(endpoint.path)
        except BaseException:
            sock.close()
            raise
        return sock
    return socket.create_connection((endpoint.host, endpoint.port), timeout=_TIMEOUT_S)
