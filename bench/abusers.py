"""Clients that mean ill, in a process of their own: `python -m bench.abusers KIND PORT COUNT [CA]`.

Each says "ready" once it does what it is for, and goes on until its standard input ends; then it says how often it has
connected. Those that are hung up on come again at once. They come from many addresses of loopback.
"""

import itertools
import select
import socket
import ssl
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

_IHAVEOPT: Final = b"IHAVEOPT"
_FLAGS: Final = struct.pack(">I", 3)  # fixed newstyle, no zeroes
_GREETING_BYTES: Final = 18
_ACK_BYTES: Final = 20
_NAME: Final = b"ram"
_SOURCES: Final = 200
_AT_ONCE: Final = 256  # storms: clients on their way
_ASKED_BYTES: Final = 1 << 20
_ASKED_TIMES: Final = 64
_SPAN: Final = 1 << 30
_LINGER: Final = struct.pack("ii", 1, 0)  # leave by RST: no port stays behind in TIME_WAIT
_IP_BIND_ADDRESS_NO_PORT: Final = 24
_GONE: Final = select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP
_sources: Iterator[str] = (f"127.0.0.{2 + number % _SOURCES}" for number in itertools.count())


def _option(number: int, payload: bytes) -> bytes:
    return _IHAVEOPT + struct.pack(">II", number, len(payload)) + payload


_GO: Final = _option(7, struct.pack(f">I{len(_NAME)}sH", len(_NAME), _NAME, 0))
_STARTTLS: Final = _option(5, b"")


def client_hello() -> bytes:
    """What a client of TLS says first: making it once is enough."""
    context = ssl.create_default_context()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError("a handshake without an answer")


def _socket(port: int, *, blocking: bool = False) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
    # The memory of what we do not read is to be the server's: it would be another machine's, if we were there.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setsockopt(socket.SOL_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
    sock.bind((next(_sources), 0))
    sock.setblocking(blocking)
    sock.connect_ex(("127.0.0.1", port))
    return sock


class Crowd:
    """`count` clients that say the words of a script, each when so many bytes have come, and then stay or leave."""

    def __init__(self, port: int, count: int, script: list[tuple[int, bytes]], *, leave_at: int = 0) -> None:
        self._port = port
        self._count = count
        self._script = script
        self._leave_at = leave_at  # so many bytes have come; 0: never
        self._epoll = select.epoll()
        self._clients: dict[int, tuple[socket.socket, int, int]] = {}  # with bytes received, and words said
        self.dialled = 0

    def run(self) -> None:
        ready = False
        self._epoll.register(sys.stdin.fileno(), select.EPOLLIN | select.EPOLLHUP)
        while True:
            for _ in range(min(64, self._count - len(self._clients))):
                self._dial()
            if not ready and self.dialled >= self._count:
                ready = True
                print("ready", flush=True)
            for fd, event in self._epoll.poll(0 if len(self._clients) < self._count else 1.0, 1024):
                if fd == sys.stdin.fileno():
                    return
                self._step(fd, event)

    def _dial(self) -> None:
        sock = _socket(self._port)
        self._epoll.register(sock.fileno(), select.EPOLLIN | select.EPOLLRDHUP)
        self._clients[sock.fileno()] = (sock, 0, 0)
        self.dialled += 1

    def _step(self, fd: int, event: int) -> None:
        sock, received, said = self._clients[fd]
        try:
            if event & _GONE:
                raise ConnectionResetError
            received += len(sock.recv(65536))
            while said < len(self._script) and received >= self._script[said][0]:
                sock.send(self._script[said][1])
                said += 1
        except OSError:
            self._leave(fd, sock)
            return
        self._clients[fd] = (sock, received, said)
        if self._leave_at and received >= self._leave_at:
            self._leave(fd, sock)

    def _leave(self, fd: int, sock: socket.socket) -> None:
        del self._clients[fd]
        sock.close()


def half_open(port: int, count: int, *, tls: bool) -> Crowd:
    if tls:
        hello = client_hello()
        script = [(_GREETING_BYTES, _FLAGS + _STARTTLS), (_GREETING_BYTES + _ACK_BYTES, hello[: len(hello) // 2])]
    else:
        script = [(_GREETING_BYTES, _FLAGS + _GO[:-4])]
    return Crowd(port, count, script)


def storm(port: int, *, tls: bool) -> Crowd:
    """Over TLS, each leaves when the server has done its part of the handshake, which is all of the work."""
    if tls:
        acknowledged = _GREETING_BYTES + _ACK_BYTES
        script = [(_GREETING_BYTES, _FLAGS + _STARTTLS), (acknowledged, client_hello())]
        return Crowd(port, _AT_ONCE, script, leave_at=acknowledged + 1)
    opened = _GREETING_BYTES + 2 * _ACK_BYTES
    return Crowd(port, _AT_ONCE, [(_GREETING_BYTES, _FLAGS + _GO)], leave_at=opened)


def deaf(port: int, count: int, ca: str) -> None:
    """Clients that ask for many MiB each, and read nothing."""
    requests = b"".join(
        struct.pack(">IHHQQI", 0x25609513, 0, 0, n, n * _ASKED_BYTES % _SPAN, _ASKED_BYTES) for n in range(_ASKED_TIMES)
    )
    clients: list[socket.socket] = []
    while len(clients) < count:
        with suppress(ConnectionError):  # newcomers have a rate
            clients.append(_ask(port, ca, requests))
    print("ready", flush=True)
    sys.stdin.read()


def _ask(port: int, ca: str, requests: bytes) -> socket.socket:
    sock = _socket(port, blocking=True)
    _receive(sock, _GREETING_BYTES)
    if ca:
        sock.sendall(_FLAGS + _STARTTLS)
        _receive(sock, _ACK_BYTES)
        sock = ssl.create_default_context(cafile=ca).wrap_socket(sock, server_hostname="localhost")
        sock.sendall(_GO)
    else:
        sock.sendall(_FLAGS + _GO)
    _receive(sock, 2 * _ACK_BYTES)
    sock.sendall(requests)
    return sock


def _receive(sock: socket.socket, length: int) -> None:
    while length > 0:
        data = sock.recv(length)
        if not data:
            raise ConnectionError("hung up on")
        length -= len(data)


def main() -> None:
    kind, port, count, ca = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    begun = time.monotonic()
    if kind == "deaf":
        deaf(port, count, ca)
        print(count, flush=True)
        return
    crowd = half_open(port, count, tls=bool(ca)) if kind == "half-open" else storm(port, tls=bool(ca))
    crowd.run()
    print(round(crowd.dialled / (time.monotonic() - begun)), flush=True)


if __name__ == "__main__":
    main()
