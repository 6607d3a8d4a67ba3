"""Replies of the transmission phase, in the three shapes that a client can have negotiated.

The connection holds one of these three objects; they have the same methods, so the slow commands need
not know what was negotiated. The commonest READ and WRITE replies are packed in the hot loop itself.
This is the only place where an errno becomes an NBD error.
"""

import errno
from collections.abc import Sequence
from struct import Struct

from nbdram.protocol import wire
from nbdram.protocol.handshake import ReplyMode
from nbdram.protocol.wire import REPLY_FLAG_DONE, Error, ReplyType

_ERRORS = {
    0: Error.OK,
    errno.EPERM: Error.EPERM,
    errno.EACCES: Error.EPERM,
    errno.EROFS: Error.EPERM,
    errno.EIO: Error.EIO,
    errno.ENOMEM: Error.ENOMEM,
    errno.EINVAL: Error.EINVAL,
    errno.ENOSPC: Error.ENOSPC,
    errno.EDQUOT: Error.ENOSPC,
    errno.EFBIG: Error.ENOSPC,
    errno.EOVERFLOW: Error.EOVERFLOW,
    errno.ENOTSUP: Error.ENOTSUP,
    errno.ESHUTDOWN: Error.ESHUTDOWN,
}

Extents = Sequence[tuple[int, int]]  # (length in bytes, context's status flags)


def nbd_error(number: int) -> Error:
    """The NBD error for an errno; EIO stands for all that the protocol has no number for."""
    return _ERRORS.get(number, Error.EIO)


class SimpleReplies:
    """No chunks: one header, then the payload of a READ. All that the Linux kernel speaks."""

    mode = ReplyMode.SIMPLE

    def done(self, cookie: int, offset: int) -> bytes:
        return wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, cookie)

    none = done

    def error(self, cookie: int, offset: int, number: int, message: str) -> bytes:
        return wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, nbd_error(number), cookie)

    def data(self, cookie: int, offset: int, length: int, start: int, *, last: bool) -> bytes:
        """The header in front of a READ's payload, which is always whole here."""
        return self.done(cookie, offset)

    def hole(self, cookie: int, offset: int, start: int, length: int, *, last: bool) -> bytes:
        raise AssertionError("a simple reply has no holes")

    def block_status(self, cookie: int, offset: int, context: int, extents: Extents, *, last: bool) -> bytes:
        raise AssertionError("no context can be negotiated with simple replies")


class StructuredReplies:
    """Chunks with 32-bit lengths. Success of anything but READ and BLOCK_STATUS stays a simple reply."""

    mode = ReplyMode.STRUCTURED

    def _chunk(self, cookie: int, offset: int, kind: int, body: bytes, last: bool, more: int = 0) -> bytes:
        """A chunk whose payload is `body` and `more` bytes that the caller sends behind it."""
        flags = REPLY_FLAG_DONE if last else 0
        length = len(body) + more
        magic = wire.STRUCTURED_REPLY_MAGIC
        return wire.STRUCTURED_REPLY.pack(magic, flags, kind, cookie, length) + body

    def done(self, cookie: int, offset: int) -> bytes:
        return wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, cookie)

    def none(self, cookie: int, offset: int) -> bytes:
        """Success without content, where a structured reply is a must."""
        return self._chunk(cookie, offset, ReplyType.NONE, b"", True)

    def error(self, cookie: int, offset: int, number: int, message: str) -> bytes:
        text = message.encode()[: wire.MAX_STRING_BYTES]
        body = wire.ERROR_HEAD.pack(nbd_error(number), len(text)) + text
        return self._chunk(cookie, offset, ReplyType.ERROR, body, True)

    def data(self, cookie: int, offset: int, length: int, start: int, *, last: bool) -> bytes:
        """The head of an OFFSET_DATA chunk of `length` bytes of the device from `start`."""
        flags = REPLY_FLAG_DONE if last else 0
        return wire.READ_DATA.pack(wire.STRUCTURED_REPLY_MAGIC, flags, ReplyType.OFFSET_DATA, cookie, length + 8, start)

    def hole(self, cookie: int, offset: int, start: int, length: int, *, last: bool) -> bytes:
        return self._chunk(cookie, offset, ReplyType.OFFSET_HOLE, wire.HOLE.pack(start, length), last)

    def block_status(self, cookie: int, offset: int, context: int, extents: Extents, *, last: bool) -> bytes:
        body = wire.U32.pack(context) + _packed(wire.EXTENT, extents)
        return self._chunk(cookie, offset, ReplyType.BLOCK_STATUS, body, last)


class ExtendedReplies(StructuredReplies):
    """Chunks with 64-bit lengths that echo the request's offset."""

    mode = ReplyMode.EXTENDED

    def done(self, cookie: int, offset: int) -> bytes:
        return self.none(cookie, offset)

    def data(self, cookie: int, offset: int, length: int, start: int, *, last: bool) -> bytes:
        return self._chunk(cookie, offset, ReplyType.OFFSET_DATA, start.to_bytes(8, "big"), last, length)

    def _chunk(self, cookie: int, offset: int, kind: int, body: bytes, last: bool, more: int = 0) -> bytes:
        flags = REPLY_FLAG_DONE if last else 0
        length = len(body) + more
        magic = wire.EXTENDED_REPLY_MAGIC
        return wire.EXTENDED_REPLY.pack(magic, flags, kind, cookie, offset, length) + body

    def block_status(self, cookie: int, offset: int, context: int, extents: Extents, *, last: bool) -> bytes:
        head = wire.EXTENDED_STATUS_HEAD.pack(context, len(extents))
        body = head + _packed(wire.EXTENDED_EXTENT, extents)
        return self._chunk(cookie, offset, ReplyType.BLOCK_STATUS_EXT, body, last)


Replies = SimpleReplies | StructuredReplies


def replies_for(mode: ReplyMode) -> Replies:
    if mode is ReplyMode.SIMPLE:
        return SimpleReplies()
    return ExtendedReplies() if mode is ReplyMode.EXTENDED else StructuredReplies()


def _packed(layout: Struct, extents: Extents) -> bytes:
    return b"".join(layout.pack(length, flags) for length, flags in extents)
