"""What a connection for the kernel must be, and what is not taken for the device that was lost."""

import socket
from dataclasses import replace

import pytest

from nbdram.client.attachment import Attachment
from nbdram.client.dial import Link, WrongExport, check_same, hung_up
from nbdram.protocol.client_handshake import RemoteExport

CLOSED = socket.socket()
CLOSED.close()

KNOWN = Attachment("nbd://host/disk", index=0, size=1 << 30, flags=0x16D, identity="one")


def answer(size: int = 1 << 30, flags: int = 0x16D, identity: str = "one") -> Link:
    return Link(CLOSED, RemoteExport("disk", size, flags), identity)


def is_taken(found: Link, known: Attachment = KNOWN) -> bool:
    try:
        check_same(known, found)
    except WrongExport:
        return False
    return True


def test_the_same_device_is_taken_and_so_is_one_that_grew() -> None:
    assert is_taken(answer())
    assert is_taken(answer(size=2 << 30))


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (answer(identity="two"), "another device under this name"),
        (answer(identity=""), "another device under this name"),
        (answer(size=1 << 29), "has only 512 MiB now"),
        (answer(flags=0x16F), "has other flags now"),
    ],
    ids=["identity", "no identity", "smaller", "flags"],
)
def test_another_device_is_not_taken(found: Link, reason: str) -> None:
    with pytest.raises(WrongExport, match=reason):
        check_same(KNOWN, found)


def test_a_device_whose_identity_and_flags_are_unknown_is_known_by_its_size() -> None:
    unknown = replace(KNOWN, identity="", flags=0)
    assert is_taken(answer(identity="two", flags=0x1), unknown)
    assert not is_taken(answer(size=4096), unknown)


def test_hanging_up_is_seen_without_reading() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"for the kernel")
        assert hung_up([ours]) == []
        theirs.close()
        assert hung_up([ours]) == [ours]
        assert ours.recv(64) == b"for the kernel"
