"""A Connection on a socket pair, its client, and a device with a tiny budget, as a program drives them.

Reclaim runs when the program says so: FREEZE has the image of a cluster made as a worker would, SETTLE puts it in the
cluster's place unless somebody touched that meanwhile.
"""

import asyncio
import fcntl
import socket
import termios
from array import array
from typing import Final

from nbdram.memory import reclaim
from nbdram.memory.layout import DIRTY_SHIFT, LENGTH_SHIFT, RESIDENT, TIER_MASK, TIER_SHIFT, Reference, Tier
from nbdram.memory.space import cold_reference
from nbdram.protocol.handshake import ExportInfo, Negotiated
from nbdram.server import commands
from nbdram.server import connection as hot_loop
from nbdram.server.service import RECEIVE_BYTES
from tests.fakes import FakeTransport
from tests.helpers import CLUSTER

from .model import Model
from .program import SIZE, Program, Step
from .stand import ROOMY, TIGHT, Stand

_PATIENCE: Final = 20_000  # rounds of the event loop
_waiting: Final = array("i", [0])
_received: Final = bytearray(1 << 18)
_received_view: Final = memoryview(_received)

# Small buffers stall, and a connection is alone sooner; nobody dozes.
for _name, _value in {
    "SEND_BUFFER_BYTES": 16 * 1024,
    "_ALONE_BATCHES": 3,
    "_SPIN_S": -1.0,  # to yield the processor would take longer than all the rest
    "_DOZE_FROM": 1 << 30,
}.items():
    assert hasattr(hot_loop, _name)
    setattr(hot_loop, _name, _value)
commands._INLINE_READ_BYTES = 2 * CLUSTER  # type: ignore[misc]


def _waiting_bytes(sock: socket.socket) -> int:
    """What can be received; to ask costs a third of an attempt in vain."""
    fcntl.ioctl(sock, termios.FIONREAD, _waiting)
    return _waiting[0]


