"""The handshake phase from the client's end, without I/O.

Each function is a generator that yields bytes to send, or a number of bytes that it wants to receive and is
then sent them; whoever drives it owns the socket. It ends by returning what was agreed, or ProtocolError.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from nbdram.errors import NbdramError, ProtocolError
from nbdram.protocol import wire
from nbdram.protocol.handshake import ReplyMode
from nbdram.protocol.wire import HandshakeFlag, Info, Option, OptionReply

T = TypeVar("T")
Steps = Generator[bytes | int, bytes, T]

_MAX_REPLY_BYTES = 2 * wire.MAX_STRING_BYTES + 16


@dataclass
class RemoteExport:
    """What a server says of an export. `blocks` is (minimum, preferred, maximum payload) in bytes."""

    name: str
    size: int = 0
    flags: int = 0
    description: str = ""
    blocks: tuple[int, int, int] = (1, 4096, wire.MAX_PAYLOAD_BYTES)


def greet() -> Steps[None]:
    """Read the greeting and answer it; must come first."""
    greeting = yield wire.GREETING.size
    nbdmagic, second, flags = wire.GREETING.unpack(greeting)
    if nbdmagic != wire.NBDMAGIC or second != wire.IHAVEOPT:
        raise ProtocolError("what answers there is not an NBD server of the newstyle protocol")
    if not flags & HandshakeFlag.FIXED_NEWSTYLE:
        raise ProtocolError("the server is too old: it does not offer fixed newstyle")
    yield wire.CLIENT_FLAGS.pack(flags & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES))


def starttls() -> Steps[None]:
    """Ask for TLS, which begins with the next byte."""
    yield _option(Option.STARTTLS)
    kind, data = yield from _reply(Option.STARTTLS, errors_too=True)
    if kind != OptionReply.ACK:
        raise NbdramError(f"the server offers no TLS: {data.decode('utf-8', 'replace') or 'it does not say why'}")


def list_exports() -> Steps[list[RemoteExport]]:
    """All exports that the server shows, names and descriptions only."""
    yield _option(Option.LIST)
    exports: list[RemoteExport] = []
    while True:
        kind, data = yield from _reply(Option.LIST)
        if kind == OptionReply.ACK:
            return exports
        if kind == OptionReply.SERVER and len(data) >= 4:
            length = wire.U32.unpack_from(data)[0]
            name, text = data[4 : 4 + length], data[4 + length :]
            exports.append(RemoteExport(name.decode("utf-8", "replace"), description=text.decode("utf-8", "replace")))


def agree_on_replies(wanted: Sequence[ReplyMode]) -> Steps[ReplyMode]:
    """The first of `wanted` (best first) that the server speaks; SIMPLE always is."""
    options = {
        ReplyMode.EXTENDED: Option.EXTENDED_HEADERS,
        ReplyMode.STRUCTURED: Option.STRUCTURED_REPLY,
    }
    for mode in wanted:
        if mode is ReplyMode.SIMPLE:
            break
        yield _option(options[mode])
        kind, _ = yield from _reply(options[mode], errors_too=True)
        if kind == OptionReply.ACK:
            return mode
    return ReplyMode.SIMPLE


def set_contexts(name: str, contexts: Sequence[str]) -> Steps[dict[int, str]]:
    """Ask for meta contexts; returns those the server has, by id."""
    return (yield from _contexts(Option.SET_META_CONTEXT, name, contexts))


def identity(name: str) -> Steps[str]:
    """The UUID of an export's device; "" if the server does not tell. Needs structured replies, as all contexts do."""
    prefix = wire.IDENTITY_CONTEXT + "="
    found = yield from list_contexts(name, wire.IDENTITY_CONTEXT)
    return next((context.removeprefix(prefix) for context in found if context.startswith(prefix)), "")


