"""The client's steps: against our own server side, in memory, and against answers that break the rules."""

from collections.abc import Callable, Sequence

import pytest

from nbdram.errors import NbdramError, ProtocolError
from nbdram.protocol import client_handshake as ours
from nbdram.protocol.client_handshake import RemoteExport, Steps, T
from nbdram.protocol.handshake import ExportInfo, Handshake, Negotiated, Refused, ReplyMode, TlsPolicy
from nbdram.protocol.wire import Option, OptionReply
from tests.helpers import (
    FIXED,
    GREETING,
    NO_ZEROES,
    client_flags,
    info_payload,
    meta_payload,
    option,
    option_reply,
    string,
    u16,
    u32,
    u64,
)

FLAGS = 0x6D
RAM = ExportInfo("ram", 1 << 40, FLAGS, "scratch space")
OTHER = ExportInfo("köln", 8192, FLAGS | 2, identity="0b4b3c2e-6a5f-4d8e-9f00-2f1d6a7c8b9a")


class Exports:
    def find(self, name: str) -> ExportInfo | None:
        return {"": RAM, "ram": RAM, "köln": OTHER}.get(name)

    def listed(self) -> Sequence[ExportInfo]:
        return (RAM, OTHER)


class Conversation:
    """A server, real or scripted: bytes that wait for the client, and what it answers to the client's."""

    def __init__(self, waiting: bytes, answer: Callable[[bytes], bytes]) -> None:
        self.waiting = bytearray(waiting)
        self.heard = b""
        self._answer = answer

    def run(self, steps: Steps[T]) -> T:
        try:
            wanted = next(steps)
            while True:
                if isinstance(wanted, bytes):
                    self.heard += wanted
                    self.waiting += self._answer(wanted)
                    wanted = next(steps)
                else:
                    assert len(self.waiting) >= wanted > 0, "the client waits for what never comes"
                    piece = bytes(self.waiting[:wanted])
                    del self.waiting[:wanted]
                    wanted = steps.send(piece)
        except StopIteration as stop:
            value: T = stop.value
            return value


def our_server(tls: TlsPolicy = TlsPolicy.OFF) -> tuple[Conversation, Handshake]:
    """Our own server side, greeted."""
    handshake = Handshake(Exports(), tls)

    def answer(data: bytes) -> bytes:
        handshake.receive(data)
        return handshake.data_to_send()

    conversation = Conversation(handshake.data_to_send(), answer)
    conversation.run(ours.greet())
    return conversation, handshake


def says(*said: bytes) -> Conversation:
    """A server that says this, whatever it is asked."""
    return Conversation(b"".join(said), lambda _: b"")


def ack(number: int) -> bytes:
    return option_reply(number, OptionReply.ACK)


# -- against our server ------------------------------------------------------------------------------


def test_all_exports_are_listed_with_their_descriptions() -> None:
    server, _ = our_server()
    assert server.run(ours.list_exports()) == [
        RemoteExport("ram", description="scratch space"),
        RemoteExport("köln"),
    ]


def test_info_tells_all_there_is_to_know() -> None:
    server, handshake = our_server()
    expected = RemoteExport("ram", 1 << 40, FLAGS, "scratch space", (1, 4096, 1 << 25))
    assert server.run(ours.info("")) == expected
    assert server.run(ours.info("ram")) == expected
    assert handshake.outcome is None


def test_go_enters_the_transmission_phase() -> None:
    server, handshake = our_server()
    assert server.run(ours.go("köln")).size == 8192
    assert handshake.outcome == Negotiated(OTHER, ReplyMode.SIMPLE, {})


@pytest.mark.parametrize("mode", ReplyMode)
def test_both_ends_agree_on_the_mode_of_replies(mode: ReplyMode) -> None:
    server, handshake = our_server()
    assert server.run(ours.agree_on_replies([mode])) is mode
    server.run(ours.go("ram"))
    assert isinstance(handshake.outcome, Negotiated)
    assert handshake.outcome.mode is mode


def test_nothing_is_asked_behind_simple_replies() -> None:
    server, _ = our_server()
    heard = server.heard
    assert server.run(ours.agree_on_replies([ReplyMode.SIMPLE, ReplyMode.EXTENDED])) is ReplyMode.SIMPLE
    assert server.heard == heard


def test_an_identity_is_read_where_the_server_tells_one() -> None:
    server, _ = our_server()
    server.run(ours.agree_on_replies([ReplyMode.STRUCTURED]))
    assert server.run(ours.identity("köln")) == OTHER.identity
    assert server.run(ours.identity("ram")) == ""


def test_contexts_are_listed_and_set() -> None:
    server, handshake = our_server()
    server.run(ours.agree_on_replies([ReplyMode.STRUCTURED]))
    names = server.run(ours.list_contexts("ram"))
    assert "base:allocation" in names
    agreed = server.run(ours.set_contexts("ram", [*names, "x-other:context"]))
    server.run(ours.go("ram"))
    assert sorted(agreed.values()) == sorted(names)
    assert isinstance(handshake.outcome, Negotiated)
    assert handshake.outcome.contexts == agreed


def test_abort_ends_the_handshake() -> None:
    server, handshake = our_server()
    server.run(ours.abort())
    assert isinstance(handshake.outcome, Refused)


