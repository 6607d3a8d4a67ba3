"""A connection whose receiving side is in the test's hands: the test says what each recv brings.

The sending side is real: a socket pair, read by a `Client`.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager

from nbdram.memory.budget import Budget
from nbdram.memory.device import Device
from nbdram.memory.tiers.disk import SwapArea
from nbdram.protocol.handshake import ReplyMode
from nbdram.protocol.wire import Option
from nbdram.server.exports import Exports
from nbdram.server.service import Service
from tests.fakes import FakeTransport
from tests.helpers import MIB, PATIENCE_S, Client, client_flags, go, meta_payload, option

_READ_AHEAD_BYTES = 64 * MIB


class Wire(FakeTransport):
    """The server's end of a connection, and as its transport a fake."""

    def __init__(self, service: Service, sock: socket.socket, client: Client) -> None:
        self.client = client
        super().__init__(service, sock)

    def feed_one(self, data: bytes) -> int:
        """One recv of at most `data`; how much of it there was room for."""
        view = self.connection.get_buffer(-1)
        length = min(len(view), len(data))
        view[:length] = data[:length]
        view.release()
        self.connection.buffer_updated(length)
        return length

    async def feed(self, data: bytes, cuts: Iterable[int] = ()) -> None:
        """All of `data`, cut at `cuts` at least, as fast as the connection takes it."""
        start = 0
        for end in (*cuts, len(data)):
            while start < end:
                async with asyncio.timeout(PATIENCE_S):
                    while self.paused:
                        await asyncio.sleep(0)
                start += self.feed_one(data[start:end])

    def stop_reading(self) -> None:
        """From now on the client takes nothing from its socket."""
        self.client.writer.transport.pause_reading()  # type: ignore[attr-defined]

    def read_again(self) -> None:
        self.client.writer.transport.resume_reading()  # type: ignore[attr-defined]

    async def enter(self, mode: ReplyMode, contexts: Sequence[str] = ()) -> None:
        """The handshake, for the export "ram"."""
        options = {ReplyMode.STRUCTURED: Option.STRUCTURED_REPLY, ReplyMode.EXTENDED: Option.EXTENDED_HEADERS}
        wanted = [option(options[mode])] if mode in options else []
        if contexts:
            wanted.append(option(Option.SET_META_CONTEXT, meta_payload("ram", contexts)))
        await self.feed(client_flags() + b"".join(wanted) + go("ram"))
        await self.client.receive(18)
        for _ in (*wanted, go):
            await self.client.answers()
        self.client.mode = mode


@asynccontextmanager
async def wired(
    mode: ReplyMode,
    *,
    size: int,
    memory: int = 64 * MIB,
    contexts: Sequence[str] = (),
    disks: Sequence[SwapArea] = (),
) -> AsyncIterator[tuple[Wire, Device]]:
    """A connection in the transmission phase, and the device that it serves."""
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
    exports = Exports(Budget(memory), disks)
    device = exports.create("ram", size).device
    client = Client(*await asyncio.open_connection(sock=theirs, limit=_READ_AHEAD_BYTES))
    wire = Wire(Service(exports), ours, client)
    try:
        async with client:
            await wire.enter(mode, contexts)
            yield wire, device
    finally:
        wire.close()
        await asyncio.sleep(0)
        exports.close()
