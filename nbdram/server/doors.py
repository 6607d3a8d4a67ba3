"""Where clients come in: one door for each listening socket, which keeps newcomers from taking the server's time.

A connection costs 0.1 ms of the event loop until it is in the handshake phase, 0.16 ms if it opens an export, and with
TLS 0.6 ms, most of it in another thread (measured); accepting one and hanging up costs a tenth of that. So:

1. No more are let in than a rate says (`limits.newcomers`), which two seconds of quiet save up for.
2. Once half of that is used up, each address has an equal share in each second, and its other connections are hung up
   on at once. So a crowd at a few addresses keeps nobody out who comes from another one.
3. While somebody is being served, hanging up takes a fortieth of the time at most; more of them wait outside.
4. Clients of a Unix socket have no addresses: they wait. Whoever may connect there is known to the host.
"""

import asyncio
import logging
import math
import socket
import time
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Final

from nbdram.access import address_of
from nbdram.protocol.handshake import Failure

if TYPE_CHECKING:
    from nbdram.server.connection import Connection
    from nbdram.server.service import Service

log = logging.getLogger("nbdram.connection")

BACKLOG: Final = 512
_LEAST_SHARE: Final = 2  # connections of one address in a second
_SAVED_S: Final = 2.0
_AT_ONCE: Final = 32
_AWAY_FACTOR: Final = 39
_NO_FILES_S: Final = 0.1
_TELL_EVERY_S: Final = 60.0


class Newcomers:
    """Who may come in now: a token bucket, whose lower half is shared out evenly among addresses."""

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate  # a second; 0: no limit
        self._clock = clock
        self._at = clock()
        self._saved = rate * _SAVED_S
        self._second = 0
        self._had: dict[Hashable, int] = {}  # in this second, by address
        self._addresses = 0  # in the last one

    def admit(self, who: Hashable, cost: int = 1) -> bool:
        if not self.rate:
            return True
        self._save_up()
        second = math.floor(self._at)
        if second != self._second:
            self._second, self._addresses, self._had = second, len(self._had), {}
        had = self._had.get(who, 0)
        self._had[who] = had + 1
        share = max(_LEAST_SHARE, self.rate // (cost * max(1, self._addresses, len(self._had))))
        return self._pay(cost, 0 if had < share else self.rate * _SAVED_S / 2)

    def take(self, cost: int) -> bool:
        """Whether there is room for whoever it may be."""
        self._save_up()
        return not self.rate or self._pay(cost, 0)

    def _save_up(self) -> None:
        now = self._clock()
        self._saved = min(self.rate * _SAVED_S, self._saved + (now - self._at) * self.rate)
        self._at = now

    def _pay(self, cost: int, keep: float) -> bool:
        if self._saved < keep + cost:
            return False
        self._saved -= cost
        return True

    def give_back(self, cost: int) -> None:
        """It was taken, and nobody came."""
        self._saved += cost

    def delay_s(self, cost: int) -> float:
        """After `take` has failed: how long until it succeeds."""
        return max(0.001, (cost - self._saved) / self.rate)


class Door:
    """A listening socket, which is ours from now on."""

    def __init__(
        self, sock: socket.socket, service: "Service", connect: Callable[[], "Connection"], *, tls: bool
    ) -> None:
        self._sock = sock
        self._service = service
        self._connect = connect
        self._local = sock.family == socket.AF_UNIX
        self._cost = 2 if tls else 1
        self._loop = asyncio.get_running_loop()
        self._newcomers = Newcomers(service.limits.newcomers)
        self._entering: set[asyncio.Task[object]] = set()
        self._shut: asyncio.TimerHandle | None = None
        self._told_at = -_TELL_EVERY_S
        self._batches = 0  # that had been served when somebody came
        sock.setblocking(False)
        sock.listen(BACKLOG)
        self._open()

    async def close(self) -> None:
        """Nobody comes in any more; who waits outside is hung up on, who has been let in is there."""
        if self._shut:
            self._shut.cancel()
        else:
            self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        await asyncio.gather(*self._entering, return_exceptions=True)

    def _open(self) -> None:
        self._shut = None
        self._loop.add_reader(self._sock.fileno(), self._knock)

    def _shut_for(self, seconds: float) -> None:
        self._loop.remove_reader(self._sock.fileno())
        self._shut = self._loop.call_later(seconds, self._open)

    def _knock(self) -> None:
        newcomers = self._newcomers
        newcomers.rate = self._service.limits.newcomers
        away_s = 0.0
        for _ in range(_AT_ONCE):
            if self._local and not newcomers.take(self._cost):
                self._shut_for(newcomers.delay_s(self._cost))
                return
            begun = time.thread_time()
            try:
                client, address = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                newcomers.give_back(self._cost if self._local else 0)
                break
            except OSError as error:  # too many open files, in the whole system perhaps
                log.warning("nobody can be let in: %s", error.strerror)
                self._shut_for(_NO_FILES_S)
                return
            if self._local or newcomers.admit(_origin(address[0]), self._cost):
                self._let_in(client)
            else:
                self._turn_away(client)
                away_s += time.thread_time() - begun
        batches, self._batches = self._batches, self._service.batches
        if away_s and batches != self._batches:
            self._shut_for(away_s * _AWAY_FACTOR)

    def _let_in(self, client: socket.socket) -> None:
        client.setblocking(False)
        task = self._loop.create_task(self._loop.connect_accepted_socket(self._connect, client))
        self._entering.add(task)
        task.add_done_callback(self._entering.discard)

    def _turn_away(self, client: socket.socket) -> None:
        client.close()
        counters = self._service.counters
        counters.connections_accepted += 1
        counters.handshake_failures[Failure.TOO_FAST] += 1
        if self._loop.time() - self._told_at >= _TELL_EVERY_S:
            self._told_at = self._loop.time()
            log.warning("more than %d connections a second: some are turned away", self._newcomers.rate // self._cost)


def _origin(host: str) -> Hashable:
    """What counts as one address: of IPv6, where one machine has many, the network."""
    address = address_of(host.partition("%")[0])
    return address if address.version == 4 else int(address) >> 64
