"""The remote tier on real servers that are killed, full, wrong, or away, under devices that are read and written."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdram.errors import NbdramError
from nbdram.memory.budget import Budget
from nbdram.memory.codec import IntegrityError
from nbdram.memory.layout import Tier
from nbdram.memory.tiers import engine
from nbdram.memory.tiers.remote import Remote
from nbdram.memory.tiers.remote_settings import RemoteSettings
from nbdram.protocol.handshake import ReplyMode
from nbdram.protocol.wire import Command, Error
from nbdram.server.exports import Exports
from tests.helpers import CLUSTER, GIB, MIB, PATIENCE_S, Client, Served, eventually, run, running, served
from tests.memory.tiers.redis_cluster import Cluster, Node, free_ports, until
from tests.memory.tiers.redis_cluster import server as redis_server
from tests.memory.tiers.rigs import remote_rig
from tests.observe.test_web import fetch

TIERS = "x-nbdram:tier"
NOISE = random.Random(1).randbytes(CLUSTER)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with redis_server(tmp_path_factory.mktemp("lone")) as node:
        yield node


@pytest.fixture
def lone(servers: Node) -> Node:
    """A server that is no cluster, and empty."""
    servers.call("FLUSHALL")
    return servers


def of(node: Node, **wanted: Any) -> RemoteSettings:
    return replace(RemoteSettings((("127.0.0.1", node.port),)), **wanted)


class Model:
    """A client that knows what every cluster must have; not by heart, for the server counts this memory as its own."""

    def __init__(self, client: Client, clusters: int) -> None:
        self.client = client
        self.clusters = clusters
        self.chance = random.Random(1)
        self.noise = [self.chance.randbytes(CLUSTER) for _ in range(16)]
        self.numbers: dict[int, int] = {}

    def content(self, number: int) -> bytes:
        """A quarter does not compress, the others to half."""
        mark, noise = b"%015d\n" % number, self.noise[number % 16]
        return mark + noise[16:] if number % 4 == 0 else noise[: CLUSTER // 2] + mark * (CLUSTER // 32)

    async def write(self, cluster: int) -> None:
        number = self.chance.randrange(1 << 30)
        await self.client.write(cluster * CLUSTER, self.content(number))
        self.numbers[cluster] = number

    async def fill(self) -> None:
        for cluster in range(self.clusters):
            await self.write(cluster)

    async def check(self) -> None:
        for cluster in self.numbers:
            await self.check_one(cluster)

    async def check_one(self, cluster: int) -> None:
        found = await self.client.read(cluster * CLUSTER, CLUSTER)
        assert found == self.content(self.numbers[cluster]), f"cluster {cluster} is not what was written"

    async def check_in_one_piece(self, server: Served) -> None:
        """Reads that are long, and have replies that can't be cut: images are looked at before they are sent."""
        async with await server.entered("ram", ReplyMode.SIMPLE) as client:
            for first in range(0, self.clusters, 64):
                expected = b"".join(self.content(self.numbers[first + number]) for number in range(8))
                assert await client.read(first * CLUSTER, 8 * CLUSTER) == expected
        assert server.device().integrity_errors == 0


