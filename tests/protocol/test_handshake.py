"""The handshake phase, server side: what it answers, byte by byte and to everything that can go wrong."""

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import pytest

from nbdram.protocol.handshake import (
    ExportInfo,
    Handshake,
    Negotiated,
    Refused,
    ReplyMode,
    TlsPolicy,
    UpgradeToTls,
)
from nbdram.protocol.wire import Info, Option, OptionReply, TransmissionFlag
from tests.helpers import (
    FIXED,
    GREETING,
    IHAVEOPT,
    MIB,
    NO_ZEROES,
    OptionAnswer,
    client_flags,
    go,
    info_payload,
    meta_payload,
    option,
    option_reply,
    parse_option_answers,
    request,
    string,
    u16,
    u32,
    u64,
)

SIZE = 0x1_2345_6000
FLAGS = int(TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_DF)
LONG_NAME = "n" * 4096

ERRORS = {kind: kind.name for kind in OptionReply if kind.name.startswith("ERR_")}


class Exports:
    """A catalogue of three exports; the first is the default."""

    exports = (
        ExportInfo("ram", SIZE, FLAGS, "scratch space"),
        ExportInfo("köln", 4096, FLAGS | TransmissionFlag.READ_ONLY),
        ExportInfo(LONG_NAME, 8192, FLAGS, identity="8c2f"),
    )

    def find(self, name: str) -> ExportInfo | None:
        return next((export for export in self.exports if name in ("", export.name)), None)

    def listed(self) -> Iterable[ExportInfo]:
        return self.exports


@dataclass
class Talk:
    """A handshake that is fed whole or byte by byte, past the greeting and the client's flags."""

    handshake: Handshake
    step: int
    sent: bytes = b""

    def say(self, *pieces: bytes) -> list[OptionAnswer]:
        """Send something; the option replies that come back."""
        return parse_option_answers(self.raw(*pieces))

    def raw(self, *pieces: bytes) -> bytes:
        data = b"".join(pieces)
        step = self.step or len(data) or 1
        for start in range(0, len(data), step):
            self.handshake.receive(data[start : start + step])
        answer = self.handshake.data_to_send()
        self.sent += answer
        return answer

    @property
    def refused(self) -> str:
        assert isinstance(self.handshake.outcome, Refused), self.handshake.outcome
        return self.handshake.outcome.reason

    @property
    def negotiated(self) -> Negotiated:
        assert isinstance(self.handshake.outcome, Negotiated), self.handshake.outcome
        return self.handshake.outcome


def talk(step: int, flags: int = FIXED | NO_ZEROES, tls: TlsPolicy = TlsPolicy.OFF) -> Talk:
    begun = Talk(Handshake(Exports(), tls), step)
    assert begun.handshake.data_to_send() == GREETING
    assert begun.raw(client_flags(flags)) == b""
    return begun


def error_of(answers: list[OptionAnswer]) -> OptionReply:
    """The error that is the only answer."""
    (answer,) = answers
    assert answer.kind in ERRORS, answer
    assert len(answer.payload) <= 4096
    assert answer.payload.decode().isprintable()
    return OptionReply(answer.kind)


def ack(number: int) -> OptionAnswer:
    return OptionAnswer(number, OptionReply.ACK)


@pytest.fixture(params=[0, 1, 7], ids=["whole", "byte-by-byte", "in-sevens"])
def step(request: pytest.FixtureRequest) -> int:
    """How many bytes the handshake is fed at a time; 0: all."""
    chosen: int = request.param
    return chosen


# -- greeting ----------------------------------------------------------------------------------------


def test_the_server_speaks_first() -> None:
    handshake = Handshake(Exports())
    assert handshake.data_to_send() == b"NBDMAGICIHAVEOPT\0\3"
    assert handshake.data_to_send() == b""
    assert handshake.outcome is None


@pytest.mark.parametrize("flags", [4, 7, 0x80000000, 0xFFFFFFFF])
def test_an_unknown_client_flag_ends_the_handshake(step: int, flags: int) -> None:
    assert "flag" in talk(step, flags).refused


