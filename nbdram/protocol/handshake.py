"""The handshake phase, server side, without I/O: feed bytes in, take bytes and an outcome out.

The conversation is one generator that reads top to bottom like the specification: it yields how many
bytes it wants next (negative: bytes to drain unseen, so that an option of 4 GiB costs nothing), and
appends what is to be sent to a buffer. It ends by returning an outcome.

Rules that are easy to lose:
- What a client negotiated before STARTTLS is forgotten, and bytes that arrived behind STARTTLS before
  its acknowledgement are an injection: the connection ends.
- Where TLS is required, no other option says anything about what exports there are.
- Error texts never echo a name that the client chose: a 4096-byte name would exceed the limit for strings.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Protocol

from nbdram.protocol import wire
from nbdram.protocol.wire import HandshakeFlag, Info, Option, OptionReply


class ReplyMode(Enum):
    """How the transmission phase will be spoken."""

    SIMPLE = "simple"
    STRUCTURED = "structured"
    EXTENDED = "extended"


class TlsPolicy(Enum):
    OFF = "off"
    OFFERED = "offered"
    REQUIRED = "required"


@dataclass(frozen=True)
class ExportInfo:
    """What the handshake tells of an export; size in bytes, `flags` are transmission flags.

    `identity` is the UUID of its device: the same after a restart that kept the data, another one after one that
    did not.
    """

    name: str
    size: int
    flags: int
    description: str = ""
    identity: str = ""


class Catalogue(Protocol):
    """The exports as this client may see them. `find("")` is the default export."""

    def find(self, name: str) -> ExportInfo | None: ...

    def listed(self) -> Iterable[ExportInfo]: ...


@dataclass(frozen=True)
class Negotiated:
    """GO or EXPORT_NAME succeeded. `contexts` maps the ids in use to their names."""

    export: ExportInfo
    mode: ReplyMode
    contexts: dict[int, str]


class Failure(StrEnum):
    """Why a handshake can come to nothing."""

    ABORTED = "aborted"  # by the client, in the way the protocol has for that
    HUNG_UP = "hung_up"  # by the client, without a word
    LATE = "late"
    CROWDED_OUT = "crowded_out"  # by newer ones, when there were too many
    TURNED_AWAY = "turned_away"  # there were too many connections
    TOO_FAST = "too_fast"  # they came faster than the limit, and this address had had its share
    MALFORMED = "malformed"
    TOO_MANY_OPTIONS = "too_many_options"
    UNKNOWN_EXPORT = "unknown_export"
    TLS_REQUIRED = "tls_required"
    PLAINTEXT_BEHIND_STARTTLS = "plaintext_behind_starttls"
    TLS_FAILED = "tls_failed"


@dataclass(frozen=True)
class Refused:
    """The connection is to be closed after what is queued was sent."""

    reason: str
    failure: Failure = Failure.MALFORMED


@dataclass(frozen=True)
class UpgradeToTls:
    """The transport must turn to TLS now, and a new Handshake go on with `secure=True` and this `no_zeroes`."""

    no_zeroes: bool


Outcome = Negotiated | Refused | UpgradeToTls
_Wants = Generator[int, bytes, Outcome]


class _Invalid(Exception):
    """An option's payload breaks its format: ERR_INVALID, and the haggling goes on."""


