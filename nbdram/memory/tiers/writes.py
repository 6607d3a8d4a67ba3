"""Connections to the nodes of a remote for the process that compresses, which sends images on them (`sending.py`).

The library makes them (in a thread: that blocks), and the process gets their sockets. As long as there is none, and
over TLS, which a socket can't be handed over with, images are sent by the engine.
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


class Writes:
    """For one event loop, the one that runs when `line` is called."""

    def __init__(self, engine: Engine, secret: bytes) -> None:
        self._engine = engine
        self._secret = secret
        self._numbers = itertools.count(1)
        self._pid: int | None = None  # of the process that has the lines
        self._lines: dict[Address, int] = {}
        self._connecting: set[Address] = set()
        self._again_at: dict[Address, float] = {}
        self._closed = False

    def line(self, packer: Packer, key: bytes) -> int | None:
        """The number of the process's connection to the node that has a key; None if there is none (yet)."""
        if packer.pid != self._pid:
            self._pid, self._lines = packer.pid, {}
        owner = self._engine.owner(key)
        if owner is None or self._engine.settings.tls:
            return None
        number = self._lines.get(owner)
        if number is None or number in packer.lost_lines:
            self._connect(packer, owner)
            return None
        return number

    def _connect(self, packer: Packer, address: Address) -> None:
        loop = asyncio.get_running_loop()
        if self._closed or address in self._connecting or loop.time() < self._again_at.get(address, 0.0):
            return
        self._again_at[address] = loop.time() + _AGAIN_S
        self._connecting.add(address)
        connecting = loop.run_in_executor(None, self._made, address)
        connecting.add_done_callback(partial(self._connected, packer, address))

    def _made(self, address: Address) -> AbstractConnection:
        connection = self._engine.connect(address)
        check_policy(connection, address)
        return connection

    def _connected(self, packer: Packer, address: Address, connecting: "asyncio.Future[AbstractConnection]") -> None:
        self._connecting.discard(address)
        if connecting.cancelled() or (error := connecting.exception()):
            log.debug("%s: no connection for the process that compresses: %s", address_text(address), error)
            return
        connection = connecting.result()
        made = connection._get_socket()
        assert made
        fd = made.detach()  # hanging up would end it for the process too
        try:
            if packer.pid == self._pid and packer.is_ready and not self._closed:
                number = next(self._numbers)
                packer.give_line(number, self._engine.settings.replicas, self._secret, fd)
                self._lines[address] = number
        except OSError as failure:
            log.debug("the process that compresses can't be told of a connection: %s", failure)
        finally:
            os.close(fd)

    def close(self) -> None:
        self._closed = True
