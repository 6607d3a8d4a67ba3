"""The hot loop and its plain twins, `Device.read` and `Device.write`, must agree on bytes and on bookkeeping.

A READ and a WRITE behind it that are in flight together may be served in either order, so no batch here has both of
the same bytes; a READ behind a WRITE must see it, as all that one connection sends is begun in order.
"""

import random

import pytest

from nbdram.memory.budget import Budget
from nbdram.memory.device import Device
from nbdram.protocol.handshake import ReplyMode
from nbdram.protocol.wire import Command
from tests.helpers import ALL_MODES, CLUSTER, KIB, MIB, PAGE
from tests.memory.evicting import evict
from tests.server.wired import wired

SIZE = 40 * CLUSTER
MEMORY = 64 * MIB
MODES = pytest.mark.parametrize("mode", ALL_MODES, ids=[mode.value for mode in ALL_MODES])


def anywhere(chance: random.Random) -> tuple[int, int]:
    """(offset, length): of any size up to four clusters, often whole pages, often small, sometimes whole clusters."""
    length = chance.choice(
        (chance.randint(1, 600), PAGE, chance.randint(1, 4 * CLUSTER), chance.randint(1, 4) * CLUSTER)
    )
    unit = chance.choice((1, 512, PAGE, CLUSTER))
    return chance.randrange(0, SIZE - length + 1) // unit * unit, length


def content(chance: random.Random, length: int) -> bytes:
    """Nothing but zeros is left out: a large WRITE of those makes holes, which `Device.write` does not."""
    if chance.random() < 0.3:
        return chance.randbytes(length)
    return (b"%06d:" % chance.randrange(10**6) * (length // 7 + 1))[:length]


def assert_same(device: Device, twin: Device) -> None:
    """Cluster by cluster: what is where, what was touched; and what it costs."""
    clusters = range(SIZE // CLUSTER)
    assert [hex(device.word(n)) for n in clusters] == [hex(twin.word(n)) for n in clusters]
    assert device.references[: len(clusters)] == twin.references[: len(clusters)]
    assert device.budget.used_pages == twin.budget.used_pages
    for count in ("resident_pages", "cold_pages", "cold_clusters", "index_pages", "ram_faults", "refaults"):
        assert getattr(device, count) == getattr(twin, count), count


@MODES
@pytest.mark.parametrize("seed", range(4))
async def test_any_batch_cut_anywhere_does_what_the_twins_do(mode: ReplyMode, seed: int) -> None:
    chance = random.Random(seed)
    twin = Device("twin", SIZE, Budget(MEMORY))
    async with wired(mode, size=SIZE, memory=MEMORY) as (wire, device):
        for _ in range(50):
            stream = b""
            expected: dict[int, bytes] = {}
            reading: list[tuple[int, int]] = []
            for _ in range(chance.choice((1, 5, 30))):
                offset, length = anywhere(chance)
                busy = any(offset < end and start < offset + length for start, end in reading)
                if not busy and chance.random() < 0.5:
                    data = content(chance, length)
                    stream += wire.client.request(Command.WRITE, offset, payload=data)
                    twin.write(offset, data)
                    expected[wire.client.last_cookie] = b""
                else:
                    stream += wire.client.request(Command.READ, offset, length)
                    expected[wire.client.last_cookie] = twin.read(offset, length)
                    reading.append((offset, offset + length))
            cuts = sorted(chance.randrange(len(stream)) for _ in range(chance.choice((0, 1, 20))))
            await wire.feed(stream, cuts)
            answers = await wire.client.replies(len(expected))
            assert {cookie: answer.data for cookie, answer in answers.items()} == expected
            assert not any(answer.error for answer in answers.values())
            for cluster in range(SIZE // CLUSTER):
                if chance.random() < 0.2:
                    evict(device, cluster)
                    evict(twin, cluster)
            assert_same(device, twin)
        assert device.cold_clusters
        assert device.read(0, SIZE) == twin.read(0, SIZE)
    twin.close()


@MODES
async def test_a_batch_cut_at_each_of_its_bytes_is_understood(mode: ReplyMode) -> None:
    async with wired(mode, size=SIZE) as (wire, _):
        cut = length = 1
        while cut <= length:
            data = bytes([cut % 251]) * 100
            stream = wire.client.request(Command.WRITE, 50, payload=data)
            stream += wire.client.request(Command.READ, 50, 100)
            stream += wire.client.request(Command.READ, 100, 10)
            await wire.feed(stream, [cut])
            answers = sorted((await wire.client.replies(3)).items())
            assert [answer.data for _, answer in answers] == [b"", data, data[:10]]
            cut, length = cut + 1, len(stream)


@MODES
async def test_more_replies_than_one_writev_takes_all_arrive_in_order(mode: ReplyMode) -> None:
    async with wired(mode, size=SIZE) as (wire, device):
        device.write(0, b"".join(bytes([number]) * 256 for number in range(256)))
        reads = [wire.client.request(Command.READ, number % 256 * 256, 256) for number in range(3000)]
        await wire.feed(b"".join(reads))
        answers = await wire.client.replies(3000)
        assert [answer.data[:1] for answer in answers.values()] == [bytes([n % 256]) for n in range(3000)]


@MODES
async def test_a_write_around_the_size_that_is_received_in_place_is_stored(mode: ReplyMode) -> None:
    async with wired(mode, size=SIZE) as (wire, device):
        for length in (64 * KIB - 1, 64 * KIB, 64 * KIB + 1, 256 * KIB - 28, 256 * KIB, 256 * KIB + 1):
            data = random.Random(length).randbytes(length)
            await wire.feed(wire.client.request(Command.WRITE, 12345, payload=data), [1000])
            await wire.client.replies(1)
            assert device.read(12345, length) == data
