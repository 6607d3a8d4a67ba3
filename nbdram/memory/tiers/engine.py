"""Commands to a Redis or Valkey server or cluster: pipelined, a thread for each node and way.

The library (redis-py with hiredis) makes connections, encrypts, authenticates, packs and parses; the engine itself
shards, replicates and fails over, and tells who has what. What is here is what lies between: commands that are due at
one node at the same time are sent in one piece, and their answers read in one go. Measured with images of 32 KiB on
three masters that was 2.5 to 3 times as fast as the library's own pipelines; see docs/remote.md.

Rules:

1. Every command may be sent twice, and late: keys are never used again (see `remote.py`), so there is no order to keep.
2. What a node can't answer for now (it is gone, loading, moving a slot, or the cluster has no master for the slot) is
   sent again until its deadline, each time to whoever the cluster says has the slot. What is refused is refused.
3. An image counts when as many replicas have it as were asked for (WAIT, once a batch, on the same connection).
4. A node that might evict keys is not used.
"""

import errno
import heapq
import itertools
import logging
import sys
import threading
import time
from binascii import crc_hqx
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Final

from redis import exceptions
from redis.connection import AbstractConnection, Connection, SSLConnection

from nbdram.errors import NbdramError
from nbdram.memory.tiers.remote_settings import Address, RemoteSettings, address_text
from nbdram.memory.tiers.remote_tls import check_files, distrust, hint, wrong_port
from nbdram.memory.tiers.sending import ANSWER_S, WAIT_MS

log = logging.getLogger("nbdram.remote")

CONNECT_S: Final = 1.0
_PAUSE_S: Final = 0.05  # before a command is sent again
_LONG_PAUSE_S: Final = 0.5  # of those that have no deadline
_BATCH: Final = 64
_SLOTS: Final = 16384
_START_S: Final = 10.0
_REFRESH_S: Final = 0.1  # between two looks at who has which slot

_Transient = (
    exceptions.TryAgainError,
    exceptions.ClusterDownError,
    exceptions.MasterDownError,
    exceptions.ReadOnlyError,
)
_Broken = (exceptions.ConnectionError, exceptions.TimeoutError, OSError)


_WAYS: Final = {b"GET": "read", b"UNLINK": "drop"}
# What only frees memory can wait, and comes one by one: a thread that woke for each would take the interpreter from the
# event loop each time.
_GATHER_S: Final = 0.05
_DROPS: Final = 1024  # at once

Finish = Callable[[Any, OSError | None], None]  # what the node said, or why there is no answer


class Command:
    """What to send, until when it is worth trying (monotonic), and who is told, in some thread, what came of it."""

    __slots__ = ("asking", "deadline", "finish", "is_image", "key", "words")

    def __init__(
        self, key: bytes, words: tuple[bytes, ...], deadline: float, finish: Finish, *, is_image: bool = False
    ) -> None:
        """`is_image`: it stores one, which counts only when its replicas have it too."""
        self.key = key
        self.words = words
        self.deadline = deadline
        self.asking = False
        self.finish = finish
        self.is_image = is_image

    @property
    def way(self) -> str:
        return _WAYS.get(self.words[0], "write")


