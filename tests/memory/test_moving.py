"""Where a remote comes after a disk, what is coldest on the disk moves on when the disk is above its share."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdram.config import SwapSettings
from nbdram.memory.layout import TIER_MASK, TIER_SHIFT, Reference, Tier
from nbdram.memory.tiers.disk import SwapArea
from nbdram.protocol.handshake import ReplyMode
from tests.helpers import CLUSTER, MIB, PAGE, Served, eventually, served
from tests.memory.tiers.redis_cluster import Node
from tests.memory.tiers.redis_cluster import server as redis_server
from tests.memory.tiers.test_remote import TIERS, Model, of

ON_DISK = 6 * MIB


@pytest.fixture
def lone(tmp_path: Path) -> Iterator[Node]:
    with redis_server(tmp_path / "redis") as node:
        yield node


@asynccontextmanager
async def two_tiers(directory: Path, node: Node, mib: int = 48) -> AsyncIterator[tuple[Served, Model]]:
    """A server with a tiny disk, and a remote behind it."""
    swap = (SwapSettings(directory / "swap", ON_DISK),)
    async with (
        served(directory, "ram=1G", memory="24M", swap=swap, remote=of(node)) as server,
        await server.entered("ram", ReplyMode.STRUCTURED, [TIERS]) as client,
    ):
        yield server, Model(client, mib * MIB // CLUSTER)


def on_disk(server: Served) -> list[int]:
    device = server.device()
    return [at for at in range(48 * MIB // CLUSTER) if device.word(at) >> TIER_SHIFT & TIER_MASK == Tier.DISK]


def is_relieved(server: Served) -> bool:
    return server.server.areas[0].used_bytes <= 0.9 * ON_DISK and not server.device().reclaiming


async def settled(server: Served) -> None:
    """Nothing is moved any more, and what was is dropped."""
    await eventually(lambda: is_relieved(server))
    disk = server.device().disk
    assert disk
    await asyncio.to_thread(disk.writer.submit(int).result)


async def test_a_disk_above_its_share_is_relieved_and_nothing_is_lost(lone: Node, tmp_path: Path) -> None:
    async with two_tiers(tmp_path, lone) as (server, model):
        await model.fill()
        counters, device = server.server.reclaimer.counters, server.device()
        await eventually(lambda: counters.moved_on > 0)
        await eventually(lambda: is_relieved(server))
        assert device.disk_clusters > 0
        await model.check()
        for _ in range(200):
            await model.write(model.chance.randrange(model.clusters))
        await model.check()
        await settled(server)
        remote = server.server.remote
        assert remote
        await eventually(lambda: not remote.drops_waiting)
        assert len(list(lone.client.scan_iter("nbdram:image:*", count=1000))) == device.remote_clusters


async def test_what_was_read_stays_on_the_disk_while_there_is_something_colder(lone: Node, tmp_path: Path) -> None:
    async with two_tiers(tmp_path, lone) as (server, model):
        await model.fill()
        await settled(server)
        device = server.device()
        device.budget.set_limit(
            device.budget.limit_pages * PAGE + 64 * MIB
        )  # reclaim, which ages too, has nothing to do
        warm = [at for at in on_disk(server) if device.references[at] == Reference.FAR][:20]
        assert len(warm) == 20
        before = server.server.reclaimer.counters.moved_on
        for at in warm:  # what a read makes of it
            device.references[at] = Reference.FAR_TOUCHED
        server.server.areas[0].max_bytes = int(server.server.areas[0].used_bytes / 0.95)
        await eventually(lambda: server.server.reclaimer.counters.moved_on > before)
        assert set(warm) <= set(on_disk(server))


async def test_images_stay_on_the_disk_until_the_remote_has_them(lone: Node, tmp_path: Path) -> None:
    async with two_tiers(tmp_path, lone) as (server, model):
        area, device = server.server.areas[0], server.device()
        for at in range(model.clusters):
            await model.write(at)
            if device.disk_clusters > 40:
                break
        await eventually(lambda: not device.reclaiming)
        lone.stop()
        try:
            area.max_bytes = area.used_bytes  # nothing more has room there
            there, moved = on_disk(server), device.remote_clusters
            await eventually(lambda: not device.reclaiming.isdisjoint(there))  # a batch is on its way
            await asyncio.sleep(0.3)
            assert on_disk(server) == there
            assert device.remote_clusters == moved
        finally:
            lone.go_on()
        await eventually(lambda: device.remote_clusters > moved)
        await model.check()


async def test_a_surprise_does_not_end_the_moving_on(
    lone: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(SwapArea, "size_bytes", lambda _: 1 // 0)
    async with two_tiers(tmp_path, lone) as (server, model):
        await eventually(lambda: "reclaim had an error and goes on: ZeroDivisionError" in caplog.text)
        monkeypatch.undo()
        await model.fill()
        await eventually(lambda: server.server.reclaimer.counters.moved_on > 0)
    assert caplog.text.count("reclaim had an error") == 1


async def test_nothing_is_moved_on_that_changes_meanwhile(lone: Node, tmp_path: Path) -> None:
    async with two_tiers(tmp_path, lone) as (server, model):
        area, device = server.server.areas[0], server.device()
        await model.fill()
        await settled(server)
        device.budget.set_limit(device.budget.limit_pages * PAGE + 64 * MIB)  # writing needs nobody's help
        lone.stop()
        try:
            area.max_bytes = area.used_bytes
            await eventually(lambda: bool(device.reclaiming & set(on_disk(server))))
            victim = min(device.reclaiming & set(on_disk(server)))
            await model.write(victim)
        finally:
            lone.go_on()
        await eventually(lambda: victim not in device.reclaiming)
        await model.check()
        assert device.integrity_errors == device.missing_images == 0
