"""What a client must find: requests in flight, replies as they come, and the bytes that the device must have.

Written from the specification a second time, without a line of the server's.
"""

import errno
import struct
from dataclasses import dataclass, field
from typing import Final

from nbdram.protocol.handshake import ReplyMode
from tests.helpers import PAGE

from .program import SIZE

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
_PAYLOAD_LEN: Final = 32
_MOST: Final = 32 << 20
_CHANGES: Final = (WRITE, TRIM, ZEROES)
_FLAGS: Final = {READ: 5, WRITE: 1, DISC: 1, FLUSH: 1, TRIM: 1, CACHE: 1, ZEROES: 19, STATUS: 9}
_ERRORS: Final = {errno.EPERM, errno.EINVAL, errno.ENOSPC, errno.EOVERFLOW, errno.ENOTSUP}


@dataclass
class Request:
    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    to_come: int  # bytes of payload
    payload: bytearray = field(default_factory=bytearray)
    unchecked: bool = False  # another one changed the same bytes meanwhile
    found: dict[int, bytes] = field(default_factory=dict)  # by offset
    error: int = 0
    is_refused: bool = False  # as far as its header tells

    @property
    def end(self) -> int:
        return self.offset + self.length

    def refused(self, model: "Model") -> bool:
        """Whether this request must be refused."""
        allowed = _FLAGS.get(self.command)
        if allowed is None:
            return True
        extended = model.mode is ReplyMode.EXTENDED
        if extended and self.command == WRITE and not self.flags & _PAYLOAD_LEN:
            return True
        if model.mode is ReplyMode.SIMPLE:
            allowed &= ~4
        if extended and self.command in (WRITE, STATUS):
            allowed |= _PAYLOAD_LEN
        if self.flags & ~allowed:
            return True
        if self.command == FLUSH:
            return False
        if self.command in _CHANGES and model.read_only:
            return True
        if self.command == STATUS:
            if not model.contexts:
                return True
            if self.flags & _PAYLOAD_LEN:
                effect = int.from_bytes(self.payload[:8], "big")
                ids = [bytes(self.payload[at : at + 4]) for at in range(8, len(self.payload), 4)]
                good = bool(ids) and len(set(ids)) == len(ids) and set(ids) <= {b"\0\0\0\1", b"\0\0\0\2"}
                return not good or not effect or self.offset + effect > SIZE
            return not self.length or self.end > SIZE
        if self.command in (READ, WRITE) and self.length > _MOST:
            return True
        return self.end > SIZE


