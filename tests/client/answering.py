"""A server that says what a test wants it to say, whatever is asked."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nbdram.config import Endpoint


@contextmanager
def answering(directory: Path, answer: bytes, *, hang_up: bool = True) -> Iterator[Endpoint]:
    """Takes one client in, sends it `answer`, and hangs up, or waits until the client does."""
    path = directory / "fake.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        sock.settimeout(20)

        def serve() -> None:
            connection, _ = sock.accept()
            with connection, suppress(ConnectionError):  # a client may leave without hearing it all
                connection.sendall(answer)
                if hang_up:
                    connection.shutdown(socket.SHUT_WR)
                connection.settimeout(20)
                while connection.recv(1 << 16):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Endpoint(path=str(path))
        finally:
            thread.join()
