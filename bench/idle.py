"""Connections that do nothing: an NBD client that shakes hands and then sits there."""

import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from bench.errors import BenchError
from bench.servers import DEFAULT_EXPORT, Server

_TIMEOUT_S: Final = 20.0
_IHAVEOPT: Final = b"IHAVEOPT"
_OPTION_REPLY: Final = 0x0003E889045565A9
_FIXED_NEWSTYLE_NO_ZEROES: Final = 3
_OPT_GO: Final = 7
_REP_ACK: Final = 1
_REP_ERROR: Final = 1 << 31


@contextmanager
def connections(server: Server, count: int, export: str = DEFAULT_EXPORT) -> Iterator[None]:
    """`count` connections in the transmission phase, until the block ends."""
    with ExitStack() as stack:
        for number in range(count):
            try:
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.settimeout(_TIMEOUT_S)
                sock.connect(str(server.socket_path))
                _shake_hands(sock, export.encode())
            except OSError as error:
                where = f"connection {number + 1} of {count} to {server.name}"
                raise BenchError(f"{where} failed: {error}") from None
        yield


def _shake_hands(sock: socket.socket, export: bytes) -> None:
    greeting = _receive(sock, 18)
    if not greeting.startswith(b"NBDMAGIC" + _IHAVEOPT):
        raise OSError("no newstyle server")
    data = struct.pack(f">I{len(export)}sH", len(export), export, 0)
    option = struct.pack(">8sII", _IHAVEOPT, _OPT_GO, len(data)) + data
    sock.sendall(struct.pack(">I", _FIXED_NEWSTYLE_NO_ZEROES) + option)
    while True:
        magic, _, kind, length = struct.unpack(">QIII", _receive(sock, 20))
        text = _receive(sock, length)
        if magic != _OPTION_REPLY or kind & _REP_ERROR:
            raise OSError(f"NBD_OPT_GO was refused: {text!r}")
        if kind == _REP_ACK:
            return


def _receive(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = sock.recv(length - len(data))
        if not more:
            raise OSError("closed during the handshake")
        data += more
    return data
