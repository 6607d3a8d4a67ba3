"""Where clients come in: one door for each listening socket, which keeps newcomers from taking the server's time.

A connection costs 0.1 ms of the event loop until it is in the handshake phase, 0.16 ms if it opens an export, and with
TLS 0.6 ms, most of it in another thread (measured); accepting one and hanging up costs a tenth of that. So:

1. No more are let in than a rate says (`limits.newcomers`), which two seconds of quiet save up for.
2. Once half of that is used up, each address has an equal share in each second, and its other connections are turned
   away. So a crowd at a few addresses keeps nobody out who comes from another one.
3. So are those of an address of which as many have come to nothing lately, or to nothing yet: they count for more when
   there is room again. So a crowd at more addresses than there is room for keeps nobody out who gets on.
4. Who is hung up on at once comes again at once: 16,000 times a second, from one process (measured). So those who are
   turned away are held for a while, unread, as far as there are files for that. And few wait in the kernel: once its
   queue is full, it forgets clients that think they are connected, and wait for a greeting for ever.
5. While somebody is being served, hanging up for lack of files takes a fortieth of the time at most.
6. Clients of a Unix socket have no addresses: they wait. Whoever may connect there is known to the host.
"""

import asyncio
import logging
import math
import socket
import time
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

from nbdram.access import Client, address_of
from nbdram.protocol.handshake import Failure
from nbdram.server.peers import origin_of

if TYPE_CHECKING:
    from nbdram.server.connection import Connection
    from nbdram.server.service import Service

log = logging.getLogger("nbdram.connection")

BACKLOG: Final = 4096  # the kernel has a limit of its own
_LEAST_SHARE: Final = 2  # connections of one address in a second
_SAVED_S: Final = 2.0
_OWED_S: Final = 10.0  # about so long, and up to twice as long, it is known what came to nothing
_OWED_FACTOR: Final = 4  # what those pay who are owed for
_AT_ONCE: Final = 32
_HELD_S: Final = 10.0  # as a handshake may last
_AWAY_FACTOR: Final = 39
_NO_FILES_S: Final = 0.1
_TELL_EVERY_S: Final = 60.0


class Newcomers:
    """Who may come in now: a token bucket, whose lower half is shared out among addresses.

    Each owes us a client that opens an export for every connection that was let in, until it is `settled`.
    """

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate  # a second; 0: no limit
        self._clock = clock
        self._at = clock()
        self._saved = rate * _SAVED_S
        self._second = 0
        self._had: dict[Hashable, int] = {}  # in this second, by address
        self._addresses = 0  # in the last one
        self._owed: dict[Hashable, int] = {}  # in this period, by address
        self._owed_before: dict[Hashable, int] = {}  # in the last one
        self._forgets_at = self._at + _OWED_S

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
        owed = self._owed.get(who, 0) + self._owed_before.get(who, 0)
        half = self.rate * _SAVED_S / 2
        price = cost if owed < share else max(cost, min(cost * _OWED_FACTOR, half))
        if not self._pay(price, 0 if max(had, owed) < share else half):
            return False
        self._owed[who] = self._owed.get(who, 0) + 1
        return True

    def settle(self, who: Hashable) -> None:
        """One of its connections has come to something."""
        for owed in (self._owed, self._owed_before):
            if who in owed:
                owed[who] -= 1
                if not owed[who]:
                    del owed[who]
                return

    def take(self, cost: int) -> bool:
        """Whether there is room for whoever it may be."""
        self._save_up()
        return not self.rate or self._pay(cost, 0)

    def _save_up(self) -> None:
        now = self._clock()
        self._saved = min(self.rate * _SAVED_S, self._saved + (now - self._at) * self.rate)
        self._at = now
        if now >= self._forgets_at:
            self._owed, self._owed_before = {}, self._owed
            self._forgets_at = now + _OWED_S

    def _pay(self, cost: float, keep: float) -> bool:
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
        self._held: deque[tuple[float, socket.socket]] = deque()  # until when, who
        self._letting_go: asyncio.TimerHandle | None = None
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
        if self._letting_go:
            self._letting_go.cancel()
        while self._held:
            self._hang_up()
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
            try:
                client, address = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                newcomers.give_back(self._cost if self._local else 0)
                break
            except OSError as error:  # too many open files, in the whole system perhaps
                log.warning("nobody can be let in: %s", error.strerror)
                self._shut_for(_NO_FILES_S)
                return
            who = None if self._local else _origin(address[0])
            if self._local or newcomers.admit(who, self._cost):
                self._let_in(client, who)
            else:
                self._hold(client)
            begun = time.thread_time()
            while self._held and self._service.holds_too_many:
                self._hang_up()
                away_s += time.thread_time() - begun
        batches, self._batches = self._batches, self._service.batches
        if away_s and batches != self._batches:
            self._shut_for(away_s * _AWAY_FACTOR)

    def _let_in(self, client: socket.socket, who: Hashable) -> None:
        def connect() -> "Connection":
            connection = self._connect()
            connection.on_entered = partial(self._newcomers.settle, who)
            return connection

        client.setblocking(False)
        task = self._loop.create_task(self._loop.connect_accepted_socket(connect, client))
        self._entering.add(task)
        task.add_done_callback(self._entering.discard)

    def _hold(self, client: socket.socket) -> None:
        with suppress(OSError):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # which is the least that it can be
        self._service.held += 1
        self._held.append((self._loop.time() + _HELD_S, client))
        if self._letting_go is None:
            self._letting_go = self._loop.call_later(_HELD_S, self._let_go)
        counters = self._service.counters
        counters.connections_accepted += 1
        counters.handshake_failures[Failure.TOO_FAST] += 1
        if self._loop.time() - self._told_at >= _TELL_EVERY_S:
            self._told_at = self._loop.time()
            log.warning("more than %d connections a second: some are turned away", self._newcomers.rate // self._cost)

    def _let_go(self) -> None:
        """Hang up on those who have been held for long enough."""
        now = self._loop.time()
        for _ in range(_AT_ONCE):
            if self._held and self._held[0][0] <= now:
                self._hang_up()
        self._letting_go = self._loop.call_at(self._held[0][0], self._let_go) if self._held else None

    def _hang_up(self) -> None:
        """On the one that has been held for longest."""
        _, client = self._held.popleft()
        client.close()
        self._service.held -= 1


def _origin(host: str) -> Hashable:
    return origin_of(Client(address=address_of(host.partition("%")[0])))
