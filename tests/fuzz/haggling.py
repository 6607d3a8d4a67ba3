"""The handshake, server side: any bytes, whole and in pieces.

The first byte chooses the TLS policy and how the rest is cut; the rest is what a client sends.
"""

import struct
from collections.abc import Iterable
from typing import Final

from nbdram.protocol import wire
from nbdram.protocol.handshake import ExportInfo, Handshake, Negotiated, Refused, ReplyMode, TlsPolicy, UpgradeToTls

SEEDS_FIRST_BYTE: Final = 0  # TLS is off, and the bytes come whole and one by one

_REPLY: Final = struct.Struct(">QIII")
_ACK, _SERVER, _INFO, _META_CONTEXT = 1, 2, 3, 4
_TEXT_LIMIT: Final = 4096

EXPORTS: Final = (
    ExportInfo("ram", 1 << 40, 0x0D6D, "a device", "11111111-2222-3333-4444-555555555555"),
    ExportInfo("ro", 4096, 0x0003),
    ExportInfo("ä" * 2048, 0, 0x0D6D),
)


class _Catalogue:
    def find(self, name: str) -> ExportInfo | None:
        return next((export for export in EXPORTS if export.name == (name or "ram")), None)

    def listed(self) -> Iterable[ExportInfo]:
        return EXPORTS


def one(data: bytes) -> None:
    """An execution; raises if anything is wrong."""
    if not data:
        return
    choice, sent = data[0], data[1:]
    policy = (TlsPolicy.OFF, TlsPolicy.OFFERED, TlsPolicy.REQUIRED, TlsPolicy.REQUIRED)[choice & 3]
    secure = policy is not TlsPolicy.OFF and bool(choice & 4)
    step = 1 + (choice >> 3)
    whole = Handshake(_Catalogue(), policy, secure)
    said = _feed(whole, sent, max(1, len(sent)))
    _check(whole, said, sent, hidden=policy is TlsPolicy.REQUIRED and not secure)
    pieces = Handshake(_Catalogue(), policy, secure)
    said_in_pieces = _feed(pieces, sent, step)
    if _injected(whole):
        return  # whether bytes came before the acknowledgement depends on the pieces
    assert said_in_pieces == said, "the answer depends on how the bytes were cut"
    assert pieces.outcome == whole.outcome, "the outcome depends on how the bytes were cut"


def _injected(handshake: Handshake) -> bool:
    return isinstance(handshake.outcome, Refused) and "behind STARTTLS" in handshake.outcome.reason


def _feed(handshake: Handshake, sent: bytes, step: int) -> bytes:
    said = handshake.data_to_send()
    for at in range(0, len(sent), step):
        if handshake.outcome is not None:
            break
        handshake.receive(sent[at : at + step])
        said += handshake.data_to_send()
        if handshake.outcome is None:
            assert len(handshake.leftover()) <= wire.MAX_OPTION_BYTES, "more is held than an option may have"
    return said


def _check(handshake: Handshake, said: bytes, sent: bytes, *, hidden: bool) -> None:
    if not handshake.secure:
        assert said[:18] == b"NBDMAGICIHAVEOPT\0\x03"
        said = said[18:]
    final = 0
    while said[:8] == bytes.fromhex("0003e889045565a9"):
        _, option, kind, length = _REPLY.unpack_from(said)
        payload, said = said[20 : 20 + length], said[20 + length :]
        assert len(payload) == length, "a reply is cut short"
        final += _check_reply(option, kind, payload, hidden=hidden)
    assert final <= wire.MAX_OPTIONS
    outcome = handshake.outcome
    if said:
        assert isinstance(outcome, Negotiated), "what is sent is no option reply"
        assert len(said) == (10 if handshake.no_zeroes else 134), "EXPORT_NAME has another answer"
    if isinstance(outcome, Negotiated):
        assert not hidden
        assert outcome.export in EXPORTS
        assert not outcome.contexts or outcome.mode is not ReplyMode.SIMPLE
        assert sent.endswith(handshake.leftover()), "what is left over was not sent at the end"
    if isinstance(outcome, UpgradeToTls):
        assert not handshake.secure
        assert not handshake.leftover()


def _check_reply(option: int, kind: int, payload: bytes, *, hidden: bool) -> bool:
    """Whether it ends the answer to an option."""
    if kind >= 1 << 31:
        assert kind <= (1 << 31) + 10
        assert payload.decode()
        assert len(payload) <= _TEXT_LIMIT
        return True
    assert kind in (_ACK, _SERVER, _INFO, _META_CONTEXT)
    assert not hidden or kind == _ACK, "something is told without TLS"
    if kind == _SERVER:
        assert option == wire.Option.LIST
        (length,) = struct.unpack_from(">I", payload)
        assert payload[4 : 4 + length].decode() in [export.name for export in EXPORTS]
    elif kind == _INFO:
        assert option in (wire.Option.INFO, wire.Option.GO)
        assert len(payload) >= 2
    elif kind == _META_CONTEXT:
        assert option in (wire.Option.LIST_META_CONTEXT, wire.Option.SET_META_CONTEXT)
        assert payload[4:].decode()
    else:
        assert not payload
    return kind == _ACK
