"""The remote tier while the cluster changes under it: masters are killed, slots move, the server itself is killed."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from redis.crc import key_slot

from nbdram.memory.device import Device
from nbdram.memory.layout import RESIDENT, SLOT_SHIFT, TIER_MASK, TIER_SHIFT, Tier
from nbdram.memory.mailbox import Mailbox
from nbdram.protocol.wire import Command, Error
from tests.helpers import CLUSTER, MIB, eventually, run, running
from tests.memory.tiers.redis_cluster import HASTY_MS, SLOTS, Cluster, cluster, is_master, until
from tests.memory.tiers.rigs import RemoteRig, remote_rig
from tests.memory.tiers.test_remote import NOISE, Model, modelled

CLUSTERS = 64 * MIB // CLUSTER


@pytest.fixture
def replicated(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path / "redis", 3, 3, failover_ms=HASTY_MS) as made:
        yield made


@pytest.fixture
def scanty(tmp_path: Path) -> Iterator[Cluster]:
    """Without replicas; it goes on without what a lost master had."""
    with cluster(tmp_path / "redis", 3, 0, "--cluster-require-full-coverage", "no", failover_ms=HASTY_MS) as made:
        yield made


@asynccontextmanager
async def work(model: Model) -> AsyncIterator[None]:
    """Writes and checks go on meanwhile, and once more afterwards."""
    ending = False

    async def go_on() -> None:
        while not ending:
            cluster = model.chance.randrange(model.clusters)
            await (model.write(cluster) if model.chance.random() < 0.5 else model.check_one(cluster))

    working = asyncio.create_task(go_on())
    try:
        yield
        ending = True
        await working
    finally:
        working.cancel()
    await model.check()


async def test_a_master_that_is_killed_under_load_loses_nothing_that_was_acknowledged(
    replicated: Cluster, tmp_path: Path
) -> None:
    async with modelled(tmp_path, replace(replicated.settings, replicas=1, wait_s=60)) as (server, model):
        device = server.device()
        await model.fill()
        await eventually(lambda: device.remote_clusters > 300)
        replica = replicated.replicas[0]
        async with work(model):
            await asyncio.sleep(0.2)
            replicated.masters[0].kill()
            await asyncio.to_thread(until, lambda: is_master(replica), "the replica does not take over")
            await asyncio.sleep(0.5)
        assert device.missing_images == 0
        assert server.server.remote
        assert server.server.remote.retries > 0


async def test_a_master_without_replica_takes_with_it_what_it_had_and_no_more(scanty: Cluster, tmp_path: Path) -> None:
    async with modelled(tmp_path, replace(scanty.settings, wait_s=1)) as (server, model):
        device = server.device()
        await model.fill()
        await eventually(lambda: device.remote_clusters > 300)
        victim = scanty.masters[2]
        assert server.server.remote
        await eventually(lambda: not device.reclaiming)
        lost = {at for at in range(CLUSTERS) if is_on_the_last(device, at)}
        assert len(lost) > 50
        victim.kill()
        assert all([await failed(model, at) for at in sorted(lost)[:2]])
        assert not any([await failed(model, at) for at in range(CLUSTERS) if at not in lost])
        assert device.missing_images == 0, "it may come back"
        await asyncio.to_thread(victim.start_again)
        await asyncio.to_thread(scanty.wait_until_whole)
        assert {at for at in range(CLUSTERS) if await failed(model, at)} == lost
        assert device.missing_images >= len(lost)
        for at in lost:
            await model.write(at)
        await model.check()


def is_on_the_last(device: Device, at: int) -> bool:
    """Whether a cluster has its image on the last master, which has the last third of all slots."""
    word = device.word(at)
    if word >> TIER_SHIFT & TIER_MASK != Tier.REMOTE or word & RESIDENT == RESIDENT:
        return False
    assert device.remote
    key = device.remote.key(at, word >> SLOT_SHIFT & 1)
    return bool(key_slot(key) >= SLOTS * 2 // 3)


async def failed(model: Model, at: int) -> bool:
    answer = await model.client.call(Command.READ, at * CLUSTER, CLUSTER)
    if answer.error:
        assert answer.error == Error.EIO
        return True
    assert answer.data == model.content(model.numbers[at])
    return False


async def test_slots_move_from_node_to_node_under_load(redis_cluster: Cluster, tmp_path: Path) -> None:
    async with modelled(tmp_path, redis_cluster.settings) as (server, model):
        device = server.device()
        await model.fill()
        await eventually(lambda: device.remote_clusters > 300)
        chance = random.Random(2)
        async with work(model):
            for _ in range(12):
                keys = await asyncio.to_thread(redis_cluster.keys, "nbdram:image:*")
                slot = key_slot(chance.choice(keys))
                source = redis_cluster.owner_of(slot)
                target = next(node for node in redis_cluster.masters if node is not source)
                await asyncio.to_thread(redis_cluster.move, slot, source, target)
        assert device.missing_images == device.integrity_errors == 0
        assert server.server.remote
        assert server.server.remote.retries > 0, "nobody was asked for what had moved away"


async def test_a_server_that_is_killed_finds_its_images_again(
    redis_cluster: Cluster, tmp_path: Path, shm: Path
) -> None:
    redis_cluster.empty()
    url = f"redis://{','.join(node.address for node in redis_cluster.nodes)}"
    state = ("--state-dir", str(shm / "state"), "--memory", "48M")
    export = ("--export", "ram=1G")
    async with running(tmp_path, *state, *export, "--swap", url) as server, await server.entered() as client:
        model = Model(client, CLUSTERS)
        await model.fill()
        server.process.kill()
        await server.process.wait()
    images = redis_cluster.keys("nbdram:image:*")
    assert len(images) > 100
    refused = await run("serve", *state, "--metrics", "off")
    assert f"has data in a remote: start the server with --swap {url}" in refused.errors
    async with running(tmp_path, *state, "--swap", url) as server, await server.entered() as client:
        model.client = client
        await model.check()
    redis_cluster.empty()


async def test_a_slot_on_its_way_is_asked_for_where_its_keys_are_by_now(redis_cluster: Cluster) -> None:
    with remote_rig(Path(), redis_cluster) as rig:
        tier = rig.first.remote
        assert tier
        rig.store(rig.first, 0, 0, NOISE)
        key = rig.key(rig.first, 0)
        slot, source = key_slot(key), redis_cluster.owner(key)
        target = next(node for node in redis_cluster.masters if node is not source)
        with redis_cluster.moving(slot, source, target):
            source.call("MIGRATE", "127.0.0.1", target.port, "", 0, 10000, "KEYS", key)
            before = rig.remote.retries
            assert rig.load(rig.first, 0, 0, CLUSTER) == NOISE
            assert rig.remote.retries > before, "nobody was sent on"
            told: asyncio.Queue[tuple[bytes, OSError | None]] = asyncio.Queue()
            for _ in range(3):  # the loop has no connection yet, then it has
                tier.ask(0, 0, CLUSTER, Mailbox().callback(lambda *found: told.put_nowait(found)), on_loop=True)
                assert await told.get() == (NOISE, None)
                await asyncio.sleep(0.05)
            rig.drop(rig.first, 0, 0, CLUSTER)
        assert redis_cluster.keys("nbdram:image:*") == []


def test_a_node_that_is_full_is_left_to_itself_until_it_has_room(
    redis_cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    full = redis_cluster.masters[0]
    with remote_rig(Path(), redis_cluster) as rig:
        full.call("CONFIG", "SET", "maxmemory", 1)
        try:
            refused = 0
            while not refused:
                refused += not stores(rig, 0)
            for cluster in range(1, 200):
                refused += not stores(rig, cluster)
            assert refused < 10, "it is asked each time"
            assert rig.remote.failing
            assert not full.client.keys("nbdram:image:*")
        finally:
            full.call("CONFIG", "SET", "maxmemory", 0)
        until(lambda: stores(rig, 0) and not rig.remote.failing, "it is not tried again")
        assert full.client.keys("nbdram:image:*")
        assert [line.split(": ", 1)[1] for line in caplog.messages] == [
            "can't store cold data: it has no memory left; it goes to other nodes, or stays where it is",
            "cold data can be stored again",
        ]


def stores(rig: RemoteRig, cluster: int) -> bool:
    try:
        rig.store(rig.first, cluster, 0, NOISE)
    except OSError:
        return False
    assert rig.load(rig.first, cluster, 0, CLUSTER) == NOISE
    return True


def test_a_server_that_begins_to_evict_gets_nothing_more(redis_cluster: Cluster) -> None:
    with remote_rig(Path(), redis_cluster) as rig:
        rig.store(rig.first, 0, 0, NOISE)
        for node in redis_cluster.masters:
            node.call("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
            node.call("CLIENT", "KILL", "TYPE", "normal")
        try:
            with pytest.raises(OSError, match="may evict keys"):
                rig.store(rig.first, 1, 0, NOISE)
            assert rig.load(rig.first, 0, 0, CLUSTER) == NOISE
        finally:
            for node in redis_cluster.masters:
                node.call("CONFIG", "SET", "maxmemory-policy", "noeviction")
        until(rig.remote.has_room, "it is not tried again")
        rig.store(rig.first, 1, 0, NOISE)
        assert rig.load(rig.first, 1, 0, CLUSTER) == NOISE