@dataclass
class Handshake:
    """One client's haggling. `secure` says that the transport is TLS already; its flags were read before."""

    catalogue: Catalogue
    tls: TlsPolicy = TlsPolicy.OFF
    secure: bool = False
    no_zeroes: bool = False
    outcome: Outcome | None = None
    _out: bytearray = field(default_factory=bytearray)
    _in: bytearray = field(default_factory=bytearray)
    _mode: ReplyMode = ReplyMode.SIMPLE
    _contexts_of: tuple[str, dict[int, str]] = ("", {})

    def __post_init__(self) -> None:
        self._steps = self._haggle()
        self._wanted = next(self._steps)

    def receive(self, data: bytes | bytearray | memoryview) -> None:
        """Take what the client sent; afterwards look at `data_to_send()` and `outcome`."""
        self._in += data
        while self.outcome is None:
            if self._wanted < 0:
                drained = min(-self._wanted, len(self._in))
                del self._in[:drained]
                self._wanted += drained
                if self._wanted < 0:
                    return
            if len(self._in) < self._wanted:
                return
            chunk = bytes(self._in[: self._wanted])
            del self._in[: self._wanted]
            try:
                self._wanted = self._steps.send(chunk)
            except StopIteration as stop:
                self.outcome = stop.value

    def data_to_send(self) -> bytes:
        """Bytes for the client, given out once."""
        out = bytes(self._out)
        self._out.clear()
        return out

    def leftover(self) -> bytes:
        """Bytes that came behind the option that ended the haggling: the first requests."""
        return bytes(self._in)

    # -- the conversation ------------------------------------------------------------------------

    def _haggle(self) -> _Wants:
        offered = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        if not self.secure:
            self._out += wire.GREETING.pack(wire.NBDMAGIC, wire.IHAVEOPT, offered)
            (client_flags,) = wire.CLIENT_FLAGS.unpack((yield wire.CLIENT_FLAGS.size))
            if client_flags & ~int(offered):
                return Refused("the client set a handshake flag that does not exist")
            self.no_zeroes = bool(client_flags & HandshakeFlag.NO_ZEROES)
        for _ in range(wire.MAX_OPTIONS):
            header = yield wire.OPTION_HEADER.size
            magic, option, length = wire.OPTION_HEADER.unpack(header)
            if magic != wire.IHAVEOPT:
                return Refused("the client sent an option without its magic")
            if length > wire.MAX_OPTION_BYTES:
                yield -length
                if option == Option.EXPORT_NAME:
                    return Refused("the client asked for an export by an oversized name", Failure.UNKNOWN_EXPORT)
                self._reply(option, OptionReply.ERR_TOO_BIG, "this option is too long")
                continue
            data = yield length
            try:
                outcome = self._answer(option, data)
            except (_Invalid, ValueError) as bad:
                outcome = None
                if option == Option.EXPORT_NAME:
                    return Refused("the client asked for an export by a malformed name")
                reason = str(bad) if isinstance(bad, _Invalid) else "a string is malformed"
                self._reply(option, OptionReply.ERR_INVALID, reason)
            if outcome is not None:
                return outcome
        return Refused(f"the client sent more than {wire.MAX_OPTIONS} options", Failure.TOO_MANY_OPTIONS)

    def _answer(self, option: int, data: bytes) -> Outcome | None:
        if option == Option.ABORT:
            self._reply(option, OptionReply.ACK)
            return Refused("the client ended the handshake", Failure.ABORTED)
        if option == Option.STARTTLS:
            return self._starttls(data)
        if self.tls is TlsPolicy.REQUIRED and not self.secure:
            if option == Option.EXPORT_NAME:
                return Refused("the client asked for an export without TLS, which is required", Failure.TLS_REQUIRED)
            self._reply(option, OptionReply.ERR_TLS_REQD, "this server requires TLS")
            return None
        match option:
            case Option.EXPORT_NAME:
                return self._export_name(data)
            case Option.LIST:
                self._list(data)
            case Option.INFO | Option.GO:
                return self._info_or_go(option, data)
            case Option.STRUCTURED_REPLY:
                self._structured_reply(data)
            case Option.EXTENDED_HEADERS:
                self._extended_headers(data)
            case Option.LIST_META_CONTEXT | Option.SET_META_CONTEXT:
                self._meta_context(option, data)
            case _:
                self._reply(option, OptionReply.ERR_UNSUP, "this server does not know this option")
        return None

    # -- one option each -------------------------------------------------------------------------

    def _starttls(self, data: bytes) -> Outcome | None:
        if data:
            raise _Invalid("STARTTLS takes no payload")
        if self.secure:
            raise _Invalid("this connection is secure already")
        if self.tls is TlsPolicy.OFF:
            self._reply(Option.STARTTLS, OptionReply.ERR_POLICY, "TLS is not set up here")
            return None
        if self._in:
            return Refused("the client sent plaintext behind STARTTLS", Failure.PLAINTEXT_BEHIND_STARTTLS)
        self._reply(Option.STARTTLS, OptionReply.ACK)
        return UpgradeToTls(self.no_zeroes)

    def _export_name(self, data: bytes) -> Outcome:
        if self._mode is ReplyMode.EXTENDED:
            return Refused("the client used EXPORT_NAME after extended headers")
        export = self.catalogue.find(wire.check_string(data))
        if export is None:
            return Refused("the client asked for an export that does not exist", Failure.UNKNOWN_EXPORT)
        self._out += wire.EXPORT_NAME_REPLY.pack(export.size, self._flags(export))
        if not self.no_zeroes:
            self._out += bytes(124)
        return self._negotiated(export)

    def _list(self, data: bytes) -> None:
        if data:
            raise _Invalid("LIST takes no payload")
        for export in self.catalogue.listed():
            name = export.name.encode()
            payload = wire.U32.pack(len(name)) + name + export.description.encode()
            self._reply(Option.LIST, OptionReply.SERVER, payload)
        self._reply(Option.LIST, OptionReply.ACK)

    def _info_or_go(self, option: int, data: bytes) -> Outcome | None:
        fields = _Fields(data)
        name = fields.string()
        wanted = {fields.u16() for _ in range(fields.u16())}
        fields.end()
        export = self.catalogue.find(name)
        if export is None:
            self._reply(option, OptionReply.ERR_UNKNOWN, "there is no export of this name")
            return None
        flags = self._flags(export)
        self._reply(option, OptionReply.INFO, wire.INFO_EXPORT.pack(Info.EXPORT, export.size, flags))
        if Info.NAME in wanted:
            self._reply(option, OptionReply.INFO, wire.U16.pack(Info.NAME) + export.name.encode())
        if Info.DESCRIPTION in wanted and export.description:
            text = wire.U16.pack(Info.DESCRIPTION) + export.description.encode()
            self._reply(option, OptionReply.INFO, text)
        sizes = (wire.MINIMUM_BLOCK, wire.PREFERRED_BLOCK, wire.MAX_PAYLOAD_BYTES)
        payload = wire.INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *sizes)
        self._reply(option, OptionReply.INFO, payload)
        self._reply(option, OptionReply.ACK)
        return self._negotiated(export) if option == Option.GO else None

    def _structured_reply(self, data: bytes) -> None:
        if data:
            raise _Invalid("STRUCTURED_REPLY takes no payload")
        if self._mode is ReplyMode.EXTENDED:
            message = "extended headers are in use, and include structured replies"
            self._reply(Option.STRUCTURED_REPLY, OptionReply.ERR_EXT_HEADER_REQD, message)
            return
        self._mode = ReplyMode.STRUCTURED
        self._reply(Option.STRUCTURED_REPLY, OptionReply.ACK)

    def _extended_headers(self, data: bytes) -> None:
        if data:
            raise _Invalid("EXTENDED_HEADERS takes no payload")
        if self._mode is ReplyMode.EXTENDED:
            raise _Invalid("extended headers are in use already")
        self._mode = ReplyMode.EXTENDED
        self._reply(Option.EXTENDED_HEADERS, OptionReply.ACK)

    def _meta_context(self, option: int, data: bytes) -> None:
        if option == Option.SET_META_CONTEXT:
            self._contexts_of = ("", {})  # a SET that fails leaves nothing selected
        if self._mode is ReplyMode.SIMPLE:
            raise _Invalid("structured replies must be negotiated first")
        fields = _Fields(data)
        name = fields.string()
        count = fields.u32()
        # Each query takes at least its length field, so a count beyond the payload is malformed.
        if count > len(data) // 4:
            raise _Invalid("there are fewer queries than announced")
        queries = [fields.string() for _ in range(count)]
        fields.end()
        if count > wire.MAX_CONTEXTS:
            self._reply(option, OptionReply.ERR_TOO_BIG, "too many queries")
            return
        export = self.catalogue.find(name)
        if export is None:
            self._reply(option, OptionReply.ERR_UNKNOWN, "there is no export of this name")
            return
        listing = option == Option.LIST_META_CONTEXT
        chosen = {
            number: context
            for context, number in wire.CONTEXT_IDS.items()
            if (_lists(queries, context) if listing else context in queries)
        }
        for number, context in chosen.items():
            payload = wire.U32.pack(0 if listing else number) + context.encode()
            self._reply(option, OptionReply.META_CONTEXT, payload)
        if listing and export.identity and _lists(queries, wire.IDENTITY_CONTEXT):
            payload = wire.U32.pack(0) + f"{wire.IDENTITY_CONTEXT}={export.identity}".encode()
            self._reply(option, OptionReply.META_CONTEXT, payload)
        self._reply(option, OptionReply.ACK)
        if not listing:
            self._contexts_of = (export.name, chosen)

    # -- helpers -----------------------------------------------------------------------------------

    def _flags(self, export: ExportInfo) -> int:
        """The export's flags as this client's reply mode can use them."""
        flags = export.flags
        if self._mode is ReplyMode.SIMPLE:
            flags &= ~wire.TransmissionFlag.SEND_DF
        if self._mode is ReplyMode.EXTENDED:
            flags |= wire.TransmissionFlag.BLOCK_STATUS_PAYLOAD
        return flags

    def _negotiated(self, export: ExportInfo) -> Negotiated:
        selected_for, contexts = self._contexts_of
        return Negotiated(export, self._mode, contexts if selected_for == export.name else {})

    def _reply(self, option: int, kind: OptionReply, payload: bytes | str = b"") -> None:
        data = payload.encode() if isinstance(payload, str) else payload
        header = wire.OPTION_REPLY_HEADER.pack(wire.OPTION_REPLY_MAGIC, option, kind, len(data))
        self._out += header + data


def _lists(queries: list[str], context: str) -> bool:
    """Whether LIST_META_CONTEXT names `context`: no query lists all, `base:` all of a namespace."""
    namespace = context.partition(":")[0] + ":"
    return not queries or namespace in queries or context in queries


class _Fields:
    """Reads an option's payload from the front; running out of it is _Invalid."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def _take(self, length: int) -> bytes:
        piece = self._data[self._at : self._at + length]
        if len(piece) < length:
            raise _Invalid("the payload is shorter than its fields say")
        self._at += length
        return piece

    def u16(self) -> int:
        return int.from_bytes(self._take(2), "big")

    def u32(self) -> int:
        return int.from_bytes(self._take(4), "big")

    def string(self) -> str:
        return wire.check_string(self._take(self.u32()))

    def end(self) -> None:
        if self._at != len(self._data):
            raise _Invalid("the payload is longer than its fields say")
