"""The commands that the hot loop leaves: checked here, begun here, finished as coroutines if they are long.

Work comes in steps (an iterator of the device that does about a tenth of a millisecond at a time). What is
small is done at once; the rest goes on in a task that lets others run after every half millisecond.
"""

import asyncio
import errno
import mmap
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from nbdram.memory.codec import IntegrityError
from nbdram.memory.device import FarPage, Piece
from nbdram.memory.layout import CLUSTER, CLUSTER_SHIFT, PAGE, Tier
from nbdram.protocol import wire
from nbdram.protocol.handshake import ReplyMode
from nbdram.protocol.wire import Command, CommandFlag

if TYPE_CHECKING:
    from nbdram.server.connection import Buffer, Connection

_SLICE_S: Final = 0.0005
_RELIEF_S: Final = 1.0
_STEPS_AT_ONCE: Final = 2
# READs with holes in them of up to this much are answered inline.
_INLINE_READ_BYTES: Final = 256 * 1024
# Extents of one BLOCK_STATUS reply; the client asks again for the rest, as the specification has it.
MAX_EXTENTS: Final = 16384
# An effect length and the ids of at most 128 contexts.
MAX_STATUS_PAYLOAD: Final = 8 + 4 * wire.MAX_CONTEXTS

# Zeros for READs of holes by clients without chunks. Anonymous memory that is only read costs nothing.
_ZEROS = memoryview(mmap.mmap(-1, wire.MAX_PAYLOAD_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)).toreadonly()

# Plain ints: arithmetic with flags takes microseconds.
_FLAGS_OF = {
    Command.READ: int(CommandFlag.FUA | CommandFlag.DF),
    Command.WRITE: int(CommandFlag.FUA),
    Command.DISC: int(CommandFlag.FUA),
    Command.FLUSH: int(CommandFlag.FUA),
    Command.TRIM: int(CommandFlag.FUA),
    Command.CACHE: int(CommandFlag.FUA),
    Command.WRITE_ZEROES: int(CommandFlag.FUA | CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO),
    Command.BLOCK_STATUS: int(CommandFlag.FUA | CommandFlag.REQ_ONE),
}
_READ: Final = int(Command.READ)
_DF: Final = int(CommandFlag.DF)
_PAYLOAD_LEN: Final = int(CommandFlag.PAYLOAD_LEN)
_CHANGES = frozenset((Command.WRITE, Command.TRIM, Command.WRITE_ZEROES))
_GROWS = frozenset((Command.WRITE, Command.WRITE_ZEROES))
PUNCHES = frozenset((Command.TRIM, Command.WRITE_ZEROES))
_NO_RANGE = frozenset((Command.FLUSH, Command.DISC))

Stepwise = Callable[[int, int], Iterator[None]]  # of a device: begins work on [offset, end)
Done = TypeVar("Done")
Refusal = tuple[int, str]  # errno, a sentence for the client


def refusal(connection: "Connection", flags: int, command: int, offset: int, length: int) -> Refusal | None:
    """Why a request can't be served, or None."""
    fits = offset + length <= connection.device.size
    if command == _READ and fits and not flags and length <= wire.MAX_PAYLOAD_BYTES:
        return None
    allowed = _FLAGS_OF.get(command)  # type: ignore[call-overload]
    if allowed is None:
        return errno.EINVAL, f"there is no command {command}"
    mode = connection.replies.mode
    if mode is ReplyMode.EXTENDED and command in (Command.WRITE, Command.BLOCK_STATUS):
        allowed |= _PAYLOAD_LEN
        if command == Command.WRITE and not flags & _PAYLOAD_LEN:
            return errno.EINVAL, "with extended headers a WRITE must set PAYLOAD_LEN"
    if mode is ReplyMode.SIMPLE:
        allowed &= ~_DF
    if flags & ~allowed:
        return errno.EINVAL, "this command does not take these flags"
    if command in _NO_RANGE:
        return None
    if command in _CHANGES and connection.export.read_only:
        return errno.EPERM, "this export is read-only"
    if command == Command.BLOCK_STATUS:
        if not connection.contexts:
            return errno.EINVAL, "no meta context was negotiated"
        if flags & _PAYLOAD_LEN:
            if length > MAX_STATUS_PAYLOAD:
                return errno.EINVAL, "the payload names too many contexts"
            return None  # the range is in the payload
        if length == 0:
            return errno.EINVAL, "BLOCK_STATUS of no bytes"
    elif command in (Command.READ, Command.WRITE) and length > wire.MAX_PAYLOAD_BYTES:
        return errno.EINVAL, f"more than {wire.MAX_PAYLOAD_BYTES} bytes in one request"
    if offset + length > connection.device.size:
        return (errno.ENOSPC if command in _GROWS else errno.EINVAL), "past the end of the export"
    return None