@pytest.mark.parametrize("flags", [0, FIXED, NO_ZEROES, FIXED | NO_ZEROES])
def test_every_combination_of_known_client_flags_is_served(step: int, flags: int) -> None:
    begun = talk(step, flags)
    begun.say(go())
    assert begun.negotiated.export.name == "ram"


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(16), b"\xff" * 64])
def test_an_option_without_its_magic_ends_the_handshake(step: int, garbage: bytes) -> None:
    begun = talk(step)
    assert begun.raw(garbage) == b""
    assert "magic" in begun.refused


def test_nothing_that_follows_a_refusal_is_answered(step: int) -> None:
    begun = talk(step)
    begun.raw(bytes(16))
    assert begun.raw(option(Option.LIST), go()) == b""
    assert "magic" in begun.refused


# -- EXPORT_NAME -------------------------------------------------------------------------------------


def test_export_name_is_answered_with_124_zeroes_for_an_old_client(step: int) -> None:
    begun = talk(step, FIXED)
    flags = FLAGS & ~TransmissionFlag.SEND_DF
    assert begun.raw(option(Option.EXPORT_NAME, b"ram")) == u64(SIZE) + u16(flags) + bytes(124)
    assert begun.negotiated == Negotiated(Exports.exports[0], ReplyMode.SIMPLE, {})


def test_export_name_is_answered_without_zeroes_if_the_client_wants_none(step: int) -> None:
    begun = talk(step, FIXED | NO_ZEROES)
    assert len(begun.raw(option(Option.EXPORT_NAME, b"ram"))) == 10
    assert begun.negotiated.export.name == "ram"


def test_a_client_without_fixed_newstyle_can_use_export_name(step: int) -> None:
    begun = talk(step, 0)
    assert len(begun.raw(option(Option.EXPORT_NAME, "köln".encode()))) == 134
    assert begun.negotiated.export.name == "köln"


def test_export_name_without_a_name_is_the_default_export(step: int) -> None:
    begun = talk(step)
    begun.raw(option(Option.EXPORT_NAME))
    assert begun.negotiated.export.name == "ram"


def test_export_name_keeps_what_was_negotiated_before(step: int) -> None:
    begun = talk(step)
    begun.say(option(Option.STRUCTURED_REPLY))
    begun.say(option(Option.SET_META_CONTEXT, meta_payload("ram", ["base:allocation"])))
    _, flags = struct.unpack(">QH", begun.raw(option(Option.EXPORT_NAME, b"ram")))
    assert flags & TransmissionFlag.SEND_DF
    assert begun.negotiated.mode is ReplyMode.STRUCTURED
    assert begun.negotiated.contexts == {1: "base:allocation"}


@pytest.mark.parametrize("name", [b"nobody", b"a\0b", b"\xff\xfe", b"x" * 4097, b"x" * 65537])
def test_export_name_that_can_not_be_served_ends_the_session_without_a_word(step: int, name: bytes) -> None:
    begun = talk(step)
    assert begun.raw(option(Option.EXPORT_NAME, name)) == b""
    assert "export" in begun.refused


def test_export_name_is_forbidden_after_extended_headers(step: int) -> None:
    begun = talk(step)
    assert begun.say(option(Option.EXTENDED_HEADERS)) == [ack(Option.EXTENDED_HEADERS)]
    assert begun.raw(option(Option.EXPORT_NAME, b"ram")) == b""
    assert "extended headers" in begun.refused


def test_the_first_requests_may_come_with_export_name(step: int) -> None:
    begun = talk(step)
    requests = request(ReplyMode.SIMPLE, 0, 0, 4096)
    begun.raw(option(Option.EXPORT_NAME, b"ram"), requests)
    assert begun.handshake.leftover() == requests


# -- ABORT, unknown options --------------------------------------------------------------------------


def test_abort_is_acknowledged_and_ends_the_handshake(step: int) -> None:
    begun = talk(step)
    assert begun.raw(option(Option.ABORT)) == option_reply(Option.ABORT, OptionReply.ACK)
    assert "ended" in begun.refused


