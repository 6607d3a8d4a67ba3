"""The remote tier on real servers that are killed, full, wrong, or away, under devices that are read and written."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from nbdram.memory.layout import Tier
from nbdram.memory.tiers.remote_settings import RemoteSettings
from nbdram.protocol.handshake import ReplyMode
from nbdram.protocol.wire import Command
from tests.helpers import CLUSTER, MIB, Client, Served, eventually, served
from tests.memory.tiers.redis_cluster import Cluster

TIERS = "x-nbdram:tier"


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
        for cluster, number in self.numbers.items():
            found = await self.client.read(cluster * CLUSTER, CLUSTER)
            assert found == self.content(number), f"cluster {cluster} is not what was written"


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
    async with modelled(tmp_path, redis_cluster.settings) as (server, model):
        await model.fill()
        device = server.device()
        await eventually(lambda: device.remote_clusters > 300)
        assert Tier.REMOTE in await tiers(model.client, 64 * MIB)
        await model.check()
        assert device.remote_faults > 300
        for _ in range(300):
            await model.write(model.chance.randrange(model.clusters))
        await model.check()
    assert redis_cluster.keys() == []
