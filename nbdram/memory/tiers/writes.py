"""Connections to the nodes of a remote for the processes that compress, which send images on them (`sending.py`).

Each has its own. The library makes them (in a thread: that blocks), and the process gets their sockets. As long as
there is none, and over TLS, which a socket can't be handed over with, images are sent by the engine.
"""

import asyncio
import itertools
import logging
import os
from functools import partial
from typing import Final

from redis.connection import AbstractConnection

from nbdram.memory.packer import Packer
from nbdram.memory.tiers.engine import Engine, check_policy
from nbdram.memory.tiers.remote_settings import Address, address_text

log = logging.getLogger("nbdram.remote")

_AGAIN_S: Final = 1.0  # between two attempts to connect


class _Lines:
    """What a process has, and when it was last tried to give it more."""

    def __init__(self, pid: int | None) -> None:
        self.pid = pid
        self.numbers: dict[Address, int] = {}
        self.again_at: dict[Address, float] = {}


class Writes:
    """For one event loop, the one that runs when `line` is called."""

    def __init__(self, engine: Engine, secret: bytes) -> None:
        self._engine = engine
        self._secret = secret
        self._numbers = itertools.count(1)
        self._lines: dict[Packer, _Lines] = {}
        self._closed = False

    def line(self, packer: Packer, key: bytes) -> int | None:
        """The number of the process's connection to the node that has a key; None if there is none (yet)."""
        lines = self._lines_of(packer)
        owner = self._engine.owner(key)
        if owner is None or self._engine.settings.tls:
            return None
        number = lines.numbers.get(owner)
        if number is None or number in packer.lost_lines:
            self._connect(packer, lines, owner)
            return None
        return number

    def connect(self, packer: Packer) -> None:
        """Begin to give a process its connections, before there is something to send, if it is new."""
        if packer.is_ready:
            self._lines_of(packer)

    def _lines_of(self, packer: Packer) -> _Lines:
        lines = self._lines.get(packer)
        if lines is None or lines.pid != packer.pid:
            lines = self._lines[packer] = _Lines(packer.pid)
            if not self._engine.settings.tls:
                for address in self._engine.masters():
                    self._connect(packer, lines, address)
        return lines

    def is_connected(self, packer: Packer) -> bool:
        """Whether a process has a connection to every node that has anything."""
        lines = self._lines.get(packer)
        return lines is not None and lines.pid == packer.pid and lines.numbers.keys() >= set(self._engine.masters())

    def _connect(self, packer: Packer, lines: _Lines, address: Address) -> None:
        loop = asyncio.get_running_loop()
        if self._closed or loop.time() < lines.again_at.get(address, 0.0):
            return
        lines.again_at[address] = float("inf")
        connecting = loop.run_in_executor(None, self._made, address)
        connecting.add_done_callback(partial(self._connected, packer, lines, address))

    def _made(self, address: Address) -> AbstractConnection:
        connection = self._engine.connect(address)
        check_policy(connection, address)
        return connection

    def _connected(
        self, packer: Packer, lines: _Lines, address: Address, connecting: "asyncio.Future[AbstractConnection]"
    ) -> None:
        lines.again_at[address] = asyncio.get_running_loop().time() + _AGAIN_S
        if connecting.cancelled() or (error := connecting.exception()):
            log.debug("%s: no connection for a process that compresses: %s", address_text(address), error)
            return
        connection = connecting.result()
        made = connection._get_socket()
        assert made
        fd = made.detach()  # hanging up would end it for the process too
        try:
            if lines is self._lines[packer] and lines.pid == packer.pid and packer.is_ready and not self._closed:
                number = next(self._numbers)
                packer.give_line(number, self._engine.settings.replicas, self._secret, fd)
                lines.numbers[address] = number
        except OSError as failure:
            log.debug("a process that compresses can't be told of a connection: %s", failure)
        finally:
            os.close(fd)

    def close(self) -> None:
        self._closed = True
