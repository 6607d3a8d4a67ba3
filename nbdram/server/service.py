"""What the connections of one server share: the receive buffer, who is connected, and who may be."""

import logging
from typing import TYPE_CHECKING, Final

from nbdram.config import Limits
from nbdram.memory.fetch import Fetcher
from nbdram.memory.layout import PAGE
from nbdram.protocol.handshake import Failure
from nbdram.server.counters import ServiceCounters
from nbdram.server.doze import Doze
from nbdram.server.exports import Exports
from nbdram.server.haggling import Haggling
from nbdram.server.peers import origin_of
from nbdram.server.watch import Watch

if TYPE_CHECKING:
    from nbdram.server.connection import Connection
    from nbdram.server.tls import Tls

log = logging.getLogger("nbdram.connection")

# A WRITE waits at most this long for memory: below the 30 s after which clients are usually told to give up.
WRITE_WAIT_S: Final = 20.0

RECEIVE_BYTES: Final = 256 * 1024
_HEADER_ROOM: Final = 64  # of it, for the header that comes along with the end of a large payload
# 208 KiB, the default of Unix sockets, hold less than one batch at queue depth 64: 1 MiB gave 256K reads 1.5 times the
# rate. It is the kernel's memory, up to twice as much of it, so it is for those who have been seen to read what they
# had to wait for, and no more of them than make up this share of the budget. TCP would take 4 MiB by itself.
SEND_BUFFER_BYTES: Final = 1024 * 1024
_SEND_BUFFERS_SHARE: Final = 16
_MIN_SEND_BUFFERS: Final = 8

_MAX_HELD: Final = 16384  # a file and some KiB of the kernel's memory each


class Service:
    """What the connections of one server share."""

    def __init__(self, exports: Exports) -> None:
        self.exports = exports
        self.connections: set[Connection] = set()
        self.haggling: Haggling = Haggling()
        self.roomy: set[Connection] = set()  # those with a large send buffer
        self.limits = Limits()
        self.max_connections = self.limits.connections
        self.held = 0  # connections that were turned away, and are not hung up on yet
        self.files = _MAX_HELD  # that connections may take, and those who are held
        self.files_each = 2  # for one connection
        self._full = False
        self.counters = ServiceCounters(dict.fromkeys(Failure, 0))
        self.batches = 0
        self.last_served: Connection | None = None
        self.served_since = 0  # the number of the batch since when it was `last_served`
        self.write_wait_s = WRITE_WAIT_S
        self.fetcher = Fetcher()
        self.tls: Tls | None = None
        self.watch = Watch()
        self.doze = Doze()
        self.receive_buffer = bytearray(RECEIVE_BYTES)
        self.receive_view = memoryview(self.receive_buffer)
        self.payload_view = self.receive_view[_HEADER_ROOM:]

    def admit(self, connection: "Connection") -> bool:
        """Take in a new connection; False if there are too many. Those that still haggle make room."""
        self.counters.connections_accepted += 1
        full = len(self.connections) >= self.max_connections
        if full and not self.haggling:
            self.counters.handshake_failures[Failure.TURNED_AWAY] += 1
            if not self._full:
                log.warning("%d connections: more are turned away", len(self.connections))
            self._full = True
            return False
        self._full = False
        origin = origin_of(connection.client)
        if full or len(self.haggling) >= self.limits.handshakes:
            one = self.haggling.makes_room_for(origin)
            self.counters.handshake_failures[Failure.CROWDED_OUT] += 1
            self.forget(one)
            one.abort()
        self.connections.add(connection)
        self.haggling.add(connection, origin)
        return True

    @property
    def holds_too_many(self) -> bool:
        """Whether one of those who were turned away has to go, so that there are files for others."""
        return self.held > min(_MAX_HELD, self.files - self.files_each * (len(self.connections) + 1))

    def grants_room(self, connection: "Connection") -> bool:
        """Whether this connection gets a large send buffer now, and counts as one that has it."""
        together = self.exports.budget.limit_pages * PAGE // _SEND_BUFFERS_SHARE
        most = max(_MIN_SEND_BUFFERS, together // (2 * SEND_BUFFER_BYTES))
        if connection in self.roomy or len(self.roomy) >= most:
            return False
        self.roomy.add(connection)
        return True

    def forget(self, connection: "Connection") -> None:
        self.connections.discard(connection)
        self.roomy.discard(connection)
        self.haggling.discard(connection)