@pytest.mark.parametrize("number", [0, 4, 12, 0x7FFFFFFF, 0xFFFFFFFF])
def test_an_unknown_option_is_unsupported_and_its_payload_passed_over(step: int, number: int) -> None:
    begun = talk(step)
    assert error_of(begun.say(option(number, b"payload" * 100))) == OptionReply.ERR_UNSUP
    assert begun.sent[8:12] == u32(number)
    assert begun.say(option(Option.STRUCTURED_REPLY)) == [ack(Option.STRUCTURED_REPLY)]


# -- LIST --------------------------------------------------------------------------------------------


def test_list_names_every_export_and_its_description(step: int) -> None:
    assert talk(step).raw(option(Option.LIST)) == (
        option_reply(Option.LIST, OptionReply.SERVER, string("ram") + b"scratch space")
        + option_reply(Option.LIST, OptionReply.SERVER, string("köln"))
        + option_reply(Option.LIST, OptionReply.SERVER, string(LONG_NAME))
        + option_reply(Option.LIST, OptionReply.ACK)
    )


@pytest.mark.parametrize(
    "number", [Option.LIST, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS, Option.STARTTLS], ids=lambda o: o.name
)
def test_options_without_a_payload_are_invalid_with_one(step: int, number: Option) -> None:
    begun = talk(step, tls=TlsPolicy.OFFERED)
    assert error_of(begun.say(option(number, b"\0"))) == OptionReply.ERR_INVALID
    begun.say(go())
    assert begun.negotiated.mode is ReplyMode.SIMPLE


# -- INFO and GO -------------------------------------------------------------------------------------


def test_go_tells_size_and_flags_and_block_sizes_and_enters_transmission(step: int) -> None:
    begun = talk(step)
    flags = FLAGS & ~TransmissionFlag.SEND_DF
    assert begun.raw(go("ram")) == (
        option_reply(Option.GO, OptionReply.INFO, u16(0) + u64(SIZE) + u16(flags))
        + option_reply(Option.GO, OptionReply.INFO, u16(3) + u32(1) + u32(4096) + u32(32 * MIB))
        + option_reply(Option.GO, OptionReply.ACK)
    )
    assert begun.negotiated == Negotiated(Exports.exports[0], ReplyMode.SIMPLE, {})


def test_info_answers_like_go_but_stays_in_the_handshake(step: int) -> None:
    begun = talk(step)
    answers = begun.say(option(Option.INFO, info_payload("ram")))
    assert begun.handshake.outcome is None
    again = begun.say(go("ram"))
    assert [answer.payload for answer in answers] == [answer.payload for answer in again]


def test_info_requests_are_answered_if_there_is_something_to_say(step: int) -> None:
    wanted = [Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE, 0x7777]
    answers = talk(step).say(option(Option.INFO, info_payload("", wanted)))
    told = {answer.payload[:2]: answer.payload[2:] for answer in answers[:-1]}
    assert set(told) == {u16(0), u16(1), u16(2), u16(3)}
    assert told[u16(Info.NAME)] == b"ram", "the real name of the default export"
    assert told[u16(Info.DESCRIPTION)] == b"scratch space"
    assert answers[-1] == ack(Option.INFO)


def test_an_export_without_a_description_has_none_to_tell(step: int) -> None:
    answers = talk(step).say(option(Option.INFO, info_payload("köln", [Info.DESCRIPTION])))
    assert u16(Info.DESCRIPTION) not in [answer.payload[:2] for answer in answers]


def test_an_info_request_that_is_repeated_is_answered_once(step: int) -> None:
    answers = talk(step).say(option(Option.INFO, info_payload("ram", [Info.NAME] * 3)))
    assert [answer.payload[:2] for answer in answers].count(u16(Info.NAME)) == 1