def begin(
    connection: "Connection",
    out: "list[Buffer]",
    flags: int,
    command: int,
    cookie: int,
    offset: int,
    length: int,
) -> None:
    """Serve a request that was not refused and has no payload: at once into `out`, or as a task."""
    device = connection.device
    end = offset + length
    match command:
        case Command.READ:
            connection.count_read(length)
            if length == 0:
                out.append(connection.replies.none(cookie, offset))
            elif length <= _INLINE_READ_BYTES and not (length > 4096 and flags):
                _read_now(connection, out, flags, cookie, offset, end)
            else:
                connection.spawn(command, _long_read(connection, flags, cookie, offset, end))
        case Command.TRIM:
            _in_steps(connection, out, command, cookie, offset, end, device.trim)
        case Command.WRITE_ZEROES:
            keep = bool(flags & CommandFlag.NO_HOLE)
            if keep and flags & CommandFlag.FAST_ZERO:
                message = "zeros that stay allocated are not faster than a WRITE"
                connection.refuse(out, command, cookie, offset, errno.ENOTSUP, message)
                return
            if keep:
                connection.spawn(command, _write_zeros(connection, cookie, offset, end))
            else:
                _in_steps(connection, out, command, cookie, offset, end, device.zero)
        case Command.BLOCK_STATUS:
            contexts = tuple(connection.contexts)
            connection.spawn(command, _block_status(connection, flags, cookie, offset, end, contexts))
        case _:  # FLUSH: what was acknowledged is in RAM already. CACHE: so is all the rest.
            out.append(connection.replies.done(cookie, offset))


def block_status_with_payload(
    connection: "Connection", out: "list[Buffer]", flags: int, cookie: int, offset: int, body: bytes
) -> None:
    """BLOCK_STATUS with PAYLOAD_LEN: the effect length and the contexts asked for are in the payload."""
    effect = int.from_bytes(body[:8], "big")
    ids = tuple(int.from_bytes(body[at : at + 4], "big") for at in range(8, len(body), 4))
    if len(body) < 12 or len(body) % 4 or len(set(ids)) < len(ids) or not set(ids) <= connection.contexts.keys():
        message = "the payload is not a length and ids of negotiated contexts, each once"
    elif effect == 0 or offset + effect > connection.device.size:
        message = "past the end of the export"
    else:
        end = offset + effect
        connection.spawn(Command.BLOCK_STATUS, _block_status(connection, flags, cookie, offset, end, ids))
        return
    connection.refuse(out, Command.BLOCK_STATUS, cookie, offset, errno.EINVAL, message)


# -- steps ---------------------------------------------------------------------------------------------


def _in_steps(
    connection: "Connection", out: "list[Buffer]", command: int, cookie: int, offset: int, end: int, begin: Stepwise
) -> None:
    steps = begin(offset, end)
    try:
        for done, _ in enumerate(steps, 1):
            if done == _STEPS_AT_ONCE:
                connection.spawn(command, _finish_steps(connection, command, cookie, offset, end, begin, steps))
                return
    except OSError as error:
        if isinstance(error, FarPage) or error.errno == errno.ENOSPC:
            connection.spawn(command, _begin_again(connection, command, cookie, offset, end, begin))
        else:
            connection.fail(out, command, cookie, offset, error)
    else:
        out.append(connection.replies.done(cookie, offset))


async def _finish_steps(
    connection: "Connection",
    command: int,
    cookie: int,
    offset: int,
    end: int,
    begin: Stepwise,
    steps: Iterator[None],
) -> None:
    pause = _Pause()
    try:
        for _ in steps:
            await pause()
    except OSError:
        await _begin_again(connection, command, cookie, offset, end, begin)
    else:
        connection.send([connection.replies.done(cookie, offset)])


async def _begin_again(
    connection: "Connection", command: int, cookie: int, offset: int, end: int, begin: Stepwise
) -> None:
    """Steps that could not be done: once more, with what they need from disk, waiting for memory like a WRITE."""
    out: list[Buffer] = []
    pause = _Pause()
    memory = _Patience(connection, connection.write_wait_s)
    steps: Iterator[None] | None = None

    def step() -> bool:
        """The next one, of which the first is the one that begins, also after an error; False when that was all."""
        nonlocal steps
        steps = steps or begin(offset, end)
        try:
            return next(steps, steps) is not steps
        except OSError:
            steps = None
            raise

    while not out:
        try:
            await connection.fetcher.fetch_edges(connection.device, offset, end)
            while await memory.enough_for(step):
                await pause()
            out.append(connection.replies.done(cookie, offset))
        except FarPage:  # gone to disk again
            continue
        except OSError as error:
            connection.fail(out, command, cookie, offset, error)
    connection.send(out)


