"""Large WRITEs over memory that is there: one behind the other they leave no record, and are as good as all others."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdram.access import Rules
from nbdram.memory.incoming import Incoming
from nbdram.memory.layout import Reference
from nbdram.protocol.handshake import ReplyMode
from nbdram.protocol.wire import Command, CommandFlag
from nbdram.server import connection
from nbdram.server.connection import DIRECT_BYTES, Connection
from nbdram.server.pace import Pace
from tests.helpers import ALL_MODES, CLUSTER, KIB, MIB, PAGE, Client, Served, eventually, hot_pages, served
from tests.server.test_lingering import send_all

LENGTH = 300 * KIB  # more than one recv brings
ENOSPC, EPERM = 28, 1
MODES = pytest.mark.parametrize("mode", ALL_MODES, ids=[mode.value for mode in ALL_MODES])

OLD, NEW = (bytes(range(1, 251)) * 16_000)[: 3 * MIB], (bytes(range(250, 0, -1)) * 16_000)[: 3 * MIB]


@pytest.fixture(autouse=True)
def overwritten(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every connection receives all that comes without a pause; the offsets of WRITEs that left no record."""
    monkeypatch.setattr(connection, "_ALONE_BATCHES", 0)
    monkeypatch.setattr(connection, "_LINGER_S", 1.0)
    monkeypatch.setattr(connection, "_SPIN_S", 0.1)
    offsets: list[int] = []
    overwrite = Connection._overwrite

    def spy(self: Connection, deadline: float) -> int:
        assert not self._stalled
        offset = self._unpack(self._buffer, 0)[4]
        following = overwrite(self, deadline)
        if following >= 0 and self._incoming is None:
            offsets.append(offset)
        return following

    monkeypatch.setattr(Connection, "_overwrite", spy)
    return offsets


async def stream(client: Client, *requests: bytes) -> None:
    """Send all of it as fast as the server takes it."""
    await asyncio.to_thread(send_all, client.writer.get_extra_info("socket").fileno(), b"".join(requests))


def write(client: Client, offset: int, content: bytes = NEW, length: int = LENGTH) -> bytes:
    return client.request(Command.WRITE, offset, payload=content[offset : offset + length])


def remaining(server: Served) -> tuple[int, int] | None:
    """Of the only WRITE that is under way."""
    under_way = list(server.device().incoming)
    return under_way[0].remaining if len(under_way) == 1 else None


def fill(server: Served) -> None:
    server.device().write(0, OLD)


@asynccontextmanager
async def filled(directory: Path, mode: ReplyMode) -> AsyncIterator[tuple[Served, Client]]:
    """A server whose device has old data, and a client of it."""
    async with served(directory) as server, await server.entered("ram", mode) as client:
        fill(server)
        yield server, client