def list_contexts(name: str, *queries: str) -> Steps[list[str]]:
    """The names of an export's contexts: of all, or of those that `queries` name."""
    asked = wire.U32.pack(len(queries)) + b"".join(map(_string, queries))
    yield _option(Option.LIST_META_CONTEXT, _string(name) + asked)
    found: list[str] = []
    while True:
        kind, data = yield from _reply(Option.LIST_META_CONTEXT)
        if kind == OptionReply.ACK:
            return found
        if kind == OptionReply.META_CONTEXT:
            found.append(data[4:].decode("utf-8", "replace"))


def _contexts(option: Option, name: str, contexts: Sequence[str]) -> Steps[dict[int, str]]:
    queries = b"".join(_string(context) for context in contexts)
    yield _option(option, _string(name) + wire.U32.pack(len(contexts)) + queries)
    agreed: dict[int, str] = {}
    while True:
        kind, data = yield from _reply(option)
        if kind == OptionReply.ACK:
            return agreed
        if kind == OptionReply.META_CONTEXT and len(data) > 4:
            agreed[wire.U32.unpack_from(data)[0]] = data[4:].decode("utf-8", "replace")


def info(name: str) -> Steps[RemoteExport]:
    return (yield from _ask(Option.INFO, name))


def go(name: str) -> Steps[RemoteExport]:
    """Enter the transmission phase."""
    return (yield from _ask(Option.GO, name))


def abort() -> Steps[None]:
    """Part politely; some servers hang up without an answer, which is fine."""
    yield _option(Option.ABORT)


def _ask(option: Option, name: str) -> Steps[RemoteExport]:
    wanted = (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)
    payload = _string(name) + wire.U16.pack(len(wanted)) + b"".join(map(wire.U16.pack, wanted))
    yield _option(option, payload)
    export = RemoteExport(name)
    seen = False
    while True:
        kind, data = yield from _reply(option)
        if kind == OptionReply.ACK:
            if not seen:
                raise ProtocolError("the server did not say how large the export is")
            return export
        if kind != OptionReply.INFO or len(data) < 2:
            continue
        what = wire.U16.unpack_from(data)[0]
        if what == Info.EXPORT and len(data) == wire.INFO_EXPORT.size:
            _, export.size, export.flags = wire.INFO_EXPORT.unpack(data)
            seen = True
        elif what == Info.BLOCK_SIZE and len(data) == wire.INFO_BLOCK_SIZE.size:
            export.blocks = wire.INFO_BLOCK_SIZE.unpack(data)[1:]
        elif what == Info.NAME:
            export.name = data[2:].decode("utf-8", "replace")
        elif what == Info.DESCRIPTION:
            export.description = data[2:].decode("utf-8", "replace")


def _string(text: str) -> bytes:
    raw = text.encode()
    return wire.U32.pack(len(raw)) + raw


def _option(option: Option, payload: bytes = b"") -> bytes:
    return wire.OPTION_HEADER.pack(wire.IHAVEOPT, option, len(payload)) + payload


def _reply(option: Option, *, errors_too: bool = False) -> Steps[tuple[int, bytes]]:
    """The next reply to `option`; an error reply is raised unless `errors_too`."""
    header = yield wire.OPTION_REPLY_HEADER.size
    magic, echoed, kind, length = wire.OPTION_REPLY_HEADER.unpack(header)
    if magic != wire.OPTION_REPLY_MAGIC or echoed != option or length > _MAX_REPLY_BYTES:
        raise ProtocolError("the server's answer breaks the NBD protocol")
    data = (yield length) if length else b""
    if kind >= OptionReply.ERR_UNSUP and not errors_too:
        text = data.decode("utf-8", "replace") or "without a reason"
        if kind == OptionReply.ERR_UNKNOWN:
            text += "; `nbdram list`, with the same URI, shows those that are there"
        elif kind == OptionReply.ERR_TLS_REQD:
            text += "; write nbds:// in place of nbd://"
        raise NbdramError(f"the server refused: {text}")
    return kind, data
