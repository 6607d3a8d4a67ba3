"""Images that a request waits for, asked for and received by the event loop itself: a connection for each node.

A thread per node, as the engine has it for everything else, was measured with 23 calls of futex for each image: it
takes longer to hand an image from thread to thread than to receive, decrypt and decompress it. So where all goes well
nobody else takes part: what the loop asks for in one go is sent in one go, and what has arrived is opened at once.

The library makes the connections (in a thread: that blocks), and packs. Answers are parsed here: they are values, one
behind the other, and each is decrypted right out of what was received. Whatever else happens is the engine's: as long
as there is no connection, when one breaks, and when a node answers with an error, the commands are sent to it, which
knows what is to be done. They may be sent twice, since they only read.
"""

import asyncio
import logging
import ssl
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import hiredis
from redis.connection import AbstractConnection

from nbdram.memory.tiers.engine import Command, Engine
from nbdram.memory.tiers.remote_settings import Address, address_text
from nbdram.memory.tiers.sending import ANSWER_S

log = logging.getLogger("nbdram.remote")

_RECEIVE_BYTES: Final = 256 * 1024
_MOST_BYTES: Final = 96 * 1024  # of a value and what comes with it
_LINE_BYTES: Final = 1024
_TLS_RECORDS: Final = 16  # received at once: what TLS has decrypted does not make a socket readable
_AGAIN_S: Final = 1.0  # a node that could not be connected to is tried again after this
_NO_ANSWER: Final = "that is no answer to what was asked"
_VALUE, _ERROR = b"$-"
_NOT_NOW: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Reads:
    """The connections of one event loop, the one that runs when `send` is first called; all else is its too."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lines: dict[Address, _Line] = {}
        self._closed = False

    def send(self, command: Command) -> None:
        """A command that gets a value. Its `finish` is called by the loop, or by a thread if something was in the way.

        What it is called with is a view of what was received, good until it returns.
        """
        owner = None if self._closed else self._engine.owner(command.key)
        if owner is not None:
            line = self._lines.get(owner)
            if line is None:
                line = self._lines[owner] = _Line(self._engine, owner)
            if line.put(command):
                return
        self._engine.send(command)

    def close(self) -> None:
        """What is under way is left to the engine."""
        self._closed = True
        for line in self._lines.values():
            line.close()


class _Line:
    """The loop's connection to one node, as long as that is there."""

    def __init__(self, engine: Engine, address: Address) -> None:
        self._engine = engine
        self._address = address
        self._loop = asyncio.get_running_loop()
        self._connecting: asyncio.Future[AbstractConnection] | None = None
        self._again_at = 0.0
        self._connection: AbstractConnection | None = None
        self._socket: Any = None  # the library's
        self._buffer = bytearray(_RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0  # of what was received and not parsed yet
        self._rounds = _TLS_RECORDS if engine.settings.tls else 1
        self._queued: list[Command] = []
        self._unsent = b""
        self._blocked = False  # it is sent when the socket has room
        self._sent: deque[Command] = deque()
        self._watch: asyncio.TimerHandle | None = None
        self._heard_at = 0.0
        self._closed = False

    def put(self, command: Command) -> bool:
        """False if there is no connection (yet)."""
        if self._connection is None:
            self._connect()
            return False
        if not self._queued:
            self._loop.call_soon(self._flush)
        self._queued.append(command)
        return True

    # -- being connected -----------------------------------------------------------------------------

    def _connect(self) -> None:
        if self._connecting is None and not self._closed and self._loop.time() >= self._again_at:
            self._connecting = self._loop.run_in_executor(None, self._engine.connect, self._address)
            self._connecting.add_done_callback(self._connected)

    def _connected(self, connecting: "asyncio.Future[AbstractConnection]") -> None:
        self._connecting = None
        if connecting.cancelled() or connecting.exception():
            self._again_at = self._loop.time() + _AGAIN_S
            return
        connection = connecting.result()
        if self._closed:
            connection.disconnect()
            return
        self._connection = connection
        self._socket = connection._get_socket()
        self._socket.setblocking(False)
        self._start = self._end = 0
        self._loop.add_reader(self._socket.fileno(), self._readable)

    def _lost(self, why: Exception | str) -> None:
        """Leave what is under way to the engine: to send it at once, or not before the next look at who has what."""
        if self._connection is None:
            return
        log.debug("%s: the loop's connection is lost: %s", address_text(self._address), why)
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        if self._watch:
            self._watch.cancel()
            self._watch = None
        with suppress(OSError):
            self._connection.disconnect()
        self._connection = self._socket = None
        self._unsent, self._blocked = b"", False
        left, self._sent, self._queued = [*self._sent, *self._queued], deque(), []
        for command in left:
            if isinstance(why, TimeoutError):
                self._engine.retry(command, why)
            else:
                self._engine.send(command)

    def close(self) -> None:
        self._closed = True
        self._lost("the server stops")

    # -- sending -------------------------------------------------------------------------------------

    def _flush(self) -> None:
        if self._connection is None:
            return
        queued, self._queued = self._queued, []
        self._sent += queued
        pack: Callable[[Any], bytes] = hiredis.pack_command  # its types know tuples of one word only
        self._unsent += b"".join([pack(command.words) for command in queued])
        if self._watch is None:
            self._heard_at = self._loop.time()
            self._watch = self._loop.call_later(ANSWER_S, self._look)
        self._send()

    def _send(self) -> None:
        try:
            sent = self._socket.send(self._unsent)
        except _NOT_NOW:
            sent = 0
        except OSError as error:
            self._lost(error)
            return
        self._unsent = self._unsent[sent:]
        if bool(self._unsent) != self._blocked:
            self._blocked = not self._blocked
            if self._blocked:
                self._loop.add_writer(self._socket.fileno(), self._send)
            else:
                self._loop.remove_writer(self._socket.fileno())

    # -- receiving -----------------------------------------------------------------------------------

    def _readable(self) -> None:
        for _ in range(self._rounds):
            if self._connection is None:
                return
            try:
                length = self._socket.recv_into(self._view[self._end :])
            except _NOT_NOW:
                return
            except OSError as error:
                self._lost(error)
                return
            if not length:
                self._lost("it was closed")
                return
            self._end += length
            self._heard_at = self._loop.time()
            try:
                self._parse()
            except ValueError as error:
                self._lost(error)
        if self._rounds > 1 and self._connection is not None and self._socket.pending():
            self._loop.call_soon(self._readable)

    def _parse(self) -> None:
        """Hand over what has arrived. ValueError if that can't be an answer to what was asked."""
        at, end, find = self._start, self._end, self._buffer.find
        while at < end:
            after = find(b"\r\n", at, min(end, at + _LINE_BYTES)) + 2
            if after < 2:
                if end - at >= _LINE_BYTES:
                    raise ValueError(_NO_ANSWER)
                break
            if not self._sent:
                raise ValueError(_NO_ANSWER)
            value: memoryview | None = None
            is_value = self._buffer[at] == _VALUE
            if is_value and (length := int(self._buffer[at + 1 : after - 2])) >= 0:
                if length > _MOST_BYTES - _LINE_BYTES:
                    raise ValueError(_NO_ANSWER)
                if after + length + 2 > end:
                    break
                value = self._view[after : after + length]
                after += length + 2
            elif not is_value and self._buffer[at] != _ERROR:
                raise ValueError(_NO_ANSWER)
            self._start = at = after
            command = self._sent.popleft()
            if is_value:
                command.finish(value, None)
            else:
                self._engine.send(command)
        if at == end:
            self._start = self._end = 0
        elif len(self._buffer) - at < _MOST_BYTES:
            self._buffer[: end - at] = self._buffer[at:end]
            self._start, self._end = 0, end - at

    def _look(self) -> None:
        """Whether the node still answers."""
        self._watch = None
        silent = self._loop.time() - self._heard_at
        if not self._sent:
            return
        if silent >= ANSWER_S:
            self._lost(TimeoutError("it does not answer"))
        else:
            self._watch = self._loop.call_later(ANSWER_S - silent, self._look)
