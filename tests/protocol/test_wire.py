"""Numbers and layouts against the specification (doc/proto.md), written down a second time."""

import struct
from enum import IntEnum

import pytest

from nbdram.protocol import wire

MAGICS = {
    "NBDMAGIC": b"NBDMAGIC",
    "IHAVEOPT": b"IHAVEOPT",
    "OPTION_REPLY_MAGIC": bytes.fromhex("0003e889045565a9"),
    "REQUEST_MAGIC": bytes.fromhex("25609513"),
    "SIMPLE_REPLY_MAGIC": bytes.fromhex("67446698"),
    "STRUCTURED_REPLY_MAGIC": bytes.fromhex("668e33ef"),
    "EXTENDED_REQUEST_MAGIC": bytes.fromhex("21e41c71"),
    "EXTENDED_REPLY_MAGIC": bytes.fromhex("6e8a278c"),
}

NUMBERS: dict[type[IntEnum], dict[str, int]] = {
    wire.Option: {
        "EXPORT_NAME": 1,
        "ABORT": 2,
        "LIST": 3,
        "STARTTLS": 5,
        "INFO": 6,
        "GO": 7,
        "STRUCTURED_REPLY": 8,
        "LIST_META_CONTEXT": 9,
        "SET_META_CONTEXT": 10,
        "EXTENDED_HEADERS": 11,
    },
    wire.OptionReply: {
        "ACK": 1,
        "SERVER": 2,
        "INFO": 3,
        "META_CONTEXT": 4,
        "ERR_UNSUP": 0x80000001,
        "ERR_POLICY": 0x80000002,
        "ERR_INVALID": 0x80000003,
        "ERR_PLATFORM": 0x80000004,
        "ERR_TLS_REQD": 0x80000005,
        "ERR_UNKNOWN": 0x80000006,
        "ERR_SHUTDOWN": 0x80000007,
        "ERR_BLOCK_SIZE_REQD": 0x80000008,
        "ERR_TOO_BIG": 0x80000009,
        "ERR_EXT_HEADER_REQD": 0x8000000A,
    },
    wire.Info: {"EXPORT": 0, "NAME": 1, "DESCRIPTION": 2, "BLOCK_SIZE": 3},
    wire.Command: {
        "READ": 0,
        "WRITE": 1,
        "DISC": 2,
        "FLUSH": 3,
        "TRIM": 4,
        "CACHE": 5,
        "WRITE_ZEROES": 6,
        "BLOCK_STATUS": 7,
    },
    wire.ReplyType: {
        "NONE": 0,
        "OFFSET_DATA": 1,
        "OFFSET_HOLE": 2,
        "BLOCK_STATUS": 5,
        "BLOCK_STATUS_EXT": 6,
        "ERROR": 0x8001,
        "ERROR_OFFSET": 0x8002,
    },
    wire.Error: {
        "OK": 0,
        "EPERM": 1,
        "EIO": 5,
        "ENOMEM": 12,
        "EINVAL": 22,
        "ENOSPC": 28,
        "EOVERFLOW": 75,
        "ENOTSUP": 95,
        "ESHUTDOWN": 108,
    },
}

BITS = {
    wire.HandshakeFlag: ["FIXED_NEWSTYLE", "NO_ZEROES"],
    wire.TransmissionFlag: [
        "HAS_FLAGS",
        "READ_ONLY",
        "SEND_FLUSH",
        "SEND_FUA",
        "ROTATIONAL",
        "SEND_TRIM",
        "SEND_WRITE_ZEROES",
        "SEND_DF",
        "CAN_MULTI_CONN",
        "SEND_RESIZE",
        "SEND_CACHE",
        "SEND_FAST_ZERO",
        "BLOCK_STATUS_PAYLOAD",
    ],
    wire.CommandFlag: ["FUA", "NO_HOLE", "DF", "REQ_ONE", "FAST_ZERO", "PAYLOAD_LEN"],
}

LAYOUTS = {
    "GREETING": ">8s8sH",
    "CLIENT_FLAGS": ">I",
    "OPTION_HEADER": ">8sII",
    "OPTION_REPLY_HEADER": ">8sIII",
    "EXPORT_NAME_REPLY": ">QH",
    "INFO_EXPORT": ">HQH",
    "INFO_BLOCK_SIZE": ">HIII",
    "REQUEST": ">4sHHQQI",
    "EXTENDED_REQUEST": ">4sHHQQQ",
    "SIMPLE_REPLY": ">4sIQ",
    "STRUCTURED_REPLY": ">4sHHQI",
    "EXTENDED_REPLY": ">4sHHQQQ",
}


@pytest.mark.parametrize("name", MAGICS)
def test_magics_are_those_of_the_specification(name: str) -> None:
    raw = MAGICS[name]
    assert getattr(wire, name) == int.from_bytes(raw, "big")


@pytest.mark.parametrize("numbers", NUMBERS)
def test_numbers_are_those_of_the_specification(numbers: type[IntEnum]) -> None:
    assert {member.name: member.value for member in numbers} == NUMBERS[numbers]


@pytest.mark.parametrize("flags", BITS)
def test_flags_are_the_bits_of_the_specification(flags: type[wire.HandshakeFlag]) -> None:
    assert [member.name for member in flags] == BITS[flags]
    assert [member.value for member in flags] == [1 << bit for bit in range(len(BITS[flags]))]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_have_the_size_that_the_specification_gives_them(name: str) -> None:
    assert getattr(wire, name).size == struct.calcsize(LAYOUTS[name])


def test_the_done_flag_and_the_port_are_those_of_the_specification() -> None:
    assert wire.REPLY_FLAG_DONE == 1
    assert wire.DEFAULT_PORT == 10809
    assert (wire.STATE_HOLE, wire.STATE_ZERO) == (1, 2)


def test_a_string_of_4096_bytes_is_accepted_and_one_more_is_not() -> None:
    assert wire.check_string(b"x" * 4096) == "x" * 4096
    with pytest.raises(ValueError, match="4097"):
        wire.check_string(b"x" * 4097)


@pytest.mark.parametrize("raw", [b"a\0b", b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80"])
def test_strings_with_nul_or_bad_utf8_are_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"NUL|utf-8"):
        wire.check_string(raw)


def test_ids_of_contexts_are_unique_and_not_zero() -> None:
    ids = list(wire.CONTEXT_IDS.values())
    assert len(set(ids)) == len(ids)
    assert 0 not in ids