@MODES
@pytest.mark.parametrize("shift", [0, 7])
async def test_they_are_stored_and_leave_no_record(
    tmp_path: Path, mode: ReplyMode, shift: int, overwritten: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    begin = Incoming.__init__

    def spy(self: Incoming, device: object, offset: int, *others: object) -> None:
        begun.append(offset)
        begin(self, device, offset, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(Incoming, "__init__", spy)
    async with filled(tmp_path, mode) as (server, client):
        references = server.device().references
        references[: 3 * MIB // CLUSTER] = bytes((Reference.IDLE,)) * (3 * MIB // CLUSTER)
        places = [number * LENGTH + shift for number in range(10)]
        await stream(client, *(write(client, at) for at in places))
        answers = await client.replies(len(places))
        assert [answer.error for answer in answers.values()] == [0] * len(places)
        end = places[-1] + LENGTH
        assert set(references[: end // CLUSTER]) == {Reference.TOUCHED}
        assert server.device().read(0, 3 * MIB) == OLD[:shift] + NEW[shift:end] + OLD[end:]
        assert sorted(begun + overwritten) == places
        assert len(overwritten) >= 5
        counters = server.connection().export.counters
        assert (counters.operations["write"], counters.written_bytes) == (len(places), len(places) * LENGTH)


@MODES
async def test_the_rest_of_one_may_come_later(tmp_path: Path, mode: ReplyMode) -> None:
    async with filled(tmp_path, mode) as (server, client), await server.entered("ram", mode) as other:
        device = server.device()
        for arrived in (0, 1, 100_000, LENGTH - 1):
            device.write(MIB, OLD[MIB : MIB + LENGTH])
            late = write(client, MIB)
            header = len(late) - LENGTH
            await stream(client, write(client, 0), late[: header + arrived])
            at = MIB + arrived
            await eventually(lambda: remaining(server) == (at, MIB + LENGTH))  # noqa: B023, it is awaited here
            assert await other.read(MIB, LENGTH) == NEW[MIB:at] + OLD[at : MIB + LENGTH]
            await stream(client, late[header + arrived :])
            assert len(await client.replies(2)) == 2
            assert await other.read(MIB, LENGTH) == NEW[MIB : MIB + LENGTH]
            assert not device.incoming


@MODES
async def test_what_is_trimmed_before_the_rest_comes_is_paid_for_again(tmp_path: Path, mode: ReplyMode) -> None:
    async with filled(tmp_path, mode) as (server, client), await server.entered("ram", mode) as other:
        device = server.device()
        late = write(client, MIB)
        cut = len(late) - 100_000
        await stream(client, write(client, 0), late[:cut])
        await eventually(lambda: len(device.incoming) == 1)
        assert (await other.call(Command.TRIM, 0, 3 * MIB)).error == 0
        await stream(client, late[cut:])
        assert len(await client.replies(2)) == 2
        stop = MIB + LENGTH
        since = (stop - 100_000) // PAGE * PAGE
        found = device.read(0, 3 * MIB)
        assert found[since:stop] == NEW[since:stop]
        assert not any(found[:since])
        assert not any(found[stop:])
        assert device.resident_pages == hot_pages(device) == (stop - since) // PAGE


@MODES
async def test_a_client_may_vanish_in_the_middle_of_one(tmp_path: Path, mode: ReplyMode) -> None:
    async with served(tmp_path) as server:
        fill(server)
        device = server.device()
        async with await server.entered("ram", mode) as client:
            await stream(client, write(client, 0), write(client, MIB)[:-100_000])
        await server.all_gone()
        end = MIB + LENGTH - 100_000
        assert device.read(0, 3 * MIB) == NEW[:LENGTH] + OLD[LENGTH:MIB] + NEW[MIB:end] + OLD[end:]
        assert not device.incoming
        assert device.resident_pages == hot_pages(device) == 3 * MIB // PAGE


@MODES
async def test_zeros_become_holes(tmp_path: Path, mode: ReplyMode, overwritten: list[int]) -> None:
    async with filled(tmp_path, mode) as (server, client):
        device = server.device()
        zeros = client.request(Command.WRITE, MIB + PAGE, payload=bytes(5 * CLUSTER))
        # Begins with zeros, and is none.
        almost = client.request(Command.WRITE, 2 * MIB, payload=(bytes(CLUSTER - 1) + b"x") * 4)
        await stream(client, write(client, 0), zeros, almost)
        assert len(await client.replies(3)) == 3
        assert MIB + PAGE in overwritten
        assert [device.word(MIB // CLUSTER + number) != 0 for number in range(7)] == [True, *4 * [False], True, True]
        assert device.resident_pages == hot_pages(device) == (3 * MIB - 4 * CLUSTER) // PAGE
        end = MIB + PAGE + 5 * CLUSTER
        assert device.read(MIB, MIB) == OLD[MIB : MIB + PAGE] + bytes(5 * CLUSTER) + OLD[end : 2 * MIB]
        assert device.read(2 * MIB, 4 * CLUSTER) == (bytes(CLUSTER - 1) + b"x") * 4


@MODES
async def test_any_other_request_may_follow(tmp_path: Path, mode: ReplyMode, overwritten: list[int]) -> None:
    async with served(tmp_path, "ram=4M") as server, await server.entered("ram", mode) as client:
        fill(server)
        payload = NEW[:LENGTH]
        following = {
            "a READ": (client.request(Command.READ, MIB, LENGTH), 0),
            "a small one": (client.request(Command.WRITE, 2 * MIB, payload=payload[:PAGE]), 0),
            "a TRIM": (client.request(Command.TRIM, 0, PAGE), 0),
            "a FLUSH": (client.request(Command.FLUSH), 0),
            "one with FUA": (client.request(Command.WRITE, 2 * MIB, payload=payload, flags=CommandFlag.FUA), 0),
            "one to a hole": (client.request(Command.WRITE, 3 * MIB, payload=payload), 0),
            "one that ends behind the end": (client.request(Command.WRITE, 4 * MIB - PAGE, payload=payload), ENOSPC),
            "one with a flag that has no meaning": (
                client.request(Command.WRITE, 2 * MIB, payload=payload, flags=1 << 9),
                22,
            ),
        }
        for name, (request, error) in following.items():
            await stream(client, write(client, 0), write(client, MIB), request, write(client, MIB + LENGTH))
            answers = await client.replies(4)
            assert [answer.error for answer in answers.values() if answer.error] == [error] * bool(error), name
            assert server.device().read(MIB, 2 * LENGTH) == NEW[MIB : MIB + 2 * LENGTH], name
            assert MIB in overwritten, name
            overwritten.clear()
            fill(server)
        assert server.device().read(3 * MIB, LENGTH) == payload
        await client.send(client.request(Command.DISC))


@MODES
async def test_what_is_no_request_ends_the_connection(tmp_path: Path, mode: ReplyMode, overwritten: list[int]) -> None:
    async with filled(tmp_path, mode) as (server, client):
        almost = bytearray(write(client, 2 * MIB))
        almost[0] ^= 1
        await stream(client, write(client, 0), write(client, MIB), bytes(almost[: DIRECT_BYTES // 2]))
        await server.all_gone()
        assert overwritten == [MIB]
        assert (
            server.device().read(0, 3 * MIB)
            == NEW[:LENGTH] + OLD[LENGTH:MIB] + NEW[MIB : MIB + LENGTH] + OLD[MIB + LENGTH :]
        )


@MODES
async def test_who_may_write_no_more_is_refused(tmp_path: Path, mode: ReplyMode, overwritten: list[int]) -> None:
    async with filled(tmp_path, mode) as (server, client):
        first = write(client, 0)
        await stream(client, first[:10_000])
        await eventually(lambda: remaining(server) is not None)
        server.connection().export.read_only = True
        await stream(client, first[10_000:], write(client, MIB))
        assert sorted(answer.error for answer in (await client.replies(2)).values()) == [0, EPERM]
        assert not overwritten
        assert server.device().read(MIB, LENGTH) == OLD[MIB : MIB + LENGTH]


@MODES
async def test_caps_hold_for_them(tmp_path: Path, mode: ReplyMode, overwritten: list[int]) -> None:
    async with filled(tmp_path, mode) as (server, client):
        server.connection().export.pace = Pace(Rules(bandwidth=4 * MIB))
        server.connection().follow_pace()
        await stream(client, *(write(client, number * LENGTH) for number in range(4)))
        assert len(await client.replies(4)) == 4
        assert not overwritten, "not paid for"


@pytest.mark.parametrize("together", [2, 100], ids=["as soon as there are some", "when nothing more comes in"])
async def test_nothing_is_received_from_who_does_not_take_replies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    stalled: list[Connection] = []
    then: list[int] = []  # what the recv brought during which that happened
    send, receive_soon = Connection._send, Connection._receive_soon

    def full(self: Connection, buffers: list[connection.Buffer]) -> None:
        """The first time, as if the socket took nothing."""
        if stalled:
            send(self, buffers)
            return
        stalled.append(self)
        self._unsent.extend(buffers)
        self._stall()

    def receive(self: Connection, places: tuple[memoryview, ...], deadline: float) -> int:
        received = receive_soon(self, places, deadline)
        if self._stalled:
            then.append(received)
        return received

    def in_two_pieces(fd: int, first: bytes, second: bytes) -> None:
        send_all(fd, first)
        time.sleep(0.03)  # replies are sent when nothing more comes in
        send_all(fd, second)

    async with filled(tmp_path, ReplyMode.SIMPLE) as (server, client):
        monkeypatch.setattr(connection, "_MAX_DONE", together)
        monkeypatch.setattr(Connection, "_send", full)
        monkeypatch.setattr(Connection, "_receive_soon", receive)
        first = b"".join(write(client, number * LENGTH) for number in range(3))
        second = b"".join(write(client, number * LENGTH) for number in range(3, 10))
        fd = client.writer.get_extra_info("socket").fileno()
        sending = asyncio.create_task(asyncio.to_thread(in_two_pieces, fd, first[:-1000], first[-1000:] + second))
        await eventually(lambda: bool(stalled))
        arrived = remaining(server)
        await asyncio.sleep(0.2)
        assert remaining(server) == arrived
        assert not any(then)
        stalled[0]._watch_writable()
        await sending
        assert len(await client.replies(10)) == 10
        assert server.device().read(0, 10 * LENGTH) == NEW[: 10 * LENGTH]