class Engine:
    """The way to one remote."""

    def __init__(self, settings: RemoteSettings) -> None:
        self.settings = settings
        self._lanes: dict[tuple[Address, str], _Lane] = {}
        self._slots: list[Address | None] | None = None  # who has each slot; None: a server that is no cluster
        self._owners: list[Address | None] = [settings.addresses[0]]  # all of these
        self._known: list[Address] = list(settings.addresses)
        self._late: list[tuple[float, int, Command]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._refresh = False
        self._closed = False
        self._each_minute: Callable[[], None] | None = None
        self._keeper = threading.Thread(target=self._keep, name="nbdram-remote", daemon=True)
        self.retries = 0

    # -- starting and ending -------------------------------------------------------------------------

    def start(self, each_minute: Callable[[], None] | None = None) -> None:
        """Find out who has what. NbdramError, in a sentence, if the remote can't be used."""
        if self.settings.tls:
            check_files(self.settings)
        deadline = time.monotonic() + _START_S
        is_first = True
        while True:
            try:
                self._look()
                replicas = min(self._check(address) for address in self.masters())
                break
            except Evicting:
                raise
            except (exceptions.AuthenticationError, exceptions.NoPermissionError) as error:
                told = f"{str(error).rstrip('.')}; name user and password with auth-file=PATH"
                raise NbdramError(f"{self.settings} does not let us in: {told}") from error
            except (*_Broken, *_Transient) as error:
                if distrusted := distrust(self.settings, error):
                    raise NbdramError(distrusted) from error
                if is_first and (mistaken := wrong_port(self.settings)):
                    raise NbdramError(mistaken) from error
                told = str(error).rstrip(".")
                if time.monotonic() > deadline:
                    raise NbdramError(f"can't use {self.settings} for swap: {told}{hint(self.settings)}") from error
                if is_first:
                    log.warning("%s does not answer: %s; it has %g s", self.settings, told, _START_S)
                is_first = False
                time.sleep(_REFRESH_S)
        if replicas < self.settings.replicas:
            log.warning(
                "%s has %d replicas of some of its masters: with replicas=%d nothing is stored there until it has more",
                *(self.settings, replicas, self.settings.replicas),
            )
        self._each_minute = each_minute
        self._keeper.start()

    def close(self) -> None:
        """Give up whatever is still to be sent."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._keeper.is_alive():
            self._keeper.join()
        lanes = list(self._lanes.values())
        for lane in lanes:
            lane.close()
        for lane in lanes:
            lane.join()
        for _, _, command in self._late:
            _fail(command, OSError(errno.EIO, "the server stops"))

    def _check(self, address: Address) -> int:
        """Refuse a node that might evict keys; how many replicas follow it."""
        connection = self.connect(address)
        try:
            check_policy(connection, address)
            return int(_info(connection, "replication")["connected_slaves"])
        finally:
            connection.disconnect()

    def connect(self, address: Address) -> AbstractConnection:
        """A connection that is ready for commands."""
        settings = self.settings
        options: dict[str, Any] = {
            "host": address[0],
            "port": address[1],
            "socket_connect_timeout": CONNECT_S,
            "socket_timeout": ANSWER_S,
            "username": settings.user or None,
            "password": settings.password or None,
            "retry": None,
            "protocol": 2,
            "socket_read_size": 1 << 18,
        }
        if settings.tls:
            options["ssl_ca_certs"] = settings.ca and str(settings.ca)
            options["ssl_certfile"] = settings.certificate and str(settings.certificate)
            options["ssl_keyfile"] = settings.key and str(settings.key)
        made: AbstractConnection = (SSLConnection if settings.tls else Connection)(**options)
        made.connect()
        return made

    # -- who has what --------------------------------------------------------------------------------

    def masters(self) -> list[Address]:
        return [address for address in self._owners if address]

    def owners(self) -> list[Address | None]:
        """The masters, and None if there are slots that nobody has."""
        return self._owners

    def owner(self, key: bytes) -> Address | None:
        """The node that has a key, which has no hash tag; None if the cluster has none for its slot."""
        slots = self._slots
        return self.settings.addresses[0] if slots is None else slots[crc_hqx(key, 0) % _SLOTS]

    def _look(self) -> None:
        """Ask the cluster who has which slot. The library's error if nobody can be asked."""
        failure: Exception = exceptions.ConnectionError("nobody to ask")
        for address in dict.fromkeys((*self._known, *self.settings.addresses)):
            try:
                connection = self.connect(address)
                try:
                    rows = ask(connection, "CLUSTER", "SLOTS")
                finally:
                    connection.disconnect()
            except exceptions.AuthenticationError:
                raise
            except exceptions.ResponseError as error:
                if "cluster support disabled" not in str(error):
                    failure = error
                    continue
                if len(self.settings.addresses) > 1:
                    raise NbdramError(f"{address_text(address)} is no cluster: name it alone") from error
                self._slots, self._owners = None, [self.settings.addresses[0]]
                return
            except _Broken as error:
                failure = error
                continue
            slots = _slots_of(rows, address)
            if not any(slots):
                failure = exceptions.ClusterDownError("the cluster has no slots")
                continue
            self._slots, self._owners = slots, list(dict.fromkeys(slots))
            others = {(_text(host) or address[0], port) for row in rows for host, port, *_ in row[2:]}
            self._known = [address, *sorted(others - {address})]
            return
        raise failure

    # -- sending -------------------------------------------------------------------------------------

    def send(self, command: Command) -> None:
        """From any thread, without waiting."""
        owner = self.owner(command.key)
        if owner is None:
            self.retry(command, exceptions.ClusterDownError("the cluster has no node for it"))
        else:
            self._lane(owner, command.way).put(command)

    def _lane(self, address: Address, way: str) -> "_Lane":
        lane = self._lanes.get((address, way))
        if lane is None:
            with self._changed:
                lane = self._lanes.get((address, way))
                if lane is None:
                    lane = self._lanes[address, way] = _Lane(self, address, way)
                    lane.start()
        return lane

    def answered(self, command: Command, reply: Any) -> None:
        """A node's answer; errors among them decide where the command goes next."""
        if not isinstance(reply, Exception):
            command.finish(reply, None)
        elif isinstance(reply, exceptions.MovedError):
            self._look_again()
            self._redirect(command, reply, asking=False)
        elif isinstance(reply, exceptions.AskError):
            self._redirect(command, reply, asking=True)
        elif isinstance(reply, _Transient):
            self._look_again()
            self.retry(command, reply)
        elif isinstance(reply, exceptions.OutOfMemoryError):
            _fail(command, OSError(errno.ENOSPC, "it has no memory left"))
        else:
            _fail(command, OSError(errno.EIO, f"the remote says: {reply}"))

    def _redirect(self, command: Command, error: exceptions.AskError, *, asking: bool) -> None:
        if time.monotonic() > command.deadline:
            _fail(command, OSError(errno.EIO, "nobody has the slot"))
            return
        self.retries += 1
        command.asking = asking
        self._lane((error.host or self.settings.addresses[0][0], error.port), command.way).put(command)

    def retry(self, command: Command, error: Exception) -> None:
        """Send a command again in a moment, unless it is too late for it."""
        self._look_again()
        now = time.monotonic()
        pause = _PAUSE_S if command.deadline < float("inf") else _LONG_PAUSE_S
        if now + pause > command.deadline:
            _fail(command, OSError(errno.EIO, f"the remote is away: {error}"))
            return
        self.retries += 1
        command.asking = False
        with self._changed:
            if not self._closed:
                heapq.heappush(self._late, (now + pause, next(self._numbers), command))
                self._changed.notify()
                return
        _fail(command, OSError(errno.EIO, "the server stops"))

    def _look_again(self) -> None:
        if self._slots is not None and not self._refresh:
            with self._changed:
                self._refresh = True
                self._changed.notify()

    # -- the keeper's thread -------------------------------------------------------------------------

    def _keep(self) -> None:
        looked = minute = time.monotonic()
        while True:
            with self._changed:
                now = time.monotonic()
                due = min(minute + 60, self._late[0][0] if self._late else now + 60)
                if self._refresh:
                    due = min(due, looked + _REFRESH_S)
                if due > now and not self._closed:
                    self._changed.wait(due - now)
                if self._closed:
                    return
                now = time.monotonic()
                ready: list[Command] = []
                while self._late and self._late[0][0] <= now:
                    ready.append(heapq.heappop(self._late)[2])
            if self._refresh and now >= looked + _REFRESH_S:
                self._refresh = False
                with suppress(*_Broken, exceptions.RedisError, NbdramError):
                    self._look()
                looked = time.monotonic()
            for command in ready:
                self.send(command)
            if now >= minute + 60:
                minute = now
                if self._each_minute:
                    self._each_minute()


class _Lane(threading.Thread):
    """The commands for one node that write, that read or that drop, one batch after the other."""

    def __init__(self, engine: Engine, address: Address, way: str) -> None:
        super().__init__(name=f"nbdram-remote-{way}", daemon=True)
        self._engine = engine
        self._address = address
        self._way = way
        self._waiting: SimpleQueue[Command | None] = SimpleQueue()  # None: it is over
        self._connection: AbstractConnection | None = None
        self._closed = False

    def put(self, command: Command) -> None:
        self._waiting.put(command)
        if self._closed:  # perhaps nobody looks into it any more
            self._fail_all()

    def close(self) -> None:
        self._waiting.put(None)

    def run(self) -> None:
        most = _DROPS if self._way == "drop" else _BATCH
        while (command := self._waiting.get()) is not None:
            if self._way == "drop" and self._waiting.qsize() < _DROPS:
                time.sleep(_GATHER_S)
            self._do([command, *self._take(most - 1)])
            if self._closed:
                break
        self._closed = True
        self._hang_up()
        self._fail_all()

    def _take(self, most: int) -> list[Command]:
        """What else waits."""
        found: list[Command] = []
        with suppress(Empty):
            while len(found) < most:
                command = self._waiting.get_nowait()
                if command is None:
                    self._closed = True
                    break
                found.append(command)
        return found

    def _fail_all(self) -> None:
        for command in self._take(sys.maxsize):
            _fail(command, OSError(errno.EIO, "the server stops"))

    def _do(self, batch: list[Command]) -> None:
        had = self._connection is not None
        try:
            replies = self._exchange(batch)
        except Exception as error:  # whatever it is, nobody may wait for ever, and this thread goes on
            self._hang_up()
            if had and isinstance(error, exceptions.ConnectionError):
                self._do(batch)  # the node has closed what was idle for long
                return
            if not isinstance(error, (*_Broken, exceptions.RedisError)):
                log.exception("%s: an unexpected error", address_text(self._address))
            batch += self._take(sys.maxsize)  # what waits behind them would only wait for the same
            for command in batch:
                self._engine.retry(command, error)
            return
        for command, reply in zip(batch, replies, strict=True):
            self._engine.answered(command, reply)

    def _exchange(self, batch: Sequence[Command]) -> list[Any]:
        if self._connection is None:
            connection = self._engine.connect(self._address)
            if self._way != "read":
                check_policy(connection, self._address)
            self._connection = connection
        connection = self._connection
        sent: list[tuple[bytes, ...]] = []
        for command in batch:
            if command.asking:
                sent.append((b"ASKING",))
            sent.append(command.words)
        replicas = self._engine.settings.replicas
        stored = [at for at, command in enumerate(batch) if command.is_image] if replicas else []
        if stored:
            sent.append((b"WAIT", b"%d" % replicas, b"%d" % WAIT_MS))
        connection.send_packed_command(connection.pack_commands(sent))
        replies = []
        for command in batch:
            if command.asking:
                _reply(connection)
            replies.append(_reply(connection))
        if stored:
            have = _reply(connection)
            if not isinstance(have, int) or have < replicas:
                for at in stored:
                    if not isinstance(replies[at], Exception):
                        replies[at] = _TooFewReplicas(f"{have} of {replicas} replicas have it")
        return replies

    def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection:
            connection.disconnect()


class _TooFewReplicas(exceptions.ResponseError):
    """An image is stored, but would not outlive its master."""


def ask(connection: AbstractConnection, *words: str | bytes) -> Any:
    """One command and its answer."""
    connection.send_command(*words)
    return connection.read_response()


def check_policy(connection: AbstractConnection, address: Address) -> None:
    """NbdramError at the start, for a lane an error like that of a lost connection, if a node may evict keys."""
    policy = _info(connection, "memory").get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        connection.disconnect()
        raise Evicting(
            f"{address_text(address)} may evict keys (maxmemory-policy {policy}): set it to noeviction, "
            "cold data must stay where it is stored"
        )


def _info(connection: AbstractConnection, section: str) -> dict[str, str]:
    """What a node says of itself."""
    lines = _text(ask(connection, "INFO", section)).splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


class Evicting(NbdramError, exceptions.ConnectionError):
    """A server whose policy could evict our keys is not used."""


def _reply(connection: AbstractConnection) -> Any:
    try:
        return connection.read_response()
    except exceptions.ResponseError as error:
        return error


def _fail(command: Command, error: OSError) -> None:
    command.finish(None, error)


def _slots_of(rows: Any, asked: Address) -> list[Address | None]:
    """Who has each slot, out of the answer to CLUSTER SLOTS."""
    slots: list[Address | None] = [None] * _SLOTS
    for first, last, master, *_ in rows:
        owner = (_text(master[0]) or asked[0], int(master[1]))
        slots[first : last + 1] = [owner] * (last - first + 1)
    return slots


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value or "")