@pytest.mark.parametrize("number", [Option.INFO, Option.GO], ids=["INFO", "GO"])
def test_an_unknown_name_is_an_error_and_haggling_goes_on(step: int, number: Option) -> None:
    begun = talk(step)
    assert error_of(begun.say(option(number, info_payload("nobody")))) == OptionReply.ERR_UNKNOWN
    begun.say(go(LONG_NAME))
    assert begun.negotiated.export.size == 8192


@pytest.mark.parametrize("mode", ReplyMode)
def test_flags_fit_the_replies_that_were_negotiated(step: int, mode: ReplyMode) -> None:
    begun = talk(step)
    if mode is ReplyMode.STRUCTURED:
        begun.say(option(Option.STRUCTURED_REPLY))
    elif mode is ReplyMode.EXTENDED:
        begun.say(option(Option.EXTENDED_HEADERS))
    flags = int.from_bytes(begun.say(go())[0].payload[-2:], "big")
    assert bool(flags & TransmissionFlag.SEND_DF) == (mode is not ReplyMode.SIMPLE)
    assert bool(flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD) == (mode is ReplyMode.EXTENDED)
    assert begun.negotiated.mode is mode


MALFORMED_INFO = {
    "empty": b"",
    "no name": u32(3),
    "name cut short": u32(4) + b"ram",
    "name length of 4 GiB": u32(0xFFFFFFFF) + b"ram" + u16(0),
    "no count": string("ram"),
    "half a count": string("ram") + b"\0",
    "fewer requests than announced": string("ram") + u16(2) + u16(1),
    "more requests than announced": string("ram") + u16(1) + u16(1) + u16(2),
    "a stray byte": string("ram") + u16(0) + b"\0",
    "a name with NUL": info_payload(b"r\0m"),
    "a name that is not UTF-8": info_payload(b"\xff"),
    "a name of 4097 bytes": info_payload(b"x" * 4097),
}


@pytest.mark.parametrize("payload", MALFORMED_INFO.values(), ids=MALFORMED_INFO)
@pytest.mark.parametrize("number", [Option.INFO, Option.GO], ids=["INFO", "GO"])
def test_malformed_info_and_go_are_invalid_and_haggling_goes_on(step: int, number: Option, payload: bytes) -> None:
    begun = talk(step)
    assert error_of(begun.say(option(number, payload))) == OptionReply.ERR_INVALID
    begun.say(go())
    assert begun.negotiated.export.name == "ram"


def test_requests_may_come_right_behind_go(step: int) -> None:
    begun = talk(step)
    requests = request(ReplyMode.SIMPLE, 1, 0, 3, payload=b"abc")
    begun.raw(go(), requests)
    assert begun.handshake.leftover() == requests


# -- reply modes -------------------------------------------------------------------------------------


def test_structured_replies_are_acknowledged(step: int) -> None:
    begun = talk(step)
    assert begun.raw(option(Option.STRUCTURED_REPLY)) == option_reply(8, OptionReply.ACK)
    begun.say(go())
    assert begun.negotiated.mode is ReplyMode.STRUCTURED


@pytest.mark.parametrize("structured_first", [False, True])
def test_extended_headers_are_acknowledged_with_or_without_structured_replies(
    step: int, structured_first: bool
) -> None:
    begun = talk(step)
    if structured_first:
        begun.say(option(Option.STRUCTURED_REPLY))
    assert begun.raw(option(Option.EXTENDED_HEADERS)) == option_reply(11, OptionReply.ACK)
    begun.say(go())
    assert begun.negotiated.mode is ReplyMode.EXTENDED


def test_extended_headers_twice_are_invalid_and_stay_in_use(step: int) -> None:
    begun = talk(step)
    begun.say(option(Option.EXTENDED_HEADERS))
    assert error_of(begun.say(option(Option.EXTENDED_HEADERS))) == OptionReply.ERR_INVALID
    begun.say(go())
    assert begun.negotiated.mode is ReplyMode.EXTENDED


def test_extended_headers_can_not_be_downgraded_to_structured_replies(step: int) -> None:
    begun = talk(step)
    begun.say(option(Option.EXTENDED_HEADERS))
    assert error_of(begun.say(option(Option.STRUCTURED_REPLY))) == OptionReply.ERR_EXT_HEADER_REQD
    begun.say(go())
    assert begun.negotiated.mode is ReplyMode.EXTENDED