@asynccontextmanager
async def modelled(
    directory: Path, remote: RemoteSettings, mib: int = 64, memory: str = "24M"
) -> AsyncIterator[tuple[Served, Model]]:
    async with (
        served(directory, "ram=1G", memory=memory, remote=remote) as server,
        await server.entered("ram", ReplyMode.STRUCTURED, [TIERS]) as client,
    ):
        yield server, Model(client, mib * MIB // CLUSTER)


async def tiers(client: Client, length: int) -> set[int]:
    answer = await client.call(Command.BLOCK_STATUS, 0, length)
    return {flags for _, flags in answer.status[client.contexts[TIERS]]}


async def test_three_times_as_much_as_memory_holds_comes_back(redis_cluster: Cluster, tmp_path: Path) -> None:
    redis_cluster.empty()
    async with modelled(tmp_path, redis_cluster.settings) as (server, model):
        await model.fill()
        device = server.device()
        await eventually(lambda: device.remote_clusters > 300)
        assert Tier.REMOTE in await tiers(model.client, 64 * MIB)
        await model.check()
        assert device.remote_faults > 300
        await model.check_in_one_piece(server)
        for _ in range(300):
            await model.write(model.chance.randrange(model.clusters))
        await model.check()
    assert redis_cluster.keys() == []


# -- values that are not what they should be ---------------------------------------------------------


def test_values_of_other_clusters_devices_and_times_are_refused(redis_cluster: Cluster) -> None:
    with remote_rig(Path(), redis_cluster) as rig:
        rig.store(rig.first, 0, 0, NOISE)
        rig.store(rig.first, 1, 0, NOISE)
        rig.store(rig.second, 0, 0, NOISE)
        mine, others = rig.key(rig.first, 0), (rig.key(rig.first, 1), rig.key(rig.second, 0))
        old = rig.value(mine)
        for key in others:
            rig.put(mine, rig.value(key))
            with pytest.raises(IntegrityError, match="not what was stored"):
                rig.load(rig.first, 0, 0, CLUSTER)
        rig.put(mine, old[:100])
        with pytest.raises(IntegrityError, match="not what was stored"):
            rig.load(rig.first, 0, 0, CLUSTER)
        rig.put(mine, old)
        assert rig.load(rig.first, 0, 0, CLUSTER) == NOISE
        rig.drop(rig.first, 0, 0, CLUSTER)
        rig.store(rig.first, 0, 0, NOISE[::-1])
        assert rig.key(rig.first, 0) != mine, "a key was used twice"
        rig.put(rig.key(rig.first, 0), old)
        with pytest.raises(IntegrityError, match="not what was stored"):
            rig.load(rig.first, 0, 0, CLUSTER)


def test_nothing_readable_is_in_the_remote(redis_cluster: Cluster) -> None:
    with remote_rig(Path(), redis_cluster) as rig:
        rig.store(rig.first, 0, 0, b"a very secret thing " * 3000)
        value = rig.value(rig.key(rig.first, 0))
        assert len(value) > 60000
        assert b"secret" not in value


async def test_a_missing_value_is_an_error_for_its_cluster_alone(lone: Node, tmp_path: Path) -> None:
    async with modelled(tmp_path, of(lone)) as (server, model):
        await model.fill()
        device = server.device()
        await eventually(lambda: device.remote_clusters > 300)
        victim = next(c for c in range(model.clusters) if device.word(c) >> 50 == Tier.REMOTE)
        (key,) = lone.client.scan_iter(f"nbdram:image:*:{victim:x}:*", count=10000)
        lone.call("DEL", key)
        for _ in range(2):
            answer = await model.client.call(Command.READ, victim * CLUSTER, 4096)
            assert (answer.error, answer.data) == (Error.EIO, b""), "not even zeros"
        assert device.missing_images == device.integrity_errors == 2
        del model.numbers[victim]
        await model.check()
        await model.write(victim)  # whole: what is lost is not needed any more
        await model.check()


# -- a remote that refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_server_that_might_evict_is_refused(lone: Node, policy: str) -> None:
    lone.call("CONFIG", "SET", "maxmemory-policy", policy)
    try:
        with pytest.raises(NbdramError, match=rf"may evict keys \(maxmemory-policy {policy}\): set it to noeviction"):
            Remote(of(lone))
    finally:
        lone.call("CONFIG", "SET", "maxmemory-policy", "noeviction")


async def test_a_full_server_keeps_what_it_has_and_takes_more_when_there_is_room(
    lone: Node, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lone.call("CONFIG", "SET", "maxmemory", lone.client.info("memory")["used_memory"] + 4 * MIB)
    try:
        async with modelled(tmp_path, of(lone)) as (server, model):
            remote = server.server.remote
            assert remote
            at = 0
            async with asyncio.timeout(PATIENCE_S):
                while not remote.failing:  # what is written over is dropped there, and makes room
                    await was_taken(model, at % model.clusters)
                    at += 1
            await model.check()
            lone.call("CONFIG", "SET", "maxmemory", 0)
            async with asyncio.timeout(PATIENCE_S):
                while remote.failing:  # it is tried again a moment after it refused
                    victim = model.chance.randrange(len(model.numbers))
                    while not await was_taken(model, victim):
                        await asyncio.sleep(0.05)
            await model.check()
    finally:
        lone.call("CONFIG", "SET", "maxmemory", 0)
    assert "can't store cold data: it has no memory left" in caplog.text
    assert "cold data can be stored again" in caplog.text


async def was_taken(model: Model, cluster: int) -> bool:
    """Whether there was memory for a write: as long as the remote is full there may be none."""
    try:
        await model.write(cluster)
    except AssertionError:
        return False
    return True


def test_no_more_is_stored_than_was_allowed(redis_cluster: Cluster) -> None:
    with remote_rig(Path(), redis_cluster, max_bytes=2 * CLUSTER + 4096) as rig:
        rig.store(rig.first, 0, 0, NOISE)
        assert rig.remote.has_room()
        rig.store(rig.first, 1, 0, NOISE)
        assert not rig.remote.has_room()
        rig.drop(rig.first, 0, 0, CLUSTER)
        assert rig.remote.has_room()


def test_an_image_without_its_replicas_is_not_stored(lone: Node, caplog: pytest.LogCaptureFixture) -> None:
    remote = Remote(of(lone, replicas=1))
    assert "has 0 replicas of some of its masters: with replicas=1 nothing is stored there until" in caplog.text
    exports = Exports(Budget(64 * MIB), remote=remote)
    tier = exports.create("ram", GIB).device.remote
    assert tier
    with pytest.raises(OSError, match="0 of 1 replicas have it"):
        tier.store(0, 0, NOISE)
    assert remote.failing
    until(lambda: not remote.drops_waiting, "the image stays")
    assert not list(lone.client.scan_iter("nbdram:image:*"))
    exports.close()
    remote.close()


# -- a remote that is away ---------------------------------------------------------------------------


async def test_a_server_that_hangs_holds_up_only_those_who_need_it(lone: Node, tmp_path: Path) -> None:
    async with modelled(tmp_path, of(lone)) as (server, model):
        await model.fill()
        device = server.device()
        await eventually(lambda: device.remote_clusters > 300)
        far = next(c for c in range(model.clusters) if device.word(c) >> 50 == Tier.REMOTE)
        lone.stop()
        try:
            reading = asyncio.create_task(model.client.read(far * CLUSTER, CLUSTER))
            async with await server.entered() as other:
                await other.write(900 * MIB, b"resident")
                for _ in range(100):
                    assert await other.read(900 * MIB, 8) == b"resident"
            assert not reading.done()
        finally:
            lone.go_on()
        assert await reading == model.content(model.numbers[far])
        await model.check()


async def test_connections_that_break_amid_reads_are_made_again(lone: Node, tmp_path: Path) -> None:
    async with modelled(tmp_path, of(lone)) as (server, model):
        await model.fill()
        device = server.device()
        await eventually(lambda: device.remote_clusters > 300)
        far = [c for c in range(model.clusters) if device.word(c) >> 50 == Tier.REMOTE]
        for first in range(0, 64, 8):
            reading = [asyncio.create_task(read_apart(server, model, c)) for c in far[first : first + 8]]
            await asyncio.sleep(0.002 * (first // 8))
            await asyncio.to_thread(lone.call, "CLIENT", "KILL", "TYPE", "normal")
            await asyncio.gather(*reading)
        assert device.missing_images == device.integrity_errors == 0


async def read_apart(server: Served, model: Model, cluster: int) -> None:
    async with await server.entered() as client:
        assert await client.read(cluster * CLUSTER, CLUSTER) == model.content(model.numbers[cluster])


async def test_reads_of_a_server_that_stays_away_end_in_an_error_and_its_images_are_there_when_it_is_back(
    lone: Node, tmp_path: Path
) -> None:
    async with modelled(tmp_path, of(lone, wait_s=0.5), mib=32) as (server, model):
        await model.fill()
        device = server.device()
        remote = server.server.remote
        assert remote
        await eventually(lambda: device.remote_clusters > 50)
        far = next(c for c in range(model.clusters) if device.word(c) >> 50 == Tier.REMOTE)
        lone.stop()
        try:
            answer = await model.client.call(Command.READ, far * CLUSTER, 4096)
            assert answer.error == Error.EIO
        finally:
            lone.go_on()
        await model.check()
        assert device.missing_images == 0


# -- who may ask -------------------------------------------------------------------------------------


async def test_the_password_opens_the_server_and_is_shown_nowhere(lone: Node, tmp_path: Path) -> None:
    url = f"redis://127.0.0.1:{lone.port}/?max=1G"
    lone.call("CONFIG", "SET", "requirepass", "open-sesame")
    try:
        refused = await run("serve", "--swap", url, "--metrics", "off", environment={"NBDRAM_REMOTE_PASSWORD": "wrong"})
        assert refused.code == 1
        assert f"redis://127.0.0.1:{lone.port} does not let us in" in refused.errors
        (port,) = free_ports(1)
        options = ("--swap", url, "-v", "--memory", "64M", "--metrics", f"127.0.0.1:{port}")
        async with running(tmp_path, *options, environment={"NBDRAM_REMOTE_PASSWORD": "open-sesame"}) as server:
            pid = server.process.pid
            seen = (
                Path(f"/proc/{pid}/cmdline").read_text()
                + (await run("stats", "--json", "--control", str(tmp_path / "control"))).output
            )
            for path in ("/metrics", "/api/status"):
                status, page = await fetch(port, path)
                assert (status, "redis://127.0.0.1" in page) == (200, True)
                seen += page
            server.process.terminate()
            ended = await server.ended()
        assert f'"url": "redis://127.0.0.1:{lone.port}"' in seen
        assert "sesame" not in seen + ended.output + ended.errors + refused.errors
    finally:
        lone.call("CONFIG", "SET", "requirepass", "")


def test_a_remote_that_nobody_listens_at_is_waited_for_and_then_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine, "_START_S", 0.2)
    with pytest.raises(NbdramError, match=r"can't use redis://127.0.0.1:1 for swap: .*refused"):
        Remote(RemoteSettings((("127.0.0.1", 1),)))
    (waits,) = caplog.messages
    assert waits.startswith("redis://127.0.0.1:1 does not answer: ")
    assert waits.endswith(" refused; it has 0.2 s")


def test_nodes_that_are_no_cluster_are_named_alone(lone: Node) -> None:
    with pytest.raises(NbdramError, match=r"is no cluster: name it alone"):
        Remote(RemoteSettings((("127.0.0.1", lone.port), ("127.0.0.1", 1))))
