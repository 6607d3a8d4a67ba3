"""Connections for the kernel: dialled, haggled over and checked here, then given away."""

import select
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from nbdram.client.attachment import Attachment
from nbdram.client.session import Session, read_identity
from nbdram.config import format_size, parse_nbd_uri
from nbdram.errors import NbdramError
from nbdram.protocol import client_handshake as handshake
from nbdram.protocol.client_handshake import RemoteExport
from nbdram.protocol.wire import TransmissionFlag

_KEEPALIVE_IDLE_S: Final = 5
_KEEPALIVE_INTERVAL_S: Final = 2
_KEEPALIVE_PROBES: Final = 3
_UNACKNOWLEDGED_MS: Final = 12_000

HANGUP: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


class WrongExport(NbdramError):
    """What answers is not what was lost; trying again helps only if another server takes its place."""


@dataclass(frozen=True)
class Link:
    """A connection in the transmission phase, with what the server said of the export."""

    socket: socket.socket
    export: RemoteExport
    identity: str

    def hung_up(self) -> bool:
        return bool(hung_up([self.socket]))


def dial(uri: str) -> Link:
    """A new connection to the export, with simple replies, the only ones that a kernel understands."""
    endpoint, name = parse_nbd_uri(uri)
    session = Session(endpoint)
    try:
        export = session.run(handshake.go(name))
        sock = session.release()
        _notice_silence(sock)
        # Asked after our own connection stands, and that one still stands then: so both speak of the same server.
        # A server that takes one connection at a time would let us wait, or end itself behind us: it isn't asked.
        several = export.flags & TransmissionFlag.CAN_MULTI_CONN
        identity = read_identity(endpoint, name) if several else ""
        link = Link(sock, export, identity)
        if link.hung_up():
            raise NbdramError("the server hung up")
    except BaseException:
        session.release().close()
        raise
    return link


def redial(attachment: Attachment) -> Link:
    """A new connection to the same device as before; WrongExport if it is another one."""
    link = dial(attachment.uri)
    try:
        check_same(attachment, link)
    except BaseException:
        link.socket.close()
        raise
    return link


def check_same(attachment: Attachment, link: Link) -> None:
    export = link.export
    if attachment.identity and link.identity != attachment.identity:
        raise WrongExport(
            f"the server has another device under this name now ({link.identity or 'it does not say which'}, "
            f"not {attachment.identity}): the data is not there, and it is not attached in its place"
        )
    if export.size < attachment.size:
        raise WrongExport(
            f"the export has only {format_size(export.size)} now, and had {format_size(attachment.size)}: "
            "it is not attached in its place"
        )
    if attachment.flags and export.flags != attachment.flags:
        raise WrongExport(
            f"the export has other flags now ({export.flags:#x}, not {attachment.flags:#x}): "
            "the kernel can't change them, so it is not attached in its place"
        )


def ask_size(uri: str) -> int:
    """The export's size now, in bytes."""
    endpoint, name = parse_nbd_uri(uri)
    with Session(endpoint) as session:
        export = session.run(handshake.info(name))
        session.run(handshake.abort())
    return export.size


def hung_up(sockets: list[socket.socket]) -> list[socket.socket]:
    """Those of `sockets` whose other end is gone. Nothing is read: what arrives is for the kernel."""
    poll = select.poll()
    by_descriptor = {sock.fileno(): sock for sock in sockets}
    for descriptor in by_descriptor:
        poll.register(descriptor, select.POLLRDHUP)
    return [by_descriptor[descriptor] for descriptor, events in poll.poll(0) if events]


def _notice_silence(sock: socket.socket) -> None:
    """Over TCP a host that is gone does not hang up: have the kernel find out."""
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    with suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS)