# -- meta contexts -----------------------------------------------------------------------------------

BASE, TIER = "base:allocation", "x-nbdram:tier"
LIST_CONTEXTS, SET_CONTEXTS = Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT
BOTH = pytest.mark.parametrize("number", [LIST_CONTEXTS, SET_CONTEXTS], ids=["LIST", "SET"])


def structured(step: int) -> Talk:
    begun = talk(step)
    begun.say(option(Option.STRUCTURED_REPLY))
    return begun


def contexts(answers: list[OptionAnswer]) -> dict[str, int]:
    """The contexts that an answer names, and their ids; it must end with ACK."""
    *found, last = answers
    assert last.kind == OptionReply.ACK, answers
    return {answer.payload[4:].decode(): int.from_bytes(answer.payload[:4], "big") for answer in found}


@BOTH
def test_contexts_before_structured_replies_are_invalid(step: int, number: Option) -> None:
    begun = talk(step)
    assert error_of(begun.say(option(number, meta_payload("ram", [BASE])))) == OptionReply.ERR_INVALID


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ([], {BASE, TIER}),
        ([BASE], {BASE}),
        (["base:"], {BASE}),
        (["x-nbdram:"], {TIER}),
        (["base:", "x-nbdram:"], {BASE, TIER}),
        (["base:", BASE, BASE], {BASE}),
        (["base:unheard-of"], set()),
        (["qemu:allocation-depth", "x-other:"], set()),
        (["base", ""], set()),
    ],
)
def test_list_of_contexts_answers_names_and_wildcards(step: int, queries: list[str], expected: set[str]) -> None:
    answers = structured(step).say(option(LIST_CONTEXTS, meta_payload("ram", queries)))
    assert contexts(answers) == dict.fromkeys(expected, 0)


@pytest.mark.parametrize("queries", [[], ["x-nbdram:"], ["x-nbdram:id"]])
def test_the_identity_of_a_device_is_a_context_that_is_only_listed(step: int, queries: list[str]) -> None:
    begun = structured(step)
    listed = contexts(begun.say(option(LIST_CONTEXTS, meta_payload(LONG_NAME, queries))))
    assert listed["x-nbdram:id=8c2f"] == 0
    selected = begun.say(option(SET_CONTEXTS, meta_payload(LONG_NAME, ["x-nbdram:id", *listed])))
    assert not any(name.startswith("x-nbdram:id") for name in contexts(selected))


def test_list_of_contexts_selects_nothing(step: int) -> None:
    begun = structured(step)
    begun.say(option(LIST_CONTEXTS, meta_payload("ram", [BASE])))
    begun.say(go())
    assert begun.negotiated.contexts == {}


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ([], set()),
        ([BASE], {BASE}),
        ([BASE, TIER], {BASE, TIER}),
        ([BASE, BASE, BASE], {BASE}),
        (["base:"], set()),
        (["base:", TIER], {TIER}),
        (["qemu:dirty-bitmap:x"], set()),
    ],
)
def test_set_of_contexts_selects_exact_names_only(step: int, queries: list[str], expected: set[str]) -> None:
    begun = structured(step)
    selected = contexts(begun.say(option(SET_CONTEXTS, meta_payload("ram", queries))))
    assert selected.keys() == expected
    assert len(set(selected.values())) == len(selected)
    begun.say(go())
    assert begun.negotiated.contexts == {number: name for name, number in selected.items()}


def test_a_second_set_replaces_the_first(step: int) -> None:
    begun = structured(step)
    begun.say(option(SET_CONTEXTS, meta_payload("ram", [BASE])))
    begun.say(option(SET_CONTEXTS, meta_payload("ram", [TIER])))
    begun.say(go())
    assert list(begun.negotiated.contexts.values()) == [TIER]


FAILING_SETS = {
    "malformed": meta_payload("ram", [BASE]) + b"\0",
    "unknown export": meta_payload("nobody", [BASE]),
    "too many": meta_payload("ram", [BASE] * 129),
}