class Rig:
    """A connection, its client, and its device."""

    def __init__(self, program: Program, stand: Stand) -> None:
        self.stand = stand
        self.budget = stand.budget
        self.device = stand.device
        self.reclaimer = stand.reclaimer
        self.service = stand.service
        self.client, ours = socket.socketpair()
        self.client.setblocking(False)
        ours.setblocking(False)
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.transport = FakeTransport(stand.service, ours)
        self.connection = self.transport.connection
        self.client.recv(64)
        contexts = {1: "base:allocation", 2: "x-nbdram:tier"} if program.has_contexts else {}
        info = ExportInfo("ram", SIZE, 0)
        self.connection._enter_transmission(Negotiated(info, program.mode, contexts), b"")
        self.model = Model(program.mode, contexts=program.has_contexts, read_only=program.read_only)
        self.jobs: list[reclaim._Job] = []
        self.is_reading = True
        self.has_finished = False
        self._queue = bytearray()

    # -- what a program does ---------------------------------------------------------------------------

    async def do(self, step: Step) -> None:
        match step.kind:
            case "send" | "raw":
                self._queue += step.data
                await self._flush()
            case "queue":
                self._queue += step.data
            case "cut":
                at = step.number * len(step.data) // 255
                self._queue += step.data[:at]
                await self._flush()
                self._queue += step.data[at:]
            case "freeze":
                self._freeze(step.number)
            case "settle":
                self._settle()
            case "run":
                await asyncio.sleep(0)
            case "stop reading" | "read":
                self.is_reading = step.kind == "read"
            case "free memory":
                self.budget.freed()
            case "lose hope":
                if self.budget.hopeful:
                    self.budget.give_up()
                else:
                    self.budget.hope()
            case "shrink budget" | "grow budget":
                self.stand.shrink(TIGHT // 2 if step.kind == "shrink budget" else ROOMY)
            case "finish":
                await self._flush()
                self.has_finished = True
                self.connection.finish()
        self._read()

    async def _flush(self) -> None:
        """Have the server receive what is queued, or as much as it takes now."""
        while self._queue:
            try:
                sent = self.client.send(self._queue)
            except (BlockingIOError, BrokenPipeError, ConnectionResetError):
                sent = 0
            self.model.sent(bytes(self._queue[:sent]))
            del self._queue[:sent]
            before = self._pump()
            self._read()
            if not sent and not before:
                await asyncio.sleep(0)
                if not self._pump():
                    return

    def _pump(self) -> int:
        """As much as the connection lets its transport receive."""
        received = 0
        while not (self.transport.paused or self.transport.closed) and _waiting_bytes(self.transport.sock):
            view = self.connection.get_buffer(-1)
            assert len(view), "there is no room for a byte more, but reading goes on"
            length = self.transport.sock.recv_into(view)
            view.release()
            self.connection.buffer_updated(length)
            received += length
            assert len(self.connection._held) <= RECEIVE_BYTES, "more is held than was received at once"
        return received

    def _read(self) -> int:
        received = 0
        while self.is_reading and _waiting_bytes(self.client):
            length = self.client.recv_into(_received)
            received += length
            self.model.received(_received_view[:length])
        return received

    # -- reclaim ---------------------------------------------------------------------------------------

    def _freeze(self, cluster: int) -> None:
        device = self.device
        word = device.word(cluster)
        if not word or cluster in device.reclaiming or device.is_receiving(cluster):
            return
        if word & RESIDENT and not word >> DIRTY_SHIFT & RESIDENT and word >> LENGTH_SHIFT:
            device.drop_resident(cluster)
            return
        if not word & RESIDENT and (word >> TIER_SHIFT & TIER_MASK != Tier.RAM or not device.far_tiers()):
            return
        device.references[cluster] = Reference.IDLE if word & RESIDENT else cold_reference(word)
        job = reclaim._Job(device, cluster, word)
        device.reclaiming.add(cluster)
        reclaim._store([job])
        if job.storing:
            try:
                job.storing.result()
            except OSError as error:
                reclaim._not_stored(job, error)
        self.jobs.append(job)

    def _settle(self) -> None:
        if self.jobs:
            self.reclaimer._settle([self.jobs.pop(0)])
            self.budget.freed()

    # -- the end -----------------------------------------------------------------------------------------

    async def finish(self) -> None:
        """All that was asked is answered; then the device is looked at, and everything given back."""
        while self.jobs:
            self._settle()
        self.is_reading = True
        rounds = 0
        while not self._is_quiet():
            self.budget.give_up()
            await self._flush()  # also when the server stops: of a WRITE that has begun it waits for the rest
            self._pump()
            await asyncio.sleep(0)
            self._read()
            rounds += 1
            assert rounds < _PATIENCE, f"{len(self.model.pending)} requests are never answered"
        self._read()
        if self.transport.closed:
            assert self.model.is_over or self.has_finished, "the server hung up without a reason"
        if not (self.has_finished or self.model.is_over or self.transport.closed):
            self.connection.eof_received()
        self.transport.close()
        rounds = 0
        while self.service.connections or self.connection._tasks:
            await asyncio.sleep(0)
            rounds += 1
            assert rounds < _PATIENCE, "a connection that is lost does not end"
        self.stand.check_accounts()
        if not (self.model.is_confused or self.has_finished or self._is_cut_off()):
            pieces = await self.service.fetcher.gather(self.device, 0, SIZE)
            for start, end, buffers in pieces:
                if buffers:
                    self.model.check(start, b"".join(buffers))
                else:
                    self.model.check_zeros(start, end)
            del pieces
            self.stand.check_accounts()

    def _is_cut_off(self) -> bool:
        """Whether a WRITE may have been done that was not answered any more."""
        return self.model.is_over and bool(self.model.pending)

    def _is_quiet(self) -> bool:
        if self.transport.closed:
            return True
        if self.has_finished:
            return False
        waiting = [request for request in self.model.pending.values() if not request.to_come]
        return not (waiting or self.model.is_over or self._queue or self.connection._tasks)

    def close(self) -> None:
        self.client.close()
        if not self.transport.closed:
            self.transport.sock.close()