async def _write_zeros(connection: "Connection", cookie: int, offset: int, end: int) -> None:
    """WRITE_ZEROES that stay allocated: written, and waiting for memory like a WRITE."""
    out: list[Buffer] = []
    pause = _Pause()
    memory = _Patience(connection, connection.write_wait_s)
    at = offset
    try:
        await connection.fetcher.fetch_edges(connection.device, offset, end)
        while at < end:
            if end > connection.device.size:  # it was made smaller meanwhile
                raise OSError(errno.ENOSPC, "past the end of the export")
            stop = min(end, at // CLUSTER * CLUSTER + CLUSTER)
            try:
                await memory.enough_for(partial(connection.device.write, at, bytes(stop - at)))
                at = stop
            except FarPage:  # an edge has gone to disk again
                await connection.fetcher.fetch_edges(connection.device, at, stop)
            await pause()
    except OSError as error:
        connection.fail(out, Command.WRITE_ZEROES, cookie, offset, error)
    else:
        out.append(connection.replies.done(cookie, offset))
    connection.send(out)


class _Patience:
    """Waits for memory on behalf of one task, so long at most, all its waits together."""

    def __init__(self, connection: "Connection", most_s: float) -> None:
        self._budget = connection.device.budget
        self._deadline = time.monotonic() + most_s

    async def enough_for(self, work: Callable[[], Done]) -> Done:
        """Do it, as soon as there is memory for it."""
        while True:
            freed = asyncio.Event()
            with self._budget.turn(self):
                try:
                    return work()
                except OSError as error:
                    if error.errno != errno.ENOSPC or not self._budget.hopeful:
                        raise
                    self._budget.wait(self, freed.set)
                    refusal = error
            try:
                async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                    await freed.wait()
            except TimeoutError:
                self._budget.leave(self)
                raise refusal from None
            except asyncio.CancelledError:
                self._budget.leave(self)
                raise


class _Pause:
    """Lets others run when this task has held the loop for a slice of time."""

    def __init__(self) -> None:
        self._until = time.perf_counter() + _SLICE_S

    def due(self) -> bool:
        return time.perf_counter() >= self._until

    async def __call__(self) -> None:
        if self.due():
            await asyncio.sleep(0)
            self._until = time.perf_counter() + _SLICE_S


def reason(error: OSError) -> Refusal:
    """What to tell the client of an error."""
    return error.errno or errno.EIO, error.strerror or "input/output error"


# -- READ ----------------------------------------------------------------------------------------------


def _in_one_piece(connection: "Connection", flags: int) -> bool:
    return connection.replies.mode is ReplyMode.SIMPLE or bool(flags & _DF)


def _chunks(connection: "Connection", cookie: int, offset: int, pieces: list[Piece], end: int) -> "list[Buffer]":
    """The chunks for a part of a READ that ends at `end`."""
    replies = connection.replies
    out: list[Buffer] = []
    for start, stop, buffers in pieces:
        last = stop == end
        if buffers:
            out.append(replies.data(cookie, offset, stop - start, start, last=last))
            out += buffers
        else:
            out.append(replies.hole(cookie, offset, start, stop - start, last=last))
    return out


def _whole(pieces: list[Piece]) -> "list[Buffer]":
    """The content of a part of a READ, with zeros for its holes."""
    out: list[Buffer] = []
    for start, stop, buffers in pieces:
        out += buffers or [_ZEROS[: stop - start]]
    return out


def _read_now(connection: "Connection", out: "list[Buffer]", flags: int, cookie: int, offset: int, end: int) -> None:
    device = connection.device
    try:
        images = connection.fetcher.at_hand(device, offset, end)
        if images is None:
            if not ShortRead(connection, flags, cookie, offset, end).begin():
                connection.spawn(Command.READ, _read(connection, flags, cookie, offset, end))
            return
        if images:
            connection.ahead.follow(device, offset, end)
        pieces = device.gather(offset, end, images)
    except OSError as error:
        connection.fail(out, Command.READ, cookie, offset, error)
    else:
        out += _answer(connection, flags, cookie, offset, pieces, end)
        connection.copied(out, end - offset)


def _answer(
    connection: "Connection", flags: int, cookie: int, offset: int, pieces: list[Piece], end: int
) -> "list[Buffer]":
    """All of a READ."""
    if _in_one_piece(connection, flags):
        return [connection.replies.data(cookie, offset, end - offset, offset, last=True), *_whole(pieces)]
    return _chunks(connection, cookie, offset, pieces, end)


class ShortRead:
    """A READ within a cluster that waits for its image and for nothing else.

    A task would take as long as all that is done in it. It is made only where something else comes in between.
    """

    __slots__ = ("_connection", "_cookie", "_end", "_flags", "_image", "_is_over", "_offset", "_pages", "begun")

    def __init__(self, connection: "Connection", flags: int, cookie: int, offset: int, end: int) -> None:
        self._connection = connection
        self._flags = flags
        self._cookie = cookie
        self._offset = offset
        self._end = end
        self._pages = _pages_held(end - offset)
        self._is_over = False
        self.begun = time.perf_counter()

    def begin(self) -> bool:
        """False, and nothing has happened, if it would have to wait for anything else."""
        connection, fetcher, device = self._connection, self._connection.fetcher, self._connection.device
        cluster = self._offset >> CLUSTER_SHIFT
        if cluster != (self._end - 1) >> CLUSTER_SHIFT or not connection.is_drained() or device.budget.free_pages <= 0:
            return False
        if not fetcher.short_turns.take_now():
            return False
        if fetcher.holding.take_now(device.budget, self._pages):
            connection.ahead.follow(device, self._offset, self._end)
            image = fetcher.tell(device, cluster, self._came)
            if image is not None:
                self._image = image
                connection.wait_for(self)
                return True
            fetcher.holding.give(self._pages)
        fetcher.short_turns.release()
        return False

    def cancel(self) -> None:
        """The client is gone."""
        if not self._is_over:
            self._is_over = True
            self._connection.fetcher.holding.give(self._pages)
            self._connection.fetcher.short_turns.release()

    def _came(self, error: OSError | None) -> None:
        if self._is_over:
            return
        connection, device = self._connection, self._connection.device
        cluster, image = self._offset >> CLUSTER_SHIFT, self._image
        out: list[Buffer] = []
        try:
            if error is not None and image.is_current:
                if isinstance(error, IntegrityError):
                    device.note_damage(cluster, error)
                raise error.with_traceback(None)  # others get it too
            offset, end = self._offset, self._end
            if (content := device.read_fetched(cluster, offset, end, image)) is not None:
                out = [connection.replies.data(self._cookie, offset, end - offset, offset, last=True), *content]
            else:
                pieces = device.gather(offset, end, {cluster: image})
                out = _answer(connection, self._flags, self._cookie, offset, pieces, end)
        except FarPage:  # what was fetched is not the cluster's any more
            again = _read(connection, self._flags, self._cookie, self._offset, self._end)
            connection.spawn(Command.READ, again)
        except OSError as failure:
            connection.fail(out, Command.READ, self._cookie, self._offset, failure)
        except Exception as unexpected:
            connection.failed(unexpected)
        connection.answer(self, out)
        self.cancel()


async def _long_read(connection: "Connection", flags: int, cookie: int, offset: int, end: int) -> None:
    """One long answer at a time on each connection: what is held while the socket is full stays bounded."""
    async with connection.long_answer:
        if _in_one_piece(connection, flags):
            await _read_whole(connection, cookie, offset, end)
        else:
            await _read(connection, flags, cookie, offset, end)


async def _read(connection: "Connection", flags: int, cookie: int, offset: int, end: int) -> None:
    """A READ with waits in it, a part at a time; in one piece if it is one part."""
    pause = _Pause()
    hole = offset  # where the hole begins that the last parts were
    try:
        for start, stop in _parts(offset, end):
            async with _Turn(connection, stop - start):
                connection.ahead.follow(connection.device, start, stop)
                pieces = await connection.fetcher.gather(connection.device, start, stop)
                if _in_one_piece(connection, flags):
                    header = connection.replies.data(cookie, offset, end - offset, offset, last=True)
                    connection.send([header, *_whole(pieces)])
                elif stop == end or any(buffers for _, _, buffers in pieces):
                    if hole < start:
                        pieces = _with_hole_before(hole, pieces)
                    connection.send(_chunks(connection, cookie, offset, pieces, end))
                    hole = stop
            if stop != end:
                await pause()
    except OSError as error:
        _fail_read(connection, cookie, offset, error)


async def _read_whole(connection: "Connection", cookie: int, offset: int, end: int) -> None:
    """A large READ in one piece, which can't end in an error once it has begun: all of it is looked at before."""
    pause = _Pause()
    try:
        for start, stop in _parts(offset, end):
            async with _Turn(connection, stop - start):
                await connection.fetcher.check(connection.device, start, stop)
            await pause()
    except OSError as error:
        _fail_read(connection, cookie, offset, error)
        return
    with connection.occupied() as send:
        send([connection.replies.data(cookie, offset, end - offset, offset, last=True)])
        try:
            for start, stop in _parts(offset, end):
                async with _Turn(connection, stop - start, occupied=True):
                    send(_whole(await connection.fetcher.gather(connection.device, start, stop)))
                await pause()
        except OSError as error:
            connection.give_up(error)


def _parts(offset: int, end: int) -> Iterator[tuple[int, int]]:
    return ((start, min(end, start + _INLINE_READ_BYTES)) for start in range(offset, end, _INLINE_READ_BYTES))


def _pages_held(length: int) -> int:
    """While so many bytes are read: sealed, compressed, and as they are."""
    return 3 * length // PAGE + 1


class _Turn:
    """To read something and send it: only so much at once in all, and nothing for a client that takes nothing.

    It holds what it takes to read `length` bytes: sealed, compressed, and as they are. When what is held is too much
    already, reclaim comes first. But no READ is refused for that, or waits for long. (Not made from a generator, which
    takes 1 us more for each.)
    """

    def __init__(self, connection: "Connection", length: int, *, occupied: bool = False) -> None:
        fetcher = connection.fetcher
        self._connection = connection
        self._occupied = occupied
        self._turns = fetcher.short_turns if length <= CLUSTER else fetcher.turns
        self._pages = _pages_held(length)

    async def __aenter__(self) -> None:
        while True:
            await self._connection.drained(occupied=self._occupied)
            await self._turns.acquire()
            try:
                await self._hold_memory()
            except BaseException:
                self._turns.release()
                raise
            if self._connection.is_drained(occupied=self._occupied):
                return
            self._end()

    async def __aexit__(self, *_: object) -> None:
        self._end()

    async def _hold_memory(self) -> None:
        budget, holding = self._connection.device.budget, self._connection.fetcher.holding
        await holding.take(budget, self._pages)
        if budget.free_pages <= 0:
            try:
                await _Patience(self._connection, _RELIEF_S).enough_for(budget.check_edge)
            except OSError:
                pass
            except BaseException:
                holding.give(self._pages)
                raise

    def _end(self) -> None:
        self._connection.fetcher.holding.give(self._pages)
        self._turns.release()


def _fail_read(connection: "Connection", cookie: int, offset: int, error: OSError) -> None:
    out: list[Buffer] = []
    connection.fail(out, Command.READ, cookie, offset, error)
    connection.send(out)


def _with_hole_before(start: int, pieces: list[Piece]) -> list[Piece]:
    """`pieces` with a hole in front of them, from `start` on."""
    first, stop, buffers = pieces[0]
    if buffers:
        return [(start, first, []), *pieces]
    return [(start, stop, []), *pieces[1:]]


# -- BLOCK_STATUS --------------------------------------------------------------------------------------


async def _block_status(
    connection: "Connection",
    flags: int,
    cookie: int,
    offset: int,
    end: int,
    contexts: tuple[int, ...],
) -> None:
    """One chunk per context, from one walk over the index; one answer at a time, as for a long READ."""
    async with connection.long_answer:
        await connection.drained()
        runs = await _tiers(connection, offset, end, 1 if flags & CommandFlag.REQ_ONE else MAX_EXTENTS)
        longest = 0xFFFFFFFF if connection.replies.mode is ReplyMode.STRUCTURED else 1 << 63
        out: list[Buffer] = []
        for context in contexts:
            flags_of = _allocation if context == wire.CONTEXT_IDS[wire.BASE_ALLOCATION] else int
            extents = [(min(length, longest), flags_of(tier)) for length, tier in runs]
            last = context == contexts[-1]
            out.append(connection.replies.block_status(cookie, offset, context, extents, last=last))
        connection.send(out)


async def _tiers(connection: "Connection", offset: int, end: int, limit: int) -> list[list[int]]:
    """Up to `limit` runs from `offset` on: [length, tier], neighbours differ."""
    pause = _Pause()
    runs: list[list[int]] = []
    for start, stop, tier in connection.device.extents(offset, end):
        if runs and runs[-1][1] == tier:
            runs[-1][0] += stop - start
        elif len(runs) == limit:
            break
        else:
            runs.append([stop - start, tier])
        await pause()
    return runs


def _allocation(tier: int) -> int:
    return wire.STATE_HOLE | wire.STATE_ZERO if tier == Tier.HOLE else 0
