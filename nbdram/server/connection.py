"""One client: handshake, then THE hot loop.

The way of a request: `get_buffer` lends the receive buffer that all connections share (it is parsed before
anybody else runs), `_parse` walks through every request that one recv brought, answers from the device's maps,
and all replies of the batch leave by one writev of headers and views of `hot`: no copy, no await, no object that
outlives the batch. The payload of a large WRITE is received straight into `hot`; where that takes several recvs, an
`Incoming` remembers it from turn to turn.

Rules:
1. What can't be answered at once leaves `_parse` by one call (`_uncommon`), may become a task, and is answered
   out of order.
2. A batch that the socket does not take whole stalls the connection: nothing is parsed or received until it has
   drained. So a client that never reads costs one batch of views, and one receive buffer of unparsed bytes.
3. While views wait in `_unsent` or `_later`, the connection is in `device.senders` (invariant 7 of the device).
4. So many requests of a connection as the limits allow are under way as tasks; then it stalls likewise.

uvloop's own writelines was measured at 3.5 us of CPU per 4K READ at queue depth 64, writev at 2.5.
"""

import asyncio
import errno
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final, Protocol, cast

from nbdram.access import Client
from nbdram.memory.device import Device, FarPage
from nbdram.memory.incoming import Incoming
from nbdram.memory.layout import (
    CLUSTER,
    CLUSTER_SHIFT,
    RAM,
    RESIDENT_AND_DIRTY_MASKS,
    RESIDENT_MASKS,
    TIER_MASK,
    TIER_SHIFT,
    TOUCHED,
)
from nbdram.memory.readahead import ReadAhead
from nbdram.memory.space import Copies
from nbdram.protocol import wire
from nbdram.protocol.handshake import (
    Failure,
    Handshake,
    Negotiated,
    Refused,
    ReplyMode,
    TlsPolicy,
    UpgradeToTls,
)
from nbdram.protocol.replies import Replies, SimpleReplies, replies_for
from nbdram.server import commands, views
from nbdram.server.counters import COMMANDS, SAMPLE_EVERY
from nbdram.server.exports import Export, Visible
from nbdram.server.peers import peer_of
from nbdram.server.service import RECEIVE_BYTES, SEND_BUFFER_BYTES, Service

log = logging.getLogger("nbdram.connection")

# A WRITE of at least this much is received straight into `hot`; below, one recv of many requests wins.
DIRECT_BYTES: Final = 64 * 1024
_FIRST_SEND_BUFFER_BYTES: Final = 104 * 1024  # until a client has earned SEND_BUFFER_BYTES
# What one batch may hold: writev takes 1024 buffers, and a copy of its views must stay affordable.
_MAX_BUFFERS: Final = 1000
_MAX_BATCH_BYTES: Final = 4 * 1024 * 1024
# Decompressed bytes are ours until the socket takes them: at most this much, and one answer, for each connection.
_MAX_COPIED_BYTES: Final = 256 * 1024
_COPIED_WEIGHT: Final = _MAX_BATCH_BYTES // _MAX_COPIED_BYTES
_TASK_BYTES: Final = 4096  # about what a request that waits takes
_TASKS_WHERE_SHORT: Final = 16  # that wait at once for each client, while memory is short

# As long as one connection is all there is to serve, its next requests are received right here, without a round
# through the event loop, and after its replies we wait a moment for what it sends in return: at queue depth 1 that
# is 1.7 times the rate. Everybody else waits this much longer, at most:
_LINGER_S: Final = 0.001
_SPIN_S: Final = 40e-6
_ALONE_BATCHES: Final = 32  # so many in a row from one connection make it the only one
_UNWATCHED_FROM: Final = 4  # batches, from which on the event loop need not hear of it meanwhile
# After so much from one client, or _LINGER_S for it, the others have their turn: the event loop itself would take 32
# times what the socket holds, which is 4 ms of a client that writes as fast as it can, and linger as often.
_BURST_BYTES: Final = 256 * 1024
_LAST_LOOK_S: Final = 0.01  # when the server stops, at what a stalled client has sent meanwhile
# Replies to large WRITEs wait until so many are there, or nothing more has come in.
_MAX_DONE: Final = 4

# After a large batch of READs the loop dozes for as long as its client needs to take the replies, if that pays
# (`doze.py`). Only while no other connection is being served.
_DOZE_FROM: Final = 16
_DOZE_PER_READ_S: Final = 2e-6
_DOZE_MAX_S: Final = 60e-6

Buffer = bytes | bytearray | memoryview

# What the hot loop asks in each batch, looked up once. For each mode: whether replies are simple, whether they are
# structured, and the flags of a common WRITE.
_PACK_SIMPLE: Final = wire.SIMPLE_REPLY.pack
_PACK_READ: Final = wire.READ_DATA.pack
_SPEAKS: Final = {
    ReplyMode.SIMPLE: (True, False, 0),
    ReplyMode.STRUCTURED: (False, True, 0),
    ReplyMode.EXTENDED: (False, False, int(wire.CommandFlag.PAYLOAD_LEN)),
}


class _Transport(Protocol):
    """What is used of uvloop's transports."""

    def get_extra_info(self, name: str) -> Any: ...
    def write(self, data: bytes) -> None: ...
    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...


