"""Replies of the transmission phase, byte for byte as the specification lays them out."""

import errno

import pytest

from nbdram.protocol.handshake import ReplyMode
from nbdram.protocol.replies import nbd_error, replies_for
from nbdram.protocol.wire import Error
from tests.helpers import CHUNK_MODES

COOKIE = 0x1122334455667788
OFFSET = 0x00000001_00002000
START = 0x00000001_00003000

_SIMPLE = "67446698"
_STRUCTURED = "668e33ef"
_EXTENDED = "6e8a278c"
_COOKIE = "1122334455667788"
_OFFSET = "0000000100002000"
_START = "0000000100003000"

SIMPLE, STRUCTURED, EXTENDED = (replies_for(mode) for mode in ReplyMode)


def hexed(*pieces: str) -> bytes:
    return bytes.fromhex("".join(pieces))


@pytest.mark.parametrize("mode", ReplyMode)
def test_each_mode_has_its_replies(mode: ReplyMode) -> None:
    assert replies_for(mode).mode is mode


# -- simple ------------------------------------------------------------------------------------------


def test_simple_success_is_sixteen_bytes() -> None:
    assert SIMPLE.done(COOKIE, OFFSET) == hexed(_SIMPLE, "00000000", _COOKIE)
    assert SIMPLE.none(COOKIE, OFFSET) == SIMPLE.done(COOKIE, OFFSET)


def test_simple_error_has_a_number_and_no_text() -> None:
    assert SIMPLE.error(COOKIE, OFFSET, errno.ENOSPC, "full") == hexed(_SIMPLE, "0000001c", _COOKIE)


def test_simple_read_is_a_header_that_the_payload_follows() -> None:
    assert SIMPLE.data(COOKIE, OFFSET, 4096, OFFSET, last=True) == hexed(_SIMPLE, "00000000", _COOKIE)


def test_simple_replies_know_neither_holes_nor_block_status() -> None:
    with pytest.raises(AssertionError):
        SIMPLE.hole(COOKIE, OFFSET, START, 4096, last=True)
    with pytest.raises(AssertionError):
        SIMPLE.block_status(COOKIE, OFFSET, 1, [(4096, 0)], last=True)


# -- structured --------------------------------------------------------------------------------------


def test_structured_success_without_content_is_a_simple_reply() -> None:
    assert STRUCTURED.done(COOKIE, OFFSET) == hexed(_SIMPLE, "00000000", _COOKIE)


def test_structured_none_is_one_empty_last_chunk() -> None:
    assert STRUCTURED.none(COOKIE, OFFSET) == hexed(_STRUCTURED, "0001", "0000", _COOKIE, "00000000")


def test_structured_error_has_a_number_and_a_text() -> None:
    expected = hexed(_STRUCTURED, "0001", "8001", _COOKIE, "0000000a", "0000001c", "0004") + b"full"
    assert STRUCTURED.error(COOKIE, OFFSET, errno.ENOSPC, "full") == expected


@pytest.mark.parametrize(("last", "flags"), [(False, "0000"), (True, "0001")])
def test_structured_data_counts_its_offset_and_the_payload_that_follows(last: bool, flags: str) -> None:
    expected = hexed(_STRUCTURED, flags, "0001", _COOKIE, "00001008", _START)
    assert STRUCTURED.data(COOKIE, OFFSET, 4096, START, last=last) == expected


@pytest.mark.parametrize(("last", "flags"), [(False, "0000"), (True, "0001")])
def test_structured_hole_is_an_offset_and_a_length(last: bool, flags: str) -> None:
    expected = hexed(_STRUCTURED, flags, "0002", _COOKIE, "0000000c", _START, "00001000")
    assert STRUCTURED.hole(COOKIE, OFFSET, START, 4096, last=last) == expected


def test_structured_block_status_is_a_context_and_its_extents() -> None:
    found = STRUCTURED.block_status(COOKIE, OFFSET, 7, [(65536, 0), (0xFFFFF000, 3)], last=True)
    extents = "00010000" + "00000000" + "fffff000" + "00000003"
    assert found == hexed(_STRUCTURED, "0001", "0005", _COOKIE, "00000014", "00000007", extents)


# -- extended ----------------------------------------------------------------------------------------


def test_extended_success_is_a_chunk_that_echoes_the_offset() -> None:
    expected = hexed(_EXTENDED, "0001", "0000", _COOKIE, _OFFSET, "0000000000000000")
    assert EXTENDED.done(COOKIE, OFFSET) == expected
    assert EXTENDED.none(COOKIE, OFFSET) == expected


def test_extended_error_has_a_number_and_a_text() -> None:
    head = hexed(_EXTENDED, "0001", "8001", _COOKIE, _OFFSET, "000000000000000a")
    assert EXTENDED.error(COOKIE, OFFSET, errno.EPERM, "nope") == head + hexed("00000001", "0004") + b"nope"


def test_extended_data_echoes_the_offset_of_the_request_not_of_the_chunk() -> None:
    expected = hexed(_EXTENDED, "0000", "0001", _COOKIE, _OFFSET, "0000000000001008", _START)
    assert EXTENDED.data(COOKIE, OFFSET, 4096, START, last=False) == expected


def test_extended_hole_has_a_length_of_32_bits() -> None:
    expected = hexed(_EXTENDED, "0001", "0002", _COOKIE, _OFFSET, "000000000000000c", _START, "00001000")
    assert EXTENDED.hole(COOKIE, OFFSET, START, 4096, last=True) == expected


def test_extended_block_status_counts_its_extents_and_has_64_bits_for_each() -> None:
    found = EXTENDED.block_status(COOKIE, OFFSET, 7, [(1 << 40, 3), (4096, 0)], last=True)
    extents = "0000010000000000" + "0000000000000003" + "0000000000001000" + "0000000000000000"
    length = "0000000000000028"
    assert found == hexed(_EXTENDED, "0001", "0006", _COOKIE, _OFFSET, length, "00000007", "00000002", extents)


# -- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, 0),
        (errno.EPERM, 1),
        (errno.EACCES, 1),
        (errno.EROFS, 1),
        (errno.EIO, 5),
        (errno.ENOMEM, 12),
        (errno.EINVAL, 22),
        (errno.ENOSPC, 28),
        (errno.EDQUOT, 28),
        (errno.EFBIG, 28),
        (errno.EOVERFLOW, 75),
        (errno.ENOTSUP, 95),
        (errno.EOPNOTSUPP, 95),
        (errno.ESHUTDOWN, 108),
        (errno.EBADF, 5),
        (errno.ECONNRESET, 5),
        (9999, 5),
        (-1, 5),
    ],
)
def test_an_errno_becomes_the_nearest_error_of_the_protocol(number: int, expected: int) -> None:
    assert nbd_error(number) == expected


@pytest.mark.parametrize("mode", ReplyMode)
def test_an_error_that_the_protocol_does_not_know_goes_out_as_eio(mode: ReplyMode) -> None:
    assert b"\0\0\0\5" in replies_for(mode).error(COOKIE, OFFSET, errno.EBADF, "")


@pytest.mark.parametrize("mode", CHUNK_MODES)
def test_the_text_of_an_error_stays_within_the_limit_for_strings(mode: ReplyMode) -> None:
    reply = replies_for(mode).error(COOKIE, OFFSET, Error.EIO, "x" * 5000)
    assert reply.endswith(b"\0\0\0\5" + b"\x10\x00" + b"x" * 4096)
    assert reply.count(b"x") == 4096
