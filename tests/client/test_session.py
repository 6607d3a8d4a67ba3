"""The small client against servers that break their word; well-behaved ones are in tests/cli."""

import struct
from pathlib import Path

import pytest

from nbdram.client import session as session_module
from nbdram.client.session import Session
from nbdram.config import Endpoint
from nbdram.errors import NbdramError, ProtocolError
from nbdram.protocol.wire import BASE_ALLOCATION, Option, OptionReply, ReplyType
from tests.client.answering import answering
from tests.helpers import GIB, GREETING, MIB, option_reply, u16, u32, u64

SIZE = 8 * GIB
CONTEXT = option_reply(Option.SET_META_CONTEXT, OptionReply.META_CONTEXT, u32(1) + BASE_ALLOCATION.encode())
ENTERED = option_reply(Option.GO, OptionReply.INFO, u16(0) + u64(SIZE) + u16(1)) + option_reply(
    Option.GO, OptionReply.ACK
)
EXTENDED = (
    GREETING
    + option_reply(Option.EXTENDED_HEADERS, OptionReply.ACK)
    + CONTEXT
    + option_reply(Option.SET_META_CONTEXT, OptionReply.ACK)
    + ENTERED
)
STRUCTURED = EXTENDED.replace(
    option_reply(Option.EXTENDED_HEADERS, OptionReply.ACK),
    option_reply(Option.EXTENDED_HEADERS, OptionReply.ERR_UNSUP)
    + option_reply(Option.STRUCTURED_REPLY, OptionReply.ACK),
)


def extended(kind: int, body: bytes, *, length: int | None = None, magic: int = 0x6E8A278C) -> bytes:
    return struct.pack(">IHHQQQ", magic, 1, kind, 1, 0, len(body) if length is None else length) + body


def structured(kind: int, body: bytes, *, done: int = 1) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, done, kind, 1, len(body)) + body


def mapped(directory: Path, answers: bytes) -> list[tuple[int, int, int]]:
    with answering(directory, answers) as endpoint, Session(endpoint) as session:
        export = session.open("ram", (BASE_ALLOCATION,))
        return list(session.map_extents(BASE_ALLOCATION, export.size))


def test_extents_of_several_answers_are_joined(tmp_path: Path) -> None:
    first = u32(1) + struct.pack(">IIII", GIB, 3, GIB, 0)
    second = u32(1) + struct.pack(">II", GIB, 0)
    third = u32(1) + struct.pack(">IIIIII", GIB, 3, 2**31, 3, 2**32 - 1, 3)  # more than was asked for
    answers = b"".join(structured(ReplyType.BLOCK_STATUS, body) for body in (first, second, third))
    assert mapped(tmp_path, STRUCTURED + answers) == [
        (0, GIB, 3),
        (GIB, 2 * GIB, 0),
        (3 * GIB, 5 * GIB, 3),
    ]


def test_extents_may_have_64_bits(tmp_path: Path) -> None:
    body = u32(1) + u32(2) + struct.pack(">QQQQ", SIZE - MIB, 3, MIB, 0)
    answers = EXTENDED + extended(ReplyType.BLOCK_STATUS_EXT, body)
    assert mapped(tmp_path, answers) == [(0, SIZE - MIB, 3), (SIZE - MIB, MIB, 0)]


BROKEN = {
    "another magic": extended(ReplyType.BLOCK_STATUS_EXT, bytes(24), magic=1),
    "a chunk of exbibytes": extended(ReplyType.BLOCK_STATUS_EXT, b"", length=1 << 60),
    "no context": extended(ReplyType.BLOCK_STATUS_EXT, b""),
    "an unknown context": extended(ReplyType.BLOCK_STATUS_EXT, u32(9) + u32(1) + struct.pack(">QQ", SIZE, 0)),
    "half an extent": extended(ReplyType.BLOCK_STATUS_EXT, u32(1) + u32(1) + bytes(8)),
    "an extent of nothing": extended(ReplyType.BLOCK_STATUS_EXT, u32(1) + u32(1) + bytes(16)),
    "no extents": extended(ReplyType.NONE, b""),
}


@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
def test_an_answer_that_breaks_the_protocol_is_told_so(tmp_path: Path, answer: bytes) -> None:
    with pytest.raises(ProtocolError):
        mapped(tmp_path, EXTENDED + answer)


def test_a_servers_refusal_is_told_in_its_own_words(tmp_path: Path) -> None:
    refusal = extended(ReplyType.ERROR, u32(5) + u16(11) + b"no such map")
    with pytest.raises(NbdramError, match="the server refused: no such map"):
        mapped(tmp_path, EXTENDED + refusal)


@pytest.mark.parametrize("length", [0, 10, 18, 30, len(EXTENDED), len(EXTENDED) + 10])
def test_a_server_that_hangs_up_at_any_moment_is_told_so(tmp_path: Path, length: int) -> None:
    whole = EXTENDED + extended(ReplyType.BLOCK_STATUS_EXT, bytes(24))
    with pytest.raises(NbdramError, match="the server hung up"):
        mapped(tmp_path, whole[:length])


def test_a_server_that_says_nothing_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "_TIMEOUT_S", 0.05)
    with (
        answering(tmp_path, b"", hang_up=False) as endpoint,
        pytest.raises(NbdramError, match="the server has not answered for 0 s"),
    ):
        Session(endpoint)


def test_what_is_no_nbd_server_is_told_so(tmp_path: Path) -> None:
    with (
        answering(tmp_path, b"HTTP/1.1 400 Bad Request\r\n\r\n") as endpoint,
        pytest.raises(ProtocolError, match="not an NBD server"),
    ):
        Session(endpoint)


@pytest.mark.parametrize("endpoint", [Endpoint(path="/nowhere/nbd.sock"), Endpoint(host="127.0.0.1", port=1)], ids=str)
def test_nobody_there_is_told_with_the_reason(endpoint: Endpoint) -> None:
    with pytest.raises(NbdramError, match=f"can't reach {endpoint}: .+"):
        Session(endpoint)
