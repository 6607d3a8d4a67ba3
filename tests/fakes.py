"""What stands in for a part of the event loop."""

import asyncio
import socket
from typing import Any

from nbdram.server.connection import Connection
from nbdram.server.service import Service


class FakeTransport:
    """A new connection's transport, as far as it asks for one. Who has it receives for that, unless `paused`."""

    def __init__(self, service: Service, sock: socket.socket) -> None:
        self.sock = sock
        self.paused = False
        self.closed = False
        self.connection = Connection(service)
        self.connection.connection_made(self)  # type: ignore[arg-type]

    def get_extra_info(self, name: str) -> Any:
        return self.sock if name == "socket" else ""

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            asyncio.get_running_loop().call_soon(self._lost)

    abort = close

    def _lost(self) -> None:
        self.connection.connection_lost(None)
        self.sock.close()