class Connection(asyncio.BufferedProtocol):
    """The server's end of one NBD connection."""

    def __init__(self, service: Service, tls: TlsPolicy = TlsPolicy.OFF) -> None:
        self._service = service
        self.fetcher = service.fetcher
        self.ahead = ReadAhead(service.fetcher)
        self.write_wait_s = service.write_wait_s
        self._buffer = service.receive_buffer
        self._view = service.receive_view
        self._loop = asyncio.get_running_loop()
        self._transport: _Transport = cast(_Transport, None)
        self._fd = -1
        self._writer_fd = -1  # a duplicate to watch: uvloop watches the original itself
        self.peer = "?"
        self.opened_at = 0.0  # the export, by time.monotonic
        self.active = True  # since somebody has looked: see `server/quiet.py`
        self.quiet_since = 0.0
        # handshake phase
        self._handshake: Handshake | None = Handshake(Visible(service.exports, lambda: self.client), tls)
        self.client = Client()
        self._deadline: asyncio.TimerHandle | None = None
        self.on_entered: Callable[[], None] | None = None  # called when the handshake has come to something
        # transmission phase
        self.export: Export = cast(Export, None)
        self.device: Device = cast(Device, None)
        self.replies: Replies = SimpleReplies()
        self.contexts: dict[int, str] = {}
        self._mode = ReplyMode.SIMPLE
        self._speaks = _SPEAKS[self._mode]
        self._unpack = wire.REQUEST.unpack_from
        self._header_bytes = wire.REQUEST.size
        self._magic = wire.REQUEST_MAGIC
        # receiving
        self._held = b""  # an incomplete request, or requests that wait for the stall to end
        self._window = RECEIVE_BYTES  # how much the next recv may bring
        self._incoming: Incoming | None = None
        self._incoming_request = (0, 0)  # its cookie and offset
        self._incoming_since = 0.0
        self._done: list[Buffer] = []  # replies to large WRITEs, which are sent together
        self._burst = 0  # bytes that came since others had their turn
        self._skip = 0  # bytes of a refused payload that are still to come
        self._skip_reply: Buffer = b""  # the refusal, held back until then
        # sending
        self._unsent: deque[Buffer] = deque()
        self._viewed: set[int] | None = None  # the clusters that `_unsent` and `_later` look at, once asked for
        self._copied = 0  # bytes of the batch that are not views of `hot`
        self._occupied = False  # by an answer in one piece: all others come after it
        self._later: deque[Buffer] = deque()  # those
        self._drained: list[asyncio.Future[None]] = []
        self._tasks: set[asyncio.Task[None] | commands.ShortRead] = set()
        self._answered: list[commands.ShortRead] = []  # in this turn of the loop
        self.long_answer = asyncio.Lock()
        self._stalled = False
        self._starved = False  # a WRITE waits for memory
        self._is_paced = False
        self._pausing: asyncio.Handle | None = None  # until the export's caps allow more, or others had their turn
        self._paid = 0  # so much of `_held` is paid already
        self._starving_since = 0.0
        self._fetch_error: OSError | None = None
        self._hunger: asyncio.TimerHandle | None = None
        self._closing = False  # by DISC, or because the server stops
        self._ended = False  # nothing more is taken: the client has closed its sending side, or the server stops
        self._finishing = False  # the server stops, and this client was stalled then
        self._lost = False

    # -- asyncio's calls -----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(_Transport, transport)
        sock = self._transport.get_extra_info("socket")
        self.client = peer_of(sock)
        if not self._service.admit(self):
            self._transport.abort()
            return
        self._fd = sock.fileno()
        self.peer = _peer_name(self._transport)
        _tune(sock)
        self._deadline = self._loop.call_later(self._service.limits.handshake_timeout_s, self._handshake_late)
        assert self._handshake
        self._send([self._handshake.data_to_send()])

    def get_buffer(self, sizehint: int) -> memoryview:
        incoming = self._incoming
        if incoming is not None:
            return incoming.view()
        held = self._held
        if held:
            length = len(held)
            self._buffer[:length] = held
            return self._view[length : max(self._window, length + 1)]
        return self._view[: self._window]

    def buffer_updated(self, nbytes: int) -> None:
        if self._handshake is not None:
            self._haggle(self._view[:nbytes])
            return
        self._received(nbytes)
        service = self._service
        if service.last_served is self and service.batches - service.served_since >= _ALONE_BATCHES:
            self._linger()
        if self._done:
            self._send_done()
        self._burst += nbytes
        if self._burst >= _BURST_BYTES:
            self._burst = 0
            if not (self._stalled or self._closing or self._ended):
                self._stall()
                self._pausing = self._loop.call_soon(self._pace_over)

    def _received(self, nbytes: int) -> None:
        if self._incoming is not None:
            self._payload_received(nbytes)
        elif self._held:
            end = len(self._held) + nbytes
            self._held = b""
            self._parse(end)
        else:
            self._parse(nbytes)

    def _linger(self) -> None:
        """Receive and answer what else comes in, until nothing does for a moment, or others must have their turn.

        The end of the connection is left to the event loop, which sees it next.
        """
        receive, now = self._receive_soon, time.perf_counter
        budget, fd = self.device.budget, self._fd
        whole: tuple[memoryview, ...] = (self._view,)
        before = self._served
        started = now()
        deadline = started + _LINGER_S
        batches = 0
        unwatched = False
        try:
            # What tasks wait for comes by way of the event loop.
            while not (
                self._tasks or self._stalled or self._closing or self._ended or budget.free_pages < budget.wake_below
            ):
                incoming = self._incoming
                fresh = incoming is None and not self._held and self._window == RECEIVE_BYTES
                places = whole if fresh else (self.get_buffer(-1),)
                if incoming is not None and incoming.is_last:
                    # The next request comes along, but not its payload, which would have to be copied.
                    places = (*places, self._view[: self._header_bytes])
                received = receive(places, deadline)
                if not received:
                    return
                if fresh:
                    self._parse(received)
                else:
                    room = len(places[0])
                    self._received(min(received, room))
                    if received > room:
                        # What follows may be all of this turn.
                        unwatched = unwatched or self._service.watch.suspend(fd)
                        self._next_header(received - room, deadline)
                elapsed = now() - started
                if elapsed > _LINGER_S:
                    self._service.doze.judge(self._served - before, elapsed)
                    return
                batches += 1
                if batches == _UNWATCHED_FROM and not unwatched:
                    unwatched = self._service.watch.suspend(fd)
        finally:
            if unwatched:
                self._watch_again()
            if now() > deadline:
                self._burst = _BURST_BYTES

    def _receive_soon(self, places: tuple[memoryview, ...], deadline: float) -> int:
        """Receive what comes in within a moment; 0 if nothing does, and at the end of the connection."""
        readv, yield_cpu, now = os.readv, os.sched_yield, time.perf_counter
        until = 0.0
        while True:
            try:
                return readv(self._fd, places)
            except BlockingIOError:
                if self._done:
                    self._send_done()
                    if self._stalled or self._closing:
                        return 0
                moment = now()
                until = until or min(moment + _SPIN_S, deadline)
                if moment > until:
                    return 0
                yield_cpu()
            except OSError:
                return 0

    def _next_header(self, length: int, deadline: float) -> None:
        """So much of the next request's header came along with the end of a payload."""
        while length == self._header_bytes and not self._stalled and time.perf_counter() < deadline:
            following = self._overwrite(deadline)
            if following < 0:
                break
            length = following
        if self._stalled:
            self._held = bytes(self._view[:length])
        elif length and not self._closing:
            self._parse(length)

    def _overwrite(self, deadline: float) -> int:
        """Receive the WRITE whose header is in the buffer, if it is large and of memory that is resident and dirty.

        As long as nobody else runs, nothing has to be noted of it. Returns how much of the next header came along;
        -1: it is another request.
        """
        device = self.device
        magic, flags, command, cookie, offset, length = self._unpack(self._buffer, 0)
        end: int = offset + length
        if (
            command != wire.Command.WRITE
            or not DIRECT_BYTES <= length <= wire.MAX_PAYLOAD_BYTES
            or flags != self._speaks[2]
            or magic != self._magic
            or self._is_paced
            or self.export.read_only
            or not device.is_whole(offset >> CLUSTER_SHIFT, ((end - 1) >> CLUSTER_SHIFT) + 1)
        ):
            return -1
        begun = time.perf_counter()
        self.export.counters.operations["write"] += 1
        self.export.counters.written_bytes += length
        header = self._view[: self._header_bytes]
        at: int = offset
        while at < end:
            received = self._receive_soon((device.hot_view[at:end], header), deadline)
            if not received:
                self._begin_incoming(cookie, offset, end, begun).received(at - offset)
                return 0
            at += received
        device.overwritten(offset, end)
        device.drop_zeros(offset, end, device.hot_view)
        self._service.batches += 1
        self._acknowledge(cookie, offset, begun)
        if at == end:
            return 0 if self._stalled else self._receive_soon((header,), deadline)
        return at - end

    @property
    def _served(self) -> int:
        operations = self.export.counters.operations
        return operations["read"] + operations["write"]

    def _watch_again(self) -> None:
        try:
            self._service.watch.resume(self._fd)
        except OSError:  # nothing more would be heard of it
            self._transport.abort()

    def eof_received(self) -> bool:
        """The client will send no more; answer what it did send, then close."""
        self._ended = True
        self._abandon_incoming()
        self._close_if_idle()
        return True

    def connection_lost(self, exc: BaseException | None) -> None:
        self._lost = True
        if self._deadline:
            self._deadline.cancel()
        self._abandon_incoming()
        for task in self._tasks:
            task.cancel()
        self._stop_writer()
        if self._pausing:
            self._pausing.cancel()
        self._unsent.clear()
        self._later.clear()
        self._wake_drained()
        if self.device is not None:
            self.device.budget.leave(self)
            self.device.senders.discard(self)
            self.export.connections -= 1
            log.info("%s closed export %r", self.peer, self.export.name)
        elif self in self._service.haggling and not self._closing:
            self._service.counters.handshake_failures[Failure.HUNG_UP] += 1
        self._service.forget(self)

    # -- handshake phase -----------------------------------------------------------------------------

    def _haggle(self, data: memoryview) -> None:
        handshake = self._handshake
        assert handshake
        handshake.receive(data)
        out = handshake.data_to_send()
        if out:
            self._send([out])
            self._service.haggling.got_further(self)
        outcome = handshake.outcome
        if isinstance(outcome, Negotiated):
            self._enter_transmission(outcome, handshake.leftover())
        elif isinstance(outcome, Refused):
            self._service.counters.handshake_failures[outcome.failure] += 1
            if outcome.failure is Failure.ABORTED:  # it has asked what it wanted to know
                self._entered()
            log.info("%s left in the handshake: %s", self.peer, outcome.reason)
            self.close_when_idle()
        elif isinstance(outcome, UpgradeToTls):
            self._turn_to_tls(handshake, outcome)

    def _turn_to_tls(self, before: Handshake, agreed: UpgradeToTls) -> None:
        """Hand the socket over to the TLS thread. What was negotiated is forgotten."""
        assert self._service.tls
        if self._unsent:  # the acknowledgement stands behind what this client has never read
            self.tls_failed("the client does not read")
            return
        try:
            sock = socket.socket(fileno=os.dup(self._fd))
        except OSError as error:  # too many open files
            log.warning("%s can't be answered: %s", self.peer, error.strerror)
            self._transport.abort()
            return
        self._stop_writer()
        plain, self._fd = self._transport, -1
        plain.pause_reading()
        plain.set_protocol(asyncio.Protocol())
        plain.abort()
        self._handshake = Handshake(before.catalogue, before.tls, secure=True, no_zeroes=agreed.no_zeroes)
        self._transport = self._service.tls.take(sock, self)

    def secured(self, transport: asyncio.BaseTransport, names: frozenset[str]) -> None:
        """TLS is up, and the haggling begins again inside; the client's certificate has `names`."""
        self._transport = cast(_Transport, transport)
        self.client = replace(self.client, names=names)
        self._service.haggling.got_further(self)
        sock = self._transport.get_extra_info("socket")
        self._fd = sock.fileno()
        _tune(sock)

    def tls_failed(self, reason: str) -> None:
        self._closing = True
        self._service.counters.handshake_failures[Failure.TLS_FAILED] += 1
        log.info("%s left in the handshake: %s", self.peer, reason)
        self._transport.abort()

    def _handshake_late(self) -> None:
        self._closing = True
        self._service.counters.handshake_failures[Failure.LATE] += 1
        log.info("%s did not finish the handshake in %g s", self.peer, self._service.limits.handshake_timeout_s)
        self._transport.abort()

    def _entered(self) -> None:
        if self.on_entered:
            self.on_entered()
            self.on_entered = None

    def _enter_transmission(self, agreed: Negotiated, leftover: bytes) -> None:
        export = self._service.exports.get(agreed.export.name)
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None
        if export is None:  # removed in this very moment
            self._transport.abort()
            return
        self._handshake = None
        self._service.haggling.discard(self)
        self._entered()
        self.export, self.device = export, export.device
        export.connections += 1
        self.opened_at = time.monotonic()
        export.counters.connections_opened += 1
        self.contexts = agreed.contexts
        self.replies = replies_for(agreed.mode)
        self._mode = agreed.mode
        self._speaks = _SPEAKS[agreed.mode]
        self.follow_pace()
        if agreed.mode is ReplyMode.EXTENDED:
            self._unpack = wire.EXTENDED_REQUEST.unpack_from
            self._header_bytes = wire.EXTENDED_REQUEST.size
            self._magic = wire.EXTENDED_REQUEST_MAGIC
        log.info("%s opened export %r (%s replies)", self.peer, export.name, agreed.mode.value)
        if leftover:
            self._buffer[: len(leftover)] = leftover
            self._parse(len(leftover))

    # -- the hot loop --------------------------------------------------------------------------------

    def _parse(self, end: int) -> None:
        """Answer the requests in the first `end` bytes of the receive buffer; hold what is incomplete."""
        service = self._service
        service.batches += 1
        sample = None if service.batches % SAMPLE_EVERY else self._begin_sample()
        device = self.device
        buffer, view = self._buffer, self._view
        unpack, header_bytes, expected = self._unpack, self._header_bytes, self._magic
        simple, structured, write_flags = self._speaks
        size = device.size
        hot, hot_view, words, references = (
            device.hot,
            device.hot_view,
            device.words,
            device.references,
        )
        writable = not self.export.read_only
        masks, dirty_masks = RESIDENT_MASKS, RESIDENT_AND_DIRTY_MASKS
        pack_simple, pack_read = _PACK_SIMPLE, _PACK_READ
        out: list[Buffer] = []
        append = out.append
        done = bytearray()  # what acknowledges the WRITEs
        reads = writes = read_bytes = written_bytes = copied = 0
        found: Sequence[Buffer] | None
        resident: Sequence[Buffer] = []  # stands for what is found in `hot`
        read_cold = device.read_cold
        batch_end = _MAX_BATCH_BYTES
        at = 0
        if self._skip:
            at = min(self._skip, end)
            self._skip -= at
            if not self._skip:
                append(self._skip_reply)
        self._window = RECEIVE_BYTES

        while end - at >= header_bytes:
            magic, flags, command, cookie, offset, length = unpack(buffer, at)
            if magic != expected:
                self._out_of_sync(magic)
                return
            stop = offset + length
            if command == 0 and not flags and stop <= size:  # READ
                within = offset & 0xFFFF
                found = None
                if 0 < length <= CLUSTER - within:
                    cluster = offset >> CLUSTER_SHIFT
                    reference = references[cluster]
                    if reference:
                        mask = masks[within >> 12 << 4 | (within + length - 1) >> 12]
                        word = words[cluster]
                        here = word & mask
                        if here == mask:
                            if reference < TOUCHED:
                                references[cluster] = TOUCHED
                            found = resident
                        elif not here and word >> TIER_SHIFT & TIER_MASK == RAM:
                            try:
                                found = read_cold(cluster, word, offset, stop)
                            except OSError as error:
                                self.fail(out, wire.Command.READ, cookie, offset, error)
                                at += header_bytes
                                continue
                elif 0 < length <= wire.MAX_PAYLOAD_BYTES and device.is_resident(offset, stop):
                    found = resident
                if found is not None:
                    if structured:
                        append(pack_read(0x668E33EF, 1, 1, cookie, length + 8, offset))
                    elif simple:
                        append(pack_simple(0x67446698, 0, cookie))
                    else:
                        append(self.replies.data(cookie, offset, length, offset, last=True))
                    if found is resident:
                        append(hot_view[offset:stop])
                    else:
                        out += found
                        copied += length
                        batch_end -= length * _COPIED_WEIGHT
                    reads += 1
                    read_bytes += length
                    at += header_bytes
                    if len(out) >= _MAX_BUFFERS or read_bytes >= batch_end:
                        self._send(out)
                        out.clear()
                        batch_end = read_bytes + _MAX_BATCH_BYTES
                        if self._stalled:
                            break
                    continue
            elif command == 1 and flags == write_flags and stop <= size and writable:  # WRITE
                start = at + header_bytes
                if start + length <= end:
                    within = offset & 0xFFFF
                    if 0 < length <= CLUSTER - within:
                        cluster = offset >> CLUSTER_SHIFT
                        mask = dirty_masks[within >> 12 << 4 | (within + length - 1) >> 12]
                        if references[cluster] and words[cluster] & mask == mask:
                            hot[offset:stop] = view[start : start + length]
                            references[cluster] = TOUCHED
                            at = start + length
                            if write_flags:
                                done += self.replies.done(cookie, offset)
                            else:
                                done += pack_simple(0x67446698, 0, cookie)
                            writes += 1
                            written_bytes += length
                            continue
                elif length < DIRECT_BYTES:
                    break
                elif length <= wire.MAX_PAYLOAD_BYTES:
                    after = self._write(start, end, out, cookie, offset, length)
                    at = max(at, after)  # -1: it must wait
                    break
            after = self._uncommon(at, end, out, flags, command, cookie, offset, length)
            if after < 0:  # incomplete
                break
            at = after
            if len(out) >= _MAX_BUFFERS:
                self._send(out)
                out.clear()
            if self._stalled or self._closing:
                break

        counters = self.export.counters
        operations = counters.operations
        if reads:
            operations["read"] += reads
            counters.read_bytes += read_bytes
        if writes:
            operations["write"] += writes
            counters.written_bytes += written_bytes
        if at < end:
            self._held = bytes(view[at:end])
        if done:
            out.insert(0, done)
        if out:
            self._send(out)
            if sample:
                self._end_sample(*sample)
            if (
                reads >= _DOZE_FROM
                and not copied
                and service.doze.pays
                and service.last_served is self
                and not self._stalled
            ):
                time.sleep(min(reads * _DOZE_PER_READ_S, _DOZE_MAX_S))
        self.active = True
        if service.last_served is not self:
            service.last_served = self
            service.served_since = service.batches

    def copied(self, out: list[Buffer], length: int) -> None:
        """An answer of so many bytes that are not views of `hot` is in `out`; send what is there if that is much."""
        self._copied += length
        if self._copied >= _MAX_COPIED_BYTES or len(out) >= _MAX_BUFFERS:
            self._send(out)
            out.clear()

    # -- caps of the export ---------------------------------------------------------------------------

    def follow_pace(self) -> None:
        """Heed the caps of the export, if it has any (now)."""
        paced = self.export.pace is not None
        if paced != self._is_paced:  # an attribute comes before the method of its name: who has no caps pays nothing
            self._is_paced = paced
            if paced:
                vars(self)["_parse"] = self._parse_paced
            else:
                del vars(self)["_parse"]
        self._paid = 0
        if self._pausing:
            self._pausing.cancel()
            self._pace_over()

    def _parse_paced(self, end: int) -> None:
        """As `_parse`, as far as the caps allow; what is beyond waits its turn in `_held`."""
        pace = self.export.pace
        assert pace
        start, self._paid = max(min(self._skip, end), self._paid), 0
        extended = self._mode is ReplyMode.EXTENDED
        stop, paid, delay = pace.admit(self._view[:end], start, extended=extended, direct_bytes=DIRECT_BYTES)
        rest = bytes(self._view[stop:end])
        if stop:
            Connection._parse(self, stop)
            self._paid = max(0, paid - (stop - len(self._held)))
        if self._closing:
            return
        self._held += rest
        if rest:
            self._stall()
            self._pausing = self._loop.call_later(delay, self._pace_over)

    def _pace_over(self) -> None:
        self._pausing = None
        self._resume()

    # -- off the hot loop ----------------------------------------------------------------------------

    def _uncommon(
        self,
        at: int,
        end: int,
        out: list[Buffer],
        flags: int,
        command: int,
        cookie: int,
        offset: int,
        length: int,
    ) -> int:
        """A request that the hot loop did not answer. Returns where the next one starts, -1 for "not all there"."""
        start = at + self._header_bytes
        payload = length if command == wire.Command.WRITE else 0
        if self._mode is ReplyMode.EXTENDED and flags & wire.CommandFlag.PAYLOAD_LEN:
            payload = length
            if payload > wire.MAX_PAYLOAD_BYTES:
                self._broken(f"sent a payload of {payload} bytes, more than the maximum")
                return end
        refusal = commands.refusal(self, flags, command, offset, length)
        if refusal is None and payload and command == wire.Command.WRITE:
            if start + payload > end and payload < DIRECT_BYTES:
                return -1
            return self._write(start, end, out, cookie, offset, length)
        if refusal is None and payload and start + payload > end and payload <= commands.MAX_STATUS_PAYLOAD:
            return -1
        self._count(command)
        if refusal is not None:
            self.refuse(out, command, cookie, offset, *refusal)
        elif command == wire.Command.DISC:
            self._transport.pause_reading()
            self.close_when_idle()
            return end
        elif payload:
            body = bytes(self._view[start : start + payload])
            commands.block_status_with_payload(self, out, flags, cookie, offset, body)
        else:
            if out and command in commands.PUNCHES:  # views of pages that go must be in the socket, or in `_unsent`
                self._send(out)
                out.clear()
            commands.begin(self, out, flags, command, cookie, offset, length)
        return self._after_payload(start, end, out, payload)

    def _after_payload(self, start: int, end: int, out: list[Buffer], payload: int) -> int:
        """Pass over a payload nobody needs. If some of it is still to come, so is its refusal, the last of `out`:
        libnbd gives a connection up that answers a WRITE before all of it was sent.
        """
        if start + payload <= end:
            return start + payload
        self._skip = start + payload - end
        self._skip_reply = out.pop()
        return end

    def _write(self, start: int, end: int, out: list[Buffer], cookie: int, offset: int, length: int) -> int:
        """A WRITE to pages that are not resident yet, or too large for the receive buffer."""
        arrived = min(length, end - start)
        try:
            if arrived == length:
                self.device.write(offset, self._view[start : start + length])
                out.append(self.replies.done(cookie, offset))
            else:
                if out:  # zeros are punched as they arrive: views of them must be in the socket, or in `_unsent`
                    self._send(out)
                    out.clear()
                incoming = self._begin_incoming(cookie, offset, offset + length, time.perf_counter())
                if arrived:
                    incoming.write(self._view[start:end])
        except OSError as error:
            self._abandon_incoming()
            final = self._wait_for(error, offset, offset + length)
            if final is None:
                return -1
            self._count(wire.Command.WRITE)
            self.fail(out, wire.Command.WRITE, cookie, offset, final)
            del final  # its traceback has this frame, and that the views in `out`: a cycle that would keep them
            return self._after_payload(start, end, out, length)
        self._end_wait()
        self._fetch_error = None
        self._count(wire.Command.WRITE)
        self.export.counters.written_bytes += length
        return start + arrived

    def _begin_incoming(self, cookie: int, offset: int, end: int, begun: float) -> Incoming:
        """From now on a WRITE of [offset, end) is under way from turn to turn; OSError as `Incoming.grant`."""
        self._incoming = Incoming(self.device, offset, end, self._service.payload_view)
        self._incoming_request = (cookie, offset)
        self._incoming_since = begun
        return self._incoming

    def _wait_for(self, error: OSError, offset: int, end: int) -> OSError | None:
        """Stall until what kept a WRITE of [offset, end) from going on is over; or the error that it is to get."""
        failed, self._fetch_error = self._fetch_error, None
        if isinstance(error, FarPage):
            if failed is None:
                self._wait_for_disk(offset, end)
                return None
            error = failed
        if error.errno == errno.ENOSPC and self._wait_for_memory():
            return None
        return error

    def _wait_for_memory(self) -> bool:
        """Stall until memory is free, and try the WRITE again; False when there is no hope, or it took too long."""
        budget, now = self.device.budget, self._loop.time()
        if not self._starving_since:
            self._starving_since = now
        left = self._starving_since + self.write_wait_s - now
        if not budget.hopeful or left <= 0:
            self._end_wait()
            return False
        self.export.counters.write_waits += 1
        self._starved = True
        self._stall()
        budget.wait(self, self._memory_freed)
        self._hunger = self._loop.call_later(left, self._try_again)
        return True

    def _end_wait(self) -> None:
        if self._starving_since:
            self._service.counters.write_wait_seconds.observe(self._loop.time() - self._starving_since)
            self._starving_since = 0.0

    def _wait_for_disk(self, offset: int, end: int) -> None:
        """Stall until the pages that a WRITE covers only in part are read from disk, and try it again."""

        async def fetch() -> None:
            try:
                await self.fetcher.fetch_edges(self.device, offset, end)
            except OSError as error:
                self._fetch_error = error
            self._try_again()

        self._starved = True
        self._stall()
        self.spawn(wire.Command.WRITE, fetch())

    def _memory_freed(self) -> None:
        self._loop.call_soon(self._try_again)  # not in the middle of what has just freed it

    def _try_again(self) -> None:
        if self._starved and not self._lost:
            self._starved = False
            if self._hunger:
                self._hunger.cancel()
            with self.device.budget.turn(self):
                self._resume()

    def _payload_received(self, length: int) -> None:
        incoming = self._incoming
        assert incoming
        self.active = True
        try:
            done = incoming.received(length)
        except OSError as error:
            self._refuse_rest(incoming, error, length)
            return
        if done:
            self._incoming = None
            self._acknowledge(*self._incoming_request, self._incoming_since)
        elif incoming.is_held_up:
            self._grant(incoming)

    def _acknowledge(self, cookie: int, offset: int, begun: float) -> None:
        """All of a large WRITE is in place."""
        # More of the same is likely: take only the next header, so that its payload needs no copy.
        self._window = self._header_bytes
        self._done.append(self.replies.done(cookie, offset))
        if len(self._done) >= _MAX_DONE:
            self._send_done()
        self._service.counters.inline_seconds["write"].observe(time.perf_counter() - begun)

    def _send_done(self) -> None:
        done, self._done = self._done, []
        self.send(done)
        self._close_if_idle()

    def _grant(self, incoming: Incoming) -> None:
        """Let a large WRITE go on, wait until it can, or refuse it and pass over the rest of its payload."""
        try:
            incoming.grant()
            self._end_wait()
            self._fetch_error = None
        except OSError as error:
            final = self._wait_for(error, *incoming.remaining)
            if final is not None:
                self._refuse_rest(incoming, final)
            del final  # as above

    def _refuse_rest(self, incoming: Incoming, error: OSError, dropped: int = 0) -> None:
        """End a large WRITE with an error, when the rest of its payload has come; so much of that was dropped."""
        start, end = incoming.remaining
        self._abandon_incoming()
        refusal: list[Buffer] = []
        self.fail(refusal, wire.Command.WRITE, *self._incoming_request, error)
        self._skip, self._skip_reply = end - start - dropped, refusal[0]
        if not self._skip:
            self.send(refusal)

    def _abandon_incoming(self) -> None:
        if self._incoming is not None:
            self._incoming.abandon()
            self._incoming = None

    def _count(self, command: int) -> None:
        if name := COMMANDS.get(command):
            self.export.counters.operations[name] += 1

    def count_read(self, length: int) -> None:
        self.export.counters.read_bytes += length

    def _begin_sample(self) -> tuple[float, int, int, int]:
        operations = self.export.counters.operations
        return time.perf_counter(), operations["read"], operations["write"], len(self._tasks)

    def _end_sample(self, begun: float, reads: int, writes: int, tasks: int) -> None:
        """Each request of this batch was answered so long after it came; a batch that began a task is left out."""
        if len(self._tasks) <= tasks:
            seconds = time.perf_counter() - begun
            operations, histograms = self.export.counters.operations, self._service.counters.inline_seconds
            histograms["read"].observe(seconds, (operations["read"] - reads) * SAMPLE_EVERY)
            histograms["write"].observe(seconds, (operations["write"] - writes) * SAMPLE_EVERY)

    def refuse(self, out: list[Buffer], command: int, cookie: int, offset: int, number: int, message: str) -> None:
        """Answer a request with an error."""
        if name := COMMANDS.get(command):
            self.export.counters.errors[name] += 1
        out.append(self.replies.error(cookie, offset, number, message))

    def fail(self, out: list[Buffer], command: int, cookie: int, offset: int, error: OSError) -> None:
        """Answer a request that the device could not serve."""
        if error.errno == errno.ENOSPC:
            self.export.counters.out_of_memory += 1
        self.refuse(out, command, cookie, offset, *commands.reason(error))

    def _out_of_sync(self, magic: int) -> None:
        self._broken(f"sent a request without its magic ({magic:#010x})")

    def give_up(self, error: OSError) -> None:
        """An answer that has begun can't be ended: there is no other way to tell."""
        self._broken(f"can't be answered to the end ({error.strerror})")

    def _broken(self, what: str) -> None:
        """The peer can't be understood any more: hang up."""
        self._service.counters.protocol_errors += 1
        log.warning("%s %s: closed", self.peer, what)
        self._closing = True
        self._transport.abort()

    # -- requests that take a while ------------------------------------------------------------------

    def spawn(self, command: int, work: Coroutine[Any, Any, None]) -> None:
        """Run a request as a task of this connection; it ends by calling `send`."""
        task = self._loop.create_task(work)
        begun = time.perf_counter()
        task.add_done_callback(lambda task: self._task_done(task, command, begun))
        self.wait_for(task)

    def wait_for(self, work: "asyncio.Task[None] | commands.ShortRead") -> None:
        """A request has begun that will be answered later."""
        self._tasks.add(work)
        self.device.budget.may_have_grown(_TASK_BYTES)
        if self._is_full():
            self._stall()

    def answer(self, read: "commands.ShortRead", buffers: list[Buffer]) -> None:
        """Answer a READ that was waited for, together with all others that are answered in this turn of the loop."""
        if not self._answered:
            self._loop.call_soon(self._send_answers)
        self._answered.append(read)
        self._keep(buffers)

    def _send_answers(self) -> None:
        answered, self._answered = self._answered, []
        if not self._occupied:
            self._send_later()
        seconds = self._service.counters.task_seconds["read"]
        for read in answered:
            seconds.observe(time.perf_counter() - read.begun)
        self._tasks.difference_update(answered)
        if not self._lost:
            self._resume()

    def _is_full(self) -> bool:
        """Whether there are as many tasks as may be at once: fewer where memory is short, for it takes some to wait."""
        tasks, budget = len(self._tasks), self.device.budget
        if not tasks or budget.free_pages >= budget.wake_below:
            return tasks >= self._service.limits.requests_in_flight
        return tasks >= (_TASKS_WHERE_SHORT if budget.free_pages > 0 else 1)

    def _task_done(self, task: asyncio.Task[None], command: int, begun: float) -> None:
        self._tasks.discard(task)
        self._service.counters.task_seconds[COMMANDS[command]].observe(time.perf_counter() - begun)
        if self._lost:
            return
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failed(error)
            return
        self._resume()

    def failed(self, error: BaseException) -> None:
        """A request could not be answered, for a reason that should not be."""
        log.error("%s: a request failed unexpectedly", self.peer, exc_info=error)
        self._broken("could not be answered")

    @property
    def waits_for(self) -> str:
        """What the client is waited for, if it is: its next "request", or the "rest" of what it sends or reads."""
        if self._handshake is not None or self._closing:
            return ""
        if self._unsent or (self._incoming is not None and not self._incoming.is_held_up):
            return "rest"
        return "" if self._stalled or self._tasks or self._incoming is not None else "request"

    # -- sending -------------------------------------------------------------------------------------

    def send(self, buffers: list[Buffer]) -> None:
        """Send what a task has for the client."""
        if self._occupied:
            self._keep(buffers)
        elif not self._lost:
            self._send(buffers)

    def _keep(self, buffers: list[Buffer]) -> None:
        """To be sent with `_send_later`."""
        self._later += buffers
        self._viewed = None
        self.device.senders.add(self)

    def _send_later(self) -> None:
        later, self._later = list(self._later), deque()
        self.send(later)
        if not self._unsent:
            self.device.senders.discard(self)

    @contextmanager
    def occupied(self) -> Iterator[Callable[[list[Buffer]], None]]:
        """For an answer that can't be cut into chunks: gives what sends its parts. All others come after it."""
        self._occupied = True
        self._stall()
        try:
            yield lambda buffers: None if self._lost else self._send(buffers)
        finally:
            self._occupied = False
            self._send_later()
            self._wake_drained()
            self._resume()

    def is_drained(self, *, occupied: bool = False) -> bool:
        """Whether nothing is queued for the socket, and nobody else has `occupied` it; or the client is gone."""
        return self._lost or not (self._unsent or (self._occupied and not occupied))

    async def drained(self, *, occupied: bool = False) -> None:
        """Wait until that is so."""
        while not self.is_drained(occupied=occupied):
            waiter = self._loop.create_future()
            self._drained.append(waiter)
            await waiter

    def _send(self, buffers: list[Buffer]) -> None:
        self._copied = 0
        if self._unsent:
            self._unsent.extend(buffers)
            self._viewed = None
            if self.device is not None:
                self.device.budget.may_have_grown(sum(map(len, buffers)))
                self.device.senders.add(self)
            return
        try:
            sent = os.writev(self._fd, buffers if len(buffers) <= _MAX_BUFFERS else buffers[:_MAX_BUFFERS])
        except BlockingIOError:
            sent = 0
        except OSError:
            self._transport.abort()
            self._stall()
            return
        if sent == sum(map(len, buffers)):
            return
        for number, buffer in enumerate(buffers):
            if sent < len(buffer):
                self._unsent.append(buffer[sent:])
                self._unsent.extend(buffers[number + 1 :])
                self._watch_writable()
                return
            sent -= len(buffer)

    def _watch_writable(self) -> None:
        self._stall()
        self._viewed = None
        if self.device is not None:
            self.device.senders.add(self)
            self.device.budget.may_have_grown(sum(map(len, self._unsent)))
        if self._writer_fd < 0:
            try:
                self._writer_fd = os.dup(self._fd)
            except OSError as error:  # too many open files
                log.warning("%s can't be answered: %s", self.peer, error.strerror)
                self._transport.abort()
                return
        self._loop.add_writer(self._writer_fd, self._writable)

    def _stop_writer(self) -> None:
        if self._writer_fd >= 0:
            self._loop.remove_writer(self._writer_fd)
            os.close(self._writer_fd)
            self._writer_fd = -1

    def _writable(self) -> None:
        unsent = self._unsent
        try:
            sent = os.writev(self._fd, [unsent[i] for i in range(min(len(unsent), _MAX_BUFFERS))])
        except BlockingIOError:
            return
        except OSError:
            self._loop.remove_writer(self._writer_fd)
            self._transport.abort()
            return
        self.active = True
        while unsent and sent >= len(unsent[0]):
            sent -= len(unsent.popleft())
        if unsent:
            if sent:
                unsent[0] = unsent[0][sent:]
            return
        self._loop.remove_writer(self._writer_fd)
        if self._service.grants_room(self):
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        if self.device is not None and not self._later:
            self.device.senders.discard(self)
        self._wake_drained()
        self._resume()

    def copy_out(self, copies: Copies) -> None:
        """Some device bytes are about to be punched: keep copies of what is still to be sent of them."""
        if self._viewed is None:
            self._viewed = views.clusters_of(self._unsent) | views.clusters_of(self._later)
        if not self._viewed.isdisjoint(range(copies.start >> CLUSTER_SHIFT, ((copies.end - 1) >> CLUSTER_SHIFT) + 1)):
            self._unsent = views.copied(self._unsent, copies)
            self._later = views.copied(self._later, copies)
            self._viewed.difference_update(range(-(-copies.start // CLUSTER), copies.end // CLUSTER))

    def _wake_drained(self) -> None:
        for waiter in self._drained:
            if not waiter.done():
                waiter.set_result(None)
        self._drained.clear()

    # -- stalling and closing ------------------------------------------------------------------------

    def _stall(self) -> None:
        if not self._stalled:
            self._stalled = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        """Go on with what was held back, if nothing stands in the way any more."""
        if (
            self._stalled
            and not (self._unsent or self._starved or self._occupied or self._pausing)
            and not self._is_full()
        ):
            self._stalled = False
            if self._incoming is not None and self._incoming.is_held_up:
                self._grant(self._incoming)
            held, self._held = self._held, b""
            if held and self._incoming is None and not self._closing:
                self._buffer[: len(held)] = held
                self._parse(len(held))
            if not (self._stalled or self._closing or (self._ended and self._incoming is None)):
                self._transport.resume_reading()
                if self._finishing:
                    self._loop.call_later(_LAST_LOOK_S, self.finish)
        self._close_if_idle()

    def close_when_idle(self) -> None:
        """Take no new requests; hang up once those in flight are answered."""
        self._closing = True
        self._close_if_idle()

    def finish(self) -> None:
        """The server stops: answer what has come in, and a WRITE that is coming in just now; then hang up."""
        if self._stalled:  # more may have come in, and is not received yet
            self._finishing = True
            self._close_if_idle()
            return
        self._ended = True
        if self._incoming is None:
            self._transport.pause_reading()
        self._close_if_idle()

    def abort(self) -> None:
        """Hang up now."""
        self._transport.abort()

    def _close_if_idle(self) -> None:
        idle = not (self._unsent or self._tasks or self._incoming or self._done)
        if idle and (self._closing or (self._ended and not self._stalled)):
            self._transport.close()


def _peer_name(transport: _Transport) -> str:
    peer = transport.get_extra_info("peername")
    return f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "a local client"


def _tune(sock: Any) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _FIRST_SEND_BUFFER_BYTES)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A client whose machine is gone would stay for ever: ask after a minute of silence, give up after another.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 20)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
