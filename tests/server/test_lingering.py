"""A connection that is alone takes more requests right from its socket: nothing is lost, mixed up or left waiting."""

import asyncio
import itertools
import os
import select
from pathlib import Path

import pytest

from nbdram.protocol.handshake import ReplyMode
from nbdram.protocol.wire import Command
from nbdram.server import connection
from nbdram.server.connection import DIRECT_BYTES, Connection
from tests.helpers import ALL_MODES, KIB, MIB, PAGE, PATIENCE_S, Client, served

MODES = pytest.mark.parametrize("mode", ALL_MODES, ids=[mode.value for mode in ALL_MODES])


@pytest.fixture(autouse=True)
def headers_along(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every connection lingers at once, and as long as there is something to receive; the lengths of headers, or of
    parts of one, that came along with payloads."""
    monkeypatch.setattr(connection, "_ALONE_BATCHES", 0)
    monkeypatch.setattr(connection, "_LINGER_S", 1.0)
    lengths: list[int] = []
    next_header = Connection._next_header

    def spy(self: Connection, length: int, deadline: float) -> None:
        lengths.append(length)
        next_header(self, length, deadline)

    monkeypatch.setattr(Connection, "_next_header", spy)
    return lengths


def send_all(fd: int, stream: bytes) -> None:
    """As a client in another process would: while the server receives."""
    rest = memoryview(stream)
    while rest:
        select.select([], [fd], [], PATIENCE_S)
        rest = rest[os.write(fd, rest) :]


async def write_and_read_back(client: Client, pieces: list[tuple[int, bytes]], *, cut: int = 0) -> None:
    """All WRITEs in one go, the first `cut` bytes of them before the others."""
    stream = b"".join(client.request(Command.WRITE, offset, payload=content) for offset, content in pieces)
    await client.send(stream[:cut])
    await client.send(stream[cut:])
    answers = await client.replies(len(pieces))
    assert [answer.error for answer in answers.values()] == [0] * len(pieces)
    for offset, content in pieces:
        assert await client.read(offset, len(content)) == content


@MODES
@pytest.mark.parametrize("length", [DIRECT_BYTES, DIRECT_BYTES + 1, 100 * KIB, 3 * MIB])
async def test_large_writes_may_follow_each_other_without_a_gap(tmp_path: Path, mode: ReplyMode, length: int) -> None:
    async with served(tmp_path) as server, await server.entered("ram", mode) as client:
        pieces = [(number * 4 * MIB + 7, bytes((number + 1,)) * length) for number in range(5)]
        for again in (1, 2):  # pages that are new, and pages that are there
            pieces = [(offset, bytes(a ^ again for a in content[:64]) + content[64:]) for offset, content in pieces]
            await write_and_read_back(client, pieces, cut=again * 50_000)
        assert not server.device().incoming


@MODES
async def test_a_payload_brings_the_next_header_along(
    tmp_path: Path, mode: ReplyMode, headers_along: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(tmp_path) as server, await server.entered("ram", mode) as client:
        pieces = [(number * 100 * KIB, bytes((number + 1,)) * 100 * KIB) for number in range(200)]
        stream = b"".join(client.request(Command.WRITE, offset, payload=content) for offset, content in pieces)
        with monkeypatch.context() as while_sending:
            while_sending.setattr(connection, "_SPIN_S", 0.1)
            await asyncio.to_thread(send_all, client.writer.get_extra_info("socket").fileno(), stream)
        assert len(await client.replies(200)) == 200
        assert headers_along
        assert all([await client.read(offset, len(content)) == content for offset, content in pieces])


@MODES
async def test_a_header_that_comes_along_in_part_is_put_together(tmp_path: Path, mode: ReplyMode) -> None:
    async with served(tmp_path) as server, await server.entered("ram", mode) as client:
        pieces = [(number * MIB, bytes((number + 1,)) * DIRECT_BYTES) for number in range(3)]
        request_bytes = len(client.request(Command.WRITE, 0, payload=b"x")) - 1
        for part in (1, request_bytes - 1):
            await write_and_read_back(client, pieces, cut=request_bytes + DIRECT_BYTES + part)


@MODES
async def test_large_writes_are_acknowledged_before_a_disconnect(tmp_path: Path, mode: ReplyMode) -> None:
    async with served(tmp_path) as server, await server.entered("ram", mode) as client:
        writes = [client.request(Command.WRITE, n * MIB, payload=b"w" * DIRECT_BYTES) for n in range(2)]
        await client.send(b"".join(writes) + client.request(Command.DISC))
        assert len(await client.replies(2)) == 2
        assert await client.reader.read() == b""


async def test_a_payload_that_is_refused_is_passed_over(tmp_path: Path) -> None:
    async with served(tmp_path, "ram=1M") as server, await server.entered() as client:
        large = [(MIB - DIRECT_BYTES, b"a" * DIRECT_BYTES), (MIB - PAGE, b"b" * DIRECT_BYTES), (0, b"c" * DIRECT_BYTES)]
        await client.send(b"".join(client.request(Command.WRITE, offset, payload=data) for offset, data in large))
        errors = [answer.error for _, answer in sorted((await client.replies(3)).items())]
        assert errors == [0, 28, 0]
        assert await client.read(MIB - PAGE, PAGE) == b"a" * PAGE


@MODES
async def test_two_clients_take_turns(tmp_path: Path, mode: ReplyMode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_ALONE_BATCHES", 32)
    async with (
        served(tmp_path) as server,
        await server.entered("ram", mode) as one,
        await server.entered("ram", mode) as other,
    ):
        lingered: list[str] = []
        monkeypatch.setattr(Connection, "_linger", lambda self: lingered.append(self.peer))
        for _ in range(40):
            await one.read(0, 512)
            await other.read(0, 512)
        assert not lingered
        for _ in range(40):
            await one.read(0, 512)
        assert lingered


async def test_others_have_their_turn_after_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a client that writes without a pause the loop itself would take 32 times as much, and wait as often."""
    monkeypatch.setattr(connection, "_LINGER_S", 0.0)
    happened: list[str] = []
    linger = Connection._linger

    def spy(self: Connection) -> None:
        happened.append("lingered")
        linger(self)

    async def others() -> None:
        while True:
            happened.append("others")
            await asyncio.sleep(0)

    monkeypatch.setattr(Connection, "_linger", spy)
    async with served(tmp_path) as server, await server.entered() as client:
        writes = [client.request(Command.WRITE, 0, payload=b"w" * DIRECT_BYTES) for _ in range(200)]
        turns = asyncio.create_task(others())
        await asyncio.to_thread(send_all, client.writer.get_extra_info("socket").fileno(), b"".join(writes))
        assert len(await client.replies(200)) == 200
        turns.cancel()
    assert happened.count("lingered") > 50
    assert all("others" in pair for pair in itertools.pairwise(happened))
