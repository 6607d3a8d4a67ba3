"""Caps on requests and bytes per second: what they let through, and what they cost those who have none."""

import asyncio
from pathlib import Path

import pytest

from nbdram.access import Rules
from nbdram.config import ExportSettings
from nbdram.protocol.handshake import ReplyMode
from nbdram.protocol.wire import Command, CommandFlag
from nbdram.server.connection import DIRECT_BYTES
from nbdram.server.pace import Admission, Pace
from tests.helpers import ALL_MODES, GIB, KIB, MIB, Served, eventually, request, served
from tests.server.wired import wired

SIMPLE, EXTENDED = ReplyMode.SIMPLE, ReplyMode.EXTENDED


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def capped(*, iops: int = 0, bandwidth: int = 0) -> tuple[Pace, Clock]:
    clock = Clock()
    return Pace(Rules(iops=iops, bandwidth=bandwidth), clock), clock


def admit(pace: Pace, received: bytes, start: int = 0, mode: ReplyMode = SIMPLE) -> Admission:
    return pace.admit(memoryview(received), start, extended=mode is EXTENDED, direct_bytes=DIRECT_BYTES)


def reads(count: int, length: int = 1, mode: ReplyMode = SIMPLE) -> bytes:
    return request(mode, Command.READ, 0, length) * count


@pytest.mark.parametrize("mode", [SIMPLE, EXTENDED])
def test_a_tenth_of_a_seconds_worth_goes_at_once_and_the_rest_at_the_rate(mode: ReplyMode) -> None:
    pace, clock = capped(iops=100)
    each = len(reads(1, mode=mode))
    end, paid, delay = admit(pace, reads(50, mode=mode), mode=mode)
    assert (end, paid) == (10 * each, 10 * each)
    assert delay == pytest.approx(0.01)
    clock.now += 0.055
    assert admit(pace, reads(50, mode=mode), mode=mode).end == 6 * each
    clock.now += 3600
    assert admit(pace, reads(50, mode=mode), mode=mode).end == 10 * each, "what was not used is not saved up for ever"


def test_a_request_larger_than_the_cap_passes_and_is_paid_off_afterwards() -> None:
    pace, clock = capped(bandwidth=MIB)
    end, _, delay = admit(pace, reads(2, 32 * MIB))
    assert end == 28
    assert delay == pytest.approx(31.9, abs=0.01)
    clock.now += delay - 0.1
    assert admit(pace, reads(1, 1)).end == 0
    clock.now += 0.2
    assert admit(pace, reads(1, 1)).end == 28


@pytest.mark.parametrize("mode", [SIMPLE, EXTENDED])
def test_a_length_that_is_only_claimed_makes_nobody_wait(mode: ReplyMode) -> None:
    pace, _ = capped(bandwidth=MIB)
    claimed = request(mode, Command.READ, 0, 2**64 - 1 if mode is EXTENDED else 2**32 - 1)
    assert admit(pace, claimed * 2, mode=mode) == (2 * len(claimed), 2 * len(claimed), 0.0)
    admit(pace, request(SIMPLE, Command.WRITE, 0, 2**32 - 1))
    assert pace.delay_s() < 33, "a WRITE is in debt for more than the maximum"


def test_trims_and_flushes_count_as_requests_but_not_as_bytes() -> None:
    pace, _ = capped(iops=1000, bandwidth=KIB)
    said = request(SIMPLE, Command.TRIM, 0, GIB) + request(SIMPLE, Command.FLUSH) * 98
    assert admit(pace, said) == (len(said), len(said), 0.0)
    assert admit(pace, reads(2, 1)).end == 28


def test_payloads_are_passed_over_and_what_is_not_all_there_is_not_paid() -> None:
    pace, _ = capped(iops=100, bandwidth=GIB)
    write = request(SIMPLE, Command.WRITE, 0, 100, payload=b"\x25" * 100)
    said = write * 3 + write[:50]
    assert admit(pace, said) == (len(said), len(write) * 3, 0.0)
    status = request(EXTENDED, Command.BLOCK_STATUS, 0, 24, flags=CommandFlag.PAYLOAD_LEN, payload=bytes(24))
    assert admit(pace, status * 2 + b"x", mode=EXTENDED) == (len(status) * 2 + 1, len(status) * 2, 0.0)


def test_a_large_write_is_paid_when_it_begins() -> None:
    pace, _ = capped(bandwidth=GIB)
    said = request(SIMPLE, Command.WRITE, 0, 32 * MIB) + bytes(1000)
    assert admit(pace, said) == (len(said), len(said), 0.0)
    assert pace.delay_s() == 0
    for _ in range(4):
        admit(pace, said)
    assert pace.delay_s() > 0


def test_what_was_paid_before_is_not_paid_again() -> None:
    pace, _ = capped(iops=100)
    assert admit(pace, reads(20), start=28 * 15) == (28 * 20, 28 * 20, 0.0)
    assert admit(pace, reads(20), start=28 * 15).end == 28 * 20
    assert admit(pace, reads(20), start=28 * 15).end == 28 * 15