@pytest.mark.parametrize("payload", FAILING_SETS.values(), ids=FAILING_SETS)
def test_a_set_that_fails_leaves_nothing_selected(step: int, payload: bytes) -> None:
    begun = structured(step)
    begun.say(option(SET_CONTEXTS, meta_payload("ram", [BASE])))
    error_of(begun.say(option(SET_CONTEXTS, payload)))
    begun.say(go())
    assert begun.negotiated.contexts == {}


def test_contexts_set_for_another_export_are_dropped(step: int) -> None:
    begun = structured(step)
    begun.say(option(SET_CONTEXTS, meta_payload("ram", [BASE])))
    begun.say(go("köln"))
    assert begun.negotiated.contexts == {}


@pytest.mark.parametrize(("set_for", "entered"), [("", "ram"), ("ram", ""), ("", "")])
def test_the_default_export_is_the_same_by_both_of_its_names(step: int, set_for: str, entered: str) -> None:
    begun = structured(step)
    begun.say(option(SET_CONTEXTS, meta_payload(set_for, [BASE])))
    begun.say(go(entered))
    assert list(begun.negotiated.contexts.values()) == [BASE]


def test_contexts_survive_the_step_to_extended_headers(step: int) -> None:
    begun = structured(step)
    begun.say(option(SET_CONTEXTS, meta_payload("ram", [BASE])))
    begun.say(option(Option.EXTENDED_HEADERS))
    begun.say(go())
    assert list(begun.negotiated.contexts.values()) == [BASE]


@BOTH
def test_128_queries_are_served_and_one_more_is_too_big(step: int, number: Option) -> None:
    begun = structured(step)
    queries = [BASE] + ["x-other:context"] * 127
    assert contexts(begun.say(option(number, meta_payload("ram", queries)))).keys() == {BASE}
    queries.append("x-other:context")
    assert error_of(begun.say(option(number, meta_payload("ram", queries)))) == OptionReply.ERR_TOO_BIG


@BOTH
def test_contexts_of_an_unknown_export_are_an_error(step: int, number: Option) -> None:
    answers = structured(step).say(option(number, meta_payload("nobody", [BASE])))
    assert error_of(answers) == OptionReply.ERR_UNKNOWN


MALFORMED_META = {
    "empty": b"",
    "name cut short": u32(4) + b"ram",
    "no count": string("ram"),
    "fewer queries than announced": string("ram") + u32(2) + string(BASE),
    "four billion queries": string("ram") + u32(0xFFFFFFFF) + string(BASE),
    "more bytes than queries": meta_payload("ram", [BASE]) + b"\0\0\0",
    "a query cut short": string("ram") + u32(1) + u32(20) + b"base:",
    "a query of 4 GiB": string("ram") + u32(1) + u32(0xFFFFFFFF) + b"base:",
    "a query of 4097 bytes": meta_payload("ram", ["x" * 4097]),
    "a query with NUL": meta_payload("ram", ["base:\0"]),
    "a query that is not UTF-8": meta_payload("ram", [b"base:\xff"]),
}


@pytest.mark.parametrize("payload", MALFORMED_META.values(), ids=MALFORMED_META)
@BOTH
def test_malformed_contexts_are_invalid_and_haggling_goes_on(step: int, number: Option, payload: bytes) -> None:
    begun = structured(step)
    assert error_of(begun.say(option(number, payload))) == OptionReply.ERR_INVALID
    begun.say(go())
    assert begun.negotiated.mode is ReplyMode.STRUCTURED


# -- TLS ---------------------------------------------------------------------------------------------


def after_tls(begun: Talk) -> Talk:
    """The handshake as it goes on inside TLS."""
    assert isinstance(begun.handshake.outcome, UpgradeToTls)
    no_zeroes = begun.handshake.outcome.no_zeroes
    going_on = Talk(Handshake(Exports(), begun.handshake.tls, secure=True, no_zeroes=no_zeroes), begun.step)
    assert going_on.handshake.data_to_send() == b"", "there is one greeting, and it was sent"
    return going_on