@pytest.mark.parametrize("steps", [ours.info, ours.go, lambda name: ours.list_contexts(name)])
def test_the_reason_of_a_refusal_is_told(steps: Callable[[str], Steps[object]]) -> None:
    server, _ = our_server()
    server.run(ours.agree_on_replies([ReplyMode.STRUCTURED]))
    with pytest.raises(NbdramError, match="no export of this name; `nbdram list`, with the same URI,"):
        server.run(steps("nobody"))


def test_a_server_that_requires_tls_says_so() -> None:
    server, _ = our_server(TlsPolicy.REQUIRED)
    with pytest.raises(NbdramError, match="requires TLS"):
        server.run(ours.list_exports())


# -- the bytes that are sent -------------------------------------------------------------------------


def test_the_client_sends_what_the_specification_says() -> None:
    server = says(GREETING)
    server.run(ours.greet())
    assert server.heard == client_flags(FIXED | NO_ZEROES)

    server = says(option_reply(7, OptionReply.INFO, u16(0) + u64(4096) + u16(1)), ack(7))
    server.run(ours.go("ram"))
    assert server.heard == option(Option.GO, info_payload("ram", [1, 2, 3]))

    server = says(ack(10))
    server.run(ours.set_contexts("ram", ["base:allocation"]))
    assert server.heard == option(Option.SET_META_CONTEXT, meta_payload("ram", ["base:allocation"]))


def test_the_client_answers_only_those_flags_that_were_offered() -> None:
    server = says(b"NBDMAGICIHAVEOPT", u16(FIXED | 0xFF00))
    server.run(ours.greet())
    assert server.heard == client_flags(FIXED)


# -- answers that break the rules --------------------------------------------------------------------


@pytest.mark.parametrize(
    "greeting",
    [
        b"SSH-2.0-OpenSSH_9.2",
        bytes(18),
        b"NBDMAGIC" + bytes.fromhex("0000420281861253") + u16(0),  # oldstyle
        b"NBDMAGICIHAVEOPT" + u16(NO_ZEROES),  # newstyle, not fixed
    ],
    ids=["ssh", "zeros", "oldstyle", "not fixed"],
)
def test_what_is_no_newstyle_server_is_told_apart(greeting: bytes) -> None:
    server = says(greeting)
    with pytest.raises(ProtocolError, match="newstyle"):
        server.run(ours.greet())
    assert server.heard == b""


BROKEN_REPLIES = {
    "a wrong magic": bytes(8) + u32(3) + u32(1) + u32(0),
    "a reply to another option": ack(Option.INFO),
    "a reply that is too long": ack(Option.LIST)[:16] + u32(8209),
    "a reply of 4 GiB": ack(Option.LIST)[:16] + u32(0xFFFFFFFF),
}


@pytest.mark.parametrize("reply", BROKEN_REPLIES.values(), ids=BROKEN_REPLIES)
def test_a_broken_reply_is_a_protocol_error(reply: bytes) -> None:
    with pytest.raises(ProtocolError, match="breaks the NBD protocol"):
        says(reply).run(ours.list_exports())


def test_the_longest_reply_that_the_protocol_allows_is_read() -> None:
    said = option_reply(Option.LIST, OptionReply.SERVER, string("n" * 4096) + b"d" * 4096)
    (export,) = says(said, ack(Option.LIST)).run(ours.list_exports())
    assert (export.name, export.description) == ("n" * 4096, "d" * 4096)


def test_what_the_client_does_not_know_is_passed_over() -> None:
    replies = [
        option_reply(7, OptionReply.INFO, u16(0x7777) + b"news"),
        option_reply(7, OptionReply.INFO, b"?"),
        option_reply(7, 99, b"news"),
        option_reply(7, OptionReply.INFO, u16(0) + u64(4096) + u16(1)),
        option_reply(7, OptionReply.INFO, u16(3) + b"too short"),
        ack(7),
    ]
    export = says(*replies).run(ours.go("ram"))
    assert export == RemoteExport("ram", 4096, 1)


def test_go_without_a_size_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError, match="how large"):
        says(ack(Option.GO)).run(ours.go("ram"))


def test_a_refusal_without_words_is_told_as_such() -> None:
    with pytest.raises(NbdramError, match="without a reason"):
        says(option_reply(Option.LIST, OptionReply.ERR_POLICY)).run(ours.list_exports())


def test_a_text_that_is_not_utf8_is_readable_all_the_same() -> None:
    with pytest.raises(NbdramError, match="no\ufffd"):
        says(option_reply(Option.LIST, OptionReply.ERR_POLICY, b"no\xff")).run(ours.list_exports())


def test_the_client_falls_back_to_what_the_server_speaks() -> None:
    unsupported = option_reply(Option.EXTENDED_HEADERS, OptionReply.ERR_UNSUP)
    wanted = (ReplyMode.EXTENDED, ReplyMode.STRUCTURED)
    assert says(unsupported, ack(8)).run(ours.agree_on_replies(wanted)) is ReplyMode.STRUCTURED
    also = option_reply(Option.STRUCTURED_REPLY, OptionReply.ERR_UNSUP)
    assert says(unsupported, also).run(ours.agree_on_replies(wanted)) is ReplyMode.SIMPLE
