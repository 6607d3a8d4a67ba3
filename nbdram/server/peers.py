"""Who is at the other end of a socket, as the kernel knows it."""

import socket
import struct
from collections.abc import Hashable
from typing import Any, Final

from nbdram.access import Client, address_of

_SO_PEERGROUPS: Final = 59
_CREDENTIALS: Final = struct.Struct("iII")  # pid, uid, gid
_MAX_GROUPS: Final = 256  # Python asks for no more bytes than that


def origin_of(client: Client) -> Hashable:
    """What counts as one place: an address, or of IPv6, where one machine has many, the network; a local user."""
    address = client.address
    if address is None:
        return "user", client.uid
    return address if address.version == 4 else int(address) >> 64


def peer_of(sock: Any) -> Client:
    """The address of a TCP client; the user and groups of one of a Unix socket, as they were when it connected."""
    if sock.family != socket.AF_UNIX:
        try:
            return Client(address=address_of(sock.getpeername()[0]))
        except OSError:  # it has gone already
            return Client()
    _, uid, gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    try:
        groups = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MAX_GROUPS)
    except OSError:  # more than that: the first one must do
        groups = b""
    return Client(uid=uid, gids=frozenset({gid, *struct.unpack(f"{len(groups) // 4}I", groups)}))