class Model:
    """One connection to a device of SIZE bytes of zeros."""

    def __init__(self, mode: ReplyMode, *, contexts: bool, read_only: bool) -> None:
        self.mode = mode
        self.contexts = contexts
        self.read_only = read_only
        self.content = bytearray(SIZE)
        self.unknown: set[int] = set()  # pages that several wrote at once
        self.trimmed: dict[int, bytes] = {}  # pages that may be zeros, or still this
        self.pending: dict[int, Request] = {}
        self.is_over = False  # a DISC, or a request that can't be understood, was sent
        self.is_confused = False  # a cookie was used twice: nobody can tell the replies apart
        self.answered = 0
        self._sent = bytearray()
        self._replies = bytearray()
        self._current: Request | None = None
        self._written: set[int] = set()  # pages that may be something else than zeros

    # -- what is sent --------------------------------------------------------------------------------

    def sent(self, data: bytes) -> None:
        self._sent += data
        extended = self.mode is ReplyMode.EXTENDED
        layout, size, magic = (">IHHQQQ", 32, 0x21E41C71) if extended else (">IHHQQI", 28, 0x25609513)
        while not self.is_over:
            current = self._current
            if current:
                taken = min(current.to_come, len(self._sent))
                if len(current.payload) < 2 * SIZE:
                    current.payload += self._sent[:taken]
                del self._sent[:taken]
                current.to_come -= taken
                if current.to_come:
                    return
                self._current = None
            if len(self._sent) < size:
                return
            found, flags, command, cookie, offset, length = struct.unpack_from(layout, self._sent)
            has_payload = command == WRITE or (extended and flags & _PAYLOAD_LEN)
            if found != magic or (extended and flags & _PAYLOAD_LEN and length > _MOST):
                self.is_over = True
                return
            del self._sent[:size]
            if command == DISC and not flags & ~1:
                self.is_over = True
                return
            self._begin(Request(command, flags, cookie, offset, length, length if has_payload else 0))

    def _begin(self, new: Request) -> None:
        if new.cookie in self.pending:
            self.is_over = self.is_confused = True
            return
        self._current = new
        new.unchecked = bool(new.command == STATUS and new.flags & _PAYLOAD_LEN)  # it says later of what
        new.is_refused = new.refused(self)
        if new.is_refused:
            self.pending[new.cookie] = new
            return
        for old in self.pending.values():
            if old.is_refused or max(old.offset, new.offset) >= min(old.end, new.end):
                continue
            changes = [request for request in (old, new) if request.command in _CHANGES]
            if changes:
                old.unchecked = new.unchecked = True
            if len(changes) == 2:
                self.unknown.update(_pages(max(old.offset, new.offset), min(old.end, new.end)))
        self.pending[new.cookie] = new

    # -- what comes back -----------------------------------------------------------------------------

    def received(self, data: bytes | memoryview) -> None:
        self._replies += data
        while self._reply():
            pass

    @property
    def is_mid_reply(self) -> bool:
        return bool(self._replies)

    def _reply(self) -> bool:
        if len(self._replies) < 4:
            return False
        magic = int.from_bytes(self._replies[:4], "big")
        if magic == 0x67446698:
            return self._simple()
        extended = self.mode is ReplyMode.EXTENDED
        assert self.mode is not ReplyMode.SIMPLE
        assert magic == (0x6E8A278C if extended else 0x668E33EF), f"{magic:#x} is no reply"
        size = 32 if extended else 20
        if len(self._replies) < size:
            return False
        flags, kind, cookie = struct.unpack_from(">HHQ", self._replies, 4)
        length = int.from_bytes(self._replies[size - (8 if extended else 4) : size], "big")
        assert length <= _MOST + 16, "a chunk is longer than a payload may be"
        if len(self._replies) < size + length:
            return False
        request = self._request(cookie)
        if extended:
            assert int.from_bytes(self._replies[16:24], "big") == request.offset, "the offset is not echoed"
        body = bytes(self._replies[size : size + length])
        del self._replies[: size + length]
        self._chunk(request, kind, body)
        assert flags in (0, 1)
        if flags:
            self._done(request)
        return True

    def _simple(self) -> bool:
        assert self.mode is not ReplyMode.EXTENDED
        if len(self._replies) < 16:
            return False
        error, cookie = struct.unpack_from(">IQ", self._replies, 4)
        request = self._request(cookie)
        length = request.length if request.command == READ and not error else 0
        assert not length or self.mode is ReplyMode.SIMPLE
        if len(self._replies) < 16 + length:
            return False
        request.error = error
        if length:
            request.found[request.offset] = bytes(self._replies[16 : 16 + length])
        del self._replies[: 16 + length]
        self._done(request)
        return True

    def _request(self, cookie: int) -> Request:
        assert cookie in self.pending, "a reply to nothing that was asked, or a second one"
        return self.pending[cookie]

    def _chunk(self, request: Request, kind: int, body: bytes) -> None:
        match kind:
            case 0:
                assert not body
            case 1 | 2:
                assert request.command == READ
                at = int.from_bytes(body[:8], "big")
                piece = body[8:] if kind == 1 else bytes(int.from_bytes(body[8:12], "big"))
                assert piece, "a chunk of nothing"
                assert request.offset <= at
                assert at + len(piece) <= request.end
                assert at not in request.found
                request.found[at] = piece
            case 5 | 6:
                assert request.command == STATUS
                self._status(request, kind, body)
            case 0x8001 | 0x8002:
                request.error, length = struct.unpack_from(">IH", body)
                assert request.error
                body[6 : 6 + length].decode()
            case _:
                raise AssertionError(f"a chunk of type {kind}")

    def _status(self, request: Request, kind: int, body: bytes) -> None:
        assert kind == (6 if self.mode is ReplyMode.EXTENDED else 5)
        head, layout = (8, ">QQ") if kind == 6 else (4, ">II")
        extents = list(struct.iter_unpack(layout, body[head:]))
        assert extents
        assert all(length for length, _ in extents)
        if int.from_bytes(body[:4], "big") != 1 or request.unchecked:
            return
        at = request.offset
        for length, flags in extents:
            if flags & 2:  # reads as zeros
                self.check_zeros(at, min(at + length, SIZE))
            at += length

    # -- what that means -----------------------------------------------------------------------------

    def _done(self, request: Request) -> None:
        assert not request.to_come, "a request was answered before all of it was sent"
        del self.pending[request.cookie]
        self.answered += 1
        wanted = request.refused(self)
        if request.error:
            short = request.command in (WRITE, ZEROES) and request.error == errno.ENOSPC
            slow = request.command == ZEROES and request.error == errno.ENOTSUP and request.flags & 18 == 18
            assert request.error in _ERRORS, f"error {request.error}"
            assert wanted or short or slow, f"error {request.error} without a reason"
            if not wanted and short:
                self.unknown.update(_pages(request.offset, request.end))
            return
        assert not wanted, "what should be refused was done"
        match request.command:
            case 0:
                whole = b"".join(piece for _, piece in sorted(request.found.items()))
                assert len(whole) == request.length, "a READ got too much or too little"
                if not request.unchecked:
                    self.check(request.offset, whole)
            case 1:
                self._change(request.offset, bytes(request.payload))
            case 4:
                self._trim(request)
            case 6:
                self._change(request.offset, bytes(request.length))

    def _change(self, offset: int, data: bytes) -> None:
        for page in _pages(offset, offset + len(data)):
            if page in self.trimmed:
                del self.trimmed[page]
                self.unknown.add(page)
            self._written.add(page)
        self.content[offset : offset + len(data)] = data

    def _trim(self, request: Request) -> None:
        for page in range(-(-request.offset // PAGE), request.end // PAGE):
            old = bytes(self.content[page * PAGE : (page + 1) * PAGE])
            if page in self.trimmed:
                self.unknown.add(page)
            self.trimmed[page] = old
            self.content[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)

    def check(self, offset: int, found: bytes) -> None:
        """Bytes that the device has, or was read from it."""
        if found == self.content[offset : offset + len(found)]:
            return
        for page in _pages(offset, offset + len(found)):
            start, end = max(offset, page * PAGE), min(offset + len(found), (page + 1) * PAGE)
            piece = found[start - offset : end - offset]
            old = self.trimmed.get(page)
            if page in self.unknown or piece == self.content[start:end]:
                continue
            if old is not None and piece == old[start - page * PAGE : end - page * PAGE]:
                continue
            raise AssertionError(f"page {page} is not what was written")

    def check_zeros(self, start: int, end: int) -> None:
        """The device has a hole there."""
        for page in self._written:
            low, high = max(start, page * PAGE), min(end, (page + 1) * PAGE)
            if low < high:
                self.check(low, bytes(high - low))


def _pages(start: int, end: int) -> range:
    return range(start // PAGE, -(-min(end, SIZE) // PAGE))