def test_starttls_is_against_policy_where_tls_is_off(step: int) -> None:
    begun = talk(step, tls=TlsPolicy.OFF)
    assert error_of(begun.say(option(Option.STARTTLS))) == OptionReply.ERR_POLICY
    begun.say(go())
    assert begun.negotiated.export.name == "ram"


@pytest.mark.parametrize("policy", [TlsPolicy.OFFERED, TlsPolicy.REQUIRED])
def test_starttls_is_acknowledged_and_then_haggling_goes_on_inside_tls(step: int, policy: TlsPolicy) -> None:
    begun = talk(step, tls=policy)
    assert begun.raw(option(Option.STARTTLS)) == option_reply(Option.STARTTLS, OptionReply.ACK)
    secure = after_tls(begun)
    secure.say(go())
    assert secure.negotiated.export.name == "ram"


def test_cve_2021_3716_what_was_negotiated_before_starttls_is_forgotten(step: int) -> None:
    begun = talk(step, tls=TlsPolicy.OFFERED)
    begun.say(option(Option.STRUCTURED_REPLY))
    begun.say(option(SET_CONTEXTS, meta_payload("ram", [BASE])))
    begun.say(option(Option.EXTENDED_HEADERS))
    begun.say(option(Option.STARTTLS))
    secure = after_tls(begun)
    assert error_of(secure.say(option(SET_CONTEXTS, meta_payload("ram", [BASE])))) == OptionReply.ERR_INVALID
    secure.say(go())
    assert secure.negotiated == Negotiated(Exports.exports[0], ReplyMode.SIMPLE, {})


@pytest.mark.parametrize("behind", [b"\0", b"\x16\x03\x01", go()], ids=["a byte", "a TLS hello", "an option"])
def test_bytes_behind_starttls_are_an_injection(behind: bytes) -> None:
    begun = talk(0, tls=TlsPolicy.OFFERED)
    assert begun.raw(option(Option.STARTTLS), behind) == b""
    assert "plaintext behind STARTTLS" in begun.refused


@pytest.mark.parametrize(("flags", "length"), [(FIXED, 134), (FIXED | NO_ZEROES, 10)])
def test_client_flags_are_sent_once_and_hold_inside_tls(step: int, flags: int, length: int) -> None:
    begun = talk(step, flags, TlsPolicy.OFFERED)
    begun.say(option(Option.STARTTLS))
    assert len(after_tls(begun).raw(option(Option.EXPORT_NAME, b"ram"))) == length


def test_a_second_starttls_is_invalid(step: int) -> None:
    begun = talk(step, tls=TlsPolicy.OFFERED)
    begun.say(option(Option.STARTTLS))
    secure = after_tls(begun)
    assert error_of(secure.say(option(Option.STARTTLS))) == OptionReply.ERR_INVALID
    secure.say(go())
    assert secure.negotiated.export.name == "ram"


REVEALING = {
    "LIST": option(Option.LIST),
    "INFO": option(Option.INFO, info_payload("ram")),
    "INFO of nobody": option(Option.INFO, info_payload("nobody")),
    "GO": go(),
    "GO of nobody": go("nobody"),
    "malformed GO": option(Option.GO, b"\1"),
    "STRUCTURED_REPLY": option(Option.STRUCTURED_REPLY),
    "EXTENDED_HEADERS": option(Option.EXTENDED_HEADERS),
    "LIST_META_CONTEXT": option(LIST_CONTEXTS, meta_payload("ram", [])),
    "SET_META_CONTEXT": option(SET_CONTEXTS, meta_payload("ram", [BASE])),
    "unknown": option(77, b"payload"),
}


@pytest.mark.parametrize("said", REVEALING.values(), ids=REVEALING)
def test_where_tls_is_required_other_options_get_tls_reqd_and_learn_nothing(step: int, said: bytes) -> None:
    begun = talk(step, tls=TlsPolicy.REQUIRED)
    assert error_of(begun.say(said)) == OptionReply.ERR_TLS_REQD
    assert b"ram" not in begun.sent
    assert begun.sent[20:] == b"this server requires TLS", "the same words, whatever was asked"
    assert begun.say(option(Option.STARTTLS)) == [ack(Option.STARTTLS)]


