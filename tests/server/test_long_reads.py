"""READs of more than one part: in one piece for clients that know no chunks, and never held as a whole."""

import errno
import os

import pytest

from nbdram.memory.device import Device
from nbdram.protocol.handshake import ReplyMode
from nbdram.protocol.wire import Command
from tests.helpers import ALL_MODES, CLUSTER, KIB, MIB, PAGE, eventually, request
from tests.memory.evicting import evict
from tests.server.wired import wired

MODES = pytest.mark.parametrize("mode", ALL_MODES, ids=[mode.value for mode in ALL_MODES])
SIZE = 8 * MIB
DATA = b"".join(b"%07d\n" % cluster * (CLUSTER // 8) for cluster in range(SIZE // CLUSTER))


def go_cold(device: Device) -> None:
    device.write(0, DATA)
    for cluster in range(SIZE // CLUSTER):
        assert evict(device, cluster)


def damage(device: Device, cluster: int) -> None:
    """Flip a bit in the first block of a cold image in RAM."""
    at = 2 * cluster * CLUSTER + 40
    (byte,) = os.pread(device.ram.fd, 1, at)
    os.pwrite(device.ram.fd, bytes((byte ^ 4,)), at)


@MODES
async def test_cold_data_are_read_in_order_among_other_answers(mode: ReplyMode) -> None:
    async with wired(mode, size=SIZE) as (wire, device):
        go_cold(device)
        client = wire.client
        asked = [(0, SIZE - PAGE), (3 * MIB, 100), (MIB, 2 * MIB), (5 * MIB, PAGE), (512, 300 * KIB)]
        await wire.feed(b"".join(client.request(Command.READ, at, length) for at, length in asked))
        answers = await client.replies(len(asked))
        for (_, answer), (at, length) in zip(sorted(answers.items()), asked, strict=True):
            assert answer.data == DATA[at : at + length]


@MODES
async def test_a_damaged_image_in_a_long_read_is_an_error_and_the_connection_goes_on(mode: ReplyMode) -> None:
    async with wired(mode, size=SIZE) as (wire, device):
        go_cold(device)
        damage(device, 77)
        await wire.feed(wire.client.request(Command.READ, 0, SIZE) + wire.client.request(Command.READ, 0, 4 * MIB))
        first, second = (answer for _, answer in sorted((await wire.client.replies(2)).items()))
        assert first.error == errno.EIO
        assert (second.error, second.data) == (0, DATA[: 4 * MIB])
        assert not wire.closed


async def test_an_answer_in_one_piece_that_can_not_be_ended_ends_the_connection() -> None:
    async with wired(ReplyMode.SIMPLE, size=SIZE) as (wire, device):
        go_cold(device)
        wire.stop_reading()
        wire.feed_one(request(ReplyMode.SIMPLE, Command.READ, 0, SIZE))
        await eventually(lambda: wire.connection._occupied and bool(wire.connection._unsent))
        damage(device, SIZE // CLUSTER - 1)
        wire.read_again()
        received = await wire.client.rest()
        assert wire.closed
        assert received.startswith(bytes.fromhex("6744669800000000"))
        assert DATA.startswith(received[16:])
        assert len(received) < SIZE


@pytest.mark.parametrize("length", [CLUSTER, 256 * KIB, 4 * MIB])
@MODES
async def test_cold_data_that_nobody_takes_are_held_only_in_part(mode: ReplyMode, length: int) -> None:
    async with wired(mode, size=SIZE) as (wire, device):
        go_cold(device)
        device.budget.set_limit(device.budget.used_pages * PAGE)  # nothing becomes resident
        wire.stop_reading()
        for number in range(64):
            if not wire.paused:
                wire.feed_one(request(mode, Command.READ, number * length % SIZE, length, cookie=number))
        await eventually(lambda: bool(wire.connection._unsent))
        assert sum(map(len, wire.connection._unsent)) <= 512 * KIB + PAGE


async def test_only_what_is_punched_of_a_waiting_answer_is_copied() -> None:
    async with wired(ReplyMode.SIMPLE, size=SIZE) as (wire, device):
        device.write(0, DATA)
        wire.stop_reading()
        await wire.feed(wire.client.request(Command.READ, 0, SIZE))
        last = SIZE // CLUSTER - 1
        overhead = device.budget.overhead_pages
        for cluster in (last, last - 2, last, 0):  # the first has been sent
            list(device.trim(cluster * CLUSTER, (cluster + 1) * CLUSTER))
        assert device.budget.overhead_pages - overhead == 2 * CLUSTER // PAGE
        copied = [piece for piece in wire.connection._unsent if isinstance(piece.obj, bytes)]  # type: ignore[union-attr]
        assert list(map(len, copied)) == [CLUSTER, CLUSTER]
        wire.read_again()
        (answer,) = (await wire.client.replies(1)).values()
        assert answer.data == DATA


async def test_an_answer_that_stands_behind_a_long_one_keeps_its_bytes_when_they_are_punched() -> None:
    async with wired(ReplyMode.SIMPLE, size=SIZE) as (wire, device):
        device.write(0, DATA[: 2 * CLUSTER])
        with wire.connection.occupied() as send:
            send([b"first"])
            wire.connection.send([device.hot_view[PAGE : CLUSTER + PAGE]])
            for _ in device.trim(0, CLUSTER):
                pass
            for _ in device.trim(CLUSTER, 2 * CLUSTER):
                pass
        assert await wire.client.receive(5) == b"first"
        assert await wire.client.receive(CLUSTER) == DATA[PAGE : CLUSTER + PAGE]
        assert wire.connection not in device.senders or wire.connection._unsent