def settings(*, iops: int = 0, bandwidth: int = 0) -> tuple[ExportSettings, ...]:
    return (ExportSettings("ram", GIB, rules=Rules(iops=iops, bandwidth=bandwidth)), ExportSettings("free", GIB))


async def slow(here: Served, count: int) -> float:
    """How long so many small reads take, sent at once."""
    loop = asyncio.get_running_loop()
    async with await here.entered() as client:
        began = loop.time()
        await client.send(b"".join(client.request(Command.READ, 0, 1) for _ in range(count)))
        await client.replies(count)
        return loop.time() - began


async def test_a_capped_export_is_slow_and_the_others_are_not(tmp_path: Path) -> None:
    async with served(tmp_path, exports=settings(iops=1)) as here, await here.entered() as client:
        await client.send(reads_of(client, 1000))
        capped = here.connection()
        await eventually(lambda: capped._pausing is not None)
        async with await here.entered("free") as other:
            for _ in range(1000):
                await other.read(0, 1)
        assert capped.export.counters.operations["read"] < 1000


async def test_all_connections_share_the_caps_of_their_export(tmp_path: Path) -> None:
    async with served(tmp_path, exports=settings(iops=100)) as here:
        times = await asyncio.gather(*(slow(here, 15) for _ in range(4)))
        assert max(times) >= 0.45


@pytest.mark.parametrize("mode", ALL_MODES)
async def test_everything_arrives_in_spite_of_caps(tmp_path: Path, mode: ReplyMode) -> None:
    capped = settings(iops=2000, bandwidth=64 * MIB)
    async with served(tmp_path, exports=capped) as here, await here.entered("ram", mode) as client:
        blocks = {at: bytes([1 + at % 255]) * (1 + at * 997 % 150_000) for at in range(60)}
        said = [client.request(Command.WRITE, at * 256 * KIB, payload=data) for at, data in blocks.items()]
        said += [client.request(Command.TRIM, GIB - MIB, MIB), client.request(9, 0, 1)]
        await client.send_in_pieces(b"".join(said), range(0, sum(map(len, said)), 50_001))
        answers = await client.replies(62)
        assert [answer.error for answer in answers.values() if answer.error] == [22]
        for at, data in blocks.items():
            assert await client.read(at * 256 * KIB, len(data)) == data


async def test_caps_may_come_and_go_while_clients_are_connected(tmp_path: Path) -> None:
    async with served(tmp_path, exports=settings()) as here, await here.entered() as client:
        export, connection = here.server.exports.at("ram"), here.connection()
        await client.read(0, 1)
        export.set_rules(Rules(iops=1))
        connection.follow_pace()
        await client.send(reads_of(client, 3))
        await eventually(lambda: connection._pausing is not None)
        export.set_rules(Rules())
        connection.follow_pace()
        assert len(await client.replies(3)) == 3
        assert "_parse" not in vars(connection)


def reads_of(client: object, count: int) -> bytes:
    return b"".join(client.request(Command.READ, 0, 1) for _ in range(count))  # type: ignore[attr-defined]


async def test_who_waits_for_its_turn_and_hangs_up_leaves_nothing_behind(tmp_path: Path) -> None:
    async with served(tmp_path, exports=settings(iops=1)) as here:
        async with await here.entered() as client:
            await client.send(reads_of(client, 100))
            connection = here.connection()
            await eventually(lambda: connection._pausing is not None)
        await here.all_gone()
        assert connection._pausing
        assert connection._pausing.cancelled()
        assert connection.export.connections == 0


@pytest.mark.parametrize("mode", [SIMPLE, ReplyMode.STRUCTURED])
async def test_without_extended_headers_no_flag_brings_a_payload(mode: ReplyMode) -> None:
    """A WRITE behind one that claims to was cut in its middle, and the rest of its payload was forgotten."""
    async with wired(mode, size=GIB) as (wire, device):
        pace, clock = capped(iops=20)
        wire.connection.export.pace = pace
        wire.connection.follow_pace()
        claiming = wire.client.request(Command.CACHE, 0, DIRECT_BYTES, flags=CommandFlag.PAYLOAD_LEN)
        data = bytes(range(256)) * (DIRECT_BYTES // 128)
        write = wire.client.request(Command.WRITE, 0, payload=data)
        feeding = asyncio.create_task(wire.feed(claiming + write + reads_of(wire.client, 1)))
        await eventually(lambda: wire.connection._pausing is not None)
        clock.now += 1
        await feeding
        assert sorted(answer.error for answer in (await wire.client.replies(3)).values()) == [0, 0, 22]
        assert device.read(0, len(data)) == data


async def test_requests_that_a_full_socket_holds_back_are_paid_once() -> None:
    async with wired(SIMPLE, size=GIB) as (wire, device):
        device.write(0, bytes([1]) * 65536)
        pace, _ = capped(iops=1_000_000)
        wire.connection.export.pace = pace
        wire.connection.follow_pace()
        wire.stop_reading()
        said = b"".join(wire.client.request(Command.READ, 0, 65536) for _ in range(500))
        fed = wire.feed_one(said)
        assert wire.paused
        assert wire.connection._held
        wire.read_again()
        await wire.feed(said[fed:])
        await wire.client.replies(500)
        assert pace._saved[0] == 100_000 - 500