@pytest.mark.parametrize("name", [b"ram", b"nobody", b"\0"])
def test_where_tls_is_required_export_name_ends_the_session(step: int, name: bytes) -> None:
    begun = talk(step, tls=TlsPolicy.REQUIRED)
    assert begun.raw(option(Option.EXPORT_NAME, name)) == b""
    assert "requires" in begun.refused or "required" in begun.refused


def test_where_tls_is_required_abort_is_still_acknowledged(step: int) -> None:
    begun = talk(step, tls=TlsPolicy.REQUIRED)
    assert begun.say(option(Option.ABORT)) == [ack(Option.ABORT)]


def test_where_tls_is_required_all_is_told_inside_of_it(step: int) -> None:
    begun = talk(step, tls=TlsPolicy.REQUIRED)
    begun.say(option(Option.STARTTLS))
    secure = after_tls(begun)
    assert len(secure.say(option(Option.LIST))) == 4


# -- limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [Option.LIST, Option.GO, Option.SET_META_CONTEXT, 99])
def test_an_option_of_64_kib_is_looked_at_and_a_longer_one_is_too_big(number: int) -> None:
    begun = talk(0)
    assert error_of(begun.say(option(number, bytes(65536)))) != OptionReply.ERR_TOO_BIG
    assert error_of(begun.say(option(number, bytes(65537)))) == OptionReply.ERR_TOO_BIG
    begun.say(go())
    assert begun.negotiated.export.name == "ram"


def test_an_option_of_4_gib_is_drained_in_small_memory() -> None:
    begun = talk(0)
    assert begun.raw(option(Option.GO, length=0xFFFFFFFF)) == b""
    piece = bytes(MIB)
    for _ in range(4095):
        begun.handshake.receive(piece)
        assert len(begun.handshake.leftover()) == 0
    assert begun.raw(piece[:-1]) == option_reply(Option.GO, OptionReply.ERR_TOO_BIG, b"this option is too long")
    begun.say(go())
    assert begun.negotiated.export.name == "ram"


def test_a_long_option_may_trickle_in() -> None:
    begun = talk(0)
    begun.raw(option(Option.INFO, length=70_000))
    for _ in range(69_999):
        begun.handshake.receive(b"x")
    assert begun.handshake.data_to_send() == b""
    assert error_of(begun.say(b"x")) == OptionReply.ERR_TOO_BIG


def test_the_32nd_option_is_answered_and_no_other(step: int) -> None:
    begun = talk(step)
    assert len(begun.say(option(Option.STRUCTURED_REPLY) * 31)) == 31
    assert len(begun.say(option(Option.LIST))) == 4
    assert "32 options" in begun.refused
    assert begun.raw(go()) == b""


def test_a_name_of_4096_bytes_can_be_had(step: int) -> None:
    begun = talk(step)
    begun.say(go(LONG_NAME))
    assert begun.negotiated.export.name == LONG_NAME


def test_cve_2020_10761_an_unknown_name_of_4096_bytes_is_not_repeated(step: int) -> None:
    begun = structured(step)
    name = "u" * 4096
    for said in (
        option(Option.INFO, info_payload(name)),
        go(name),
        option(LIST_CONTEXTS, meta_payload(name, [])),
        option(SET_CONTEXTS, meta_payload(name, [BASE])),
    ):
        assert error_of(begun.say(said)) == OptionReply.ERR_UNKNOWN
    assert b"uuuu" not in begun.sent


@pytest.mark.parametrize("length", range(20))
def test_nothing_is_answered_before_an_option_is_whole(length: int) -> None:
    begun = talk(0)
    assert begun.raw((IHAVEOPT + u32(Option.LIST) + u32(4) + b"data")[:length]) == b""
    assert begun.handshake.outcome is None
