"""The process that compresses sends images to a remote: what it says is stored is there, and the rest others send."""

import asyncio
import os
import random
import select
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from struct import iter_unpack

import pytest

from nbdram.memory import packer as packer_module
from nbdram.memory import reclaim
from nbdram.memory.budget import Budget
from nbdram.memory.device import Device
from nbdram.memory.layout import LENGTH_SHIFT, RESIDENT, TIER_MASK, TIER_SHIFT, Tier
from nbdram.memory.packer import Packer, Packers, Wanted, WantedToSend
from nbdram.memory.packing import FAILED, HEAD
from nbdram.memory.reclaim import Reclaimer
from nbdram.memory.tiers import sending as sending_module
from nbdram.memory.tiers.remote import Remote, RemoteTier
from nbdram.memory.tiers.seal import Seal
from nbdram.memory.tiers.sending import Batch, Sending, image_label
from nbdram.server.exports import Exports
from tests.helpers import CLUSTER, GIB, MIB, PAGE, eventually
from tests.memory.tiers.redis_cluster import Cluster

NOISE = random.Random(1).randbytes(CLUSTER)
SECRET = b"s" * 32
COUNT = 64 * MIB // CLUSTER
UUID_BYTES = bytes(range(16))


class Node:
    """The process's end of things, with a node and a server that the test plays."""

    def __init__(self, replicas: int = 0, *, tcp: bool = False) -> None:
        self.server, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.node, line = tcp_pair() if tcp else socket.socketpair()
        self.sending = Sending(its)
        self.sending.open(7, replicas, SECRET, line.detach())
        self.its = its

    def store(self, *images: bytes, number: int = 1) -> Batch:
        batch = Batch(HEAD.pack(b"S", number), len(images))
        for at, image in enumerate(images):
            self.sending.store((batch, at, 100 + at), 7, (UUID_BYTES, at, 5), image)
        self.sending.flush()
        return batch

    def see_to_it(self) -> None:
        """One round, with all that has come by now."""
        self.server.send(b"wake")
        self.sending.until_told()
        self.its.recv(100)

    def told(self) -> list[tuple[bytes, int, list[int]]]:
        """What the server was told: kind, number, words."""
        found: list[tuple[bytes, int, list[int]]] = []
        self.server.setblocking(False)
        while True:
            try:
                message = self.server.recv(1000)
            except BlockingIOError:
                return found
            found.append((*HEAD.unpack_from(message), [word for (word,) in iter_unpack("<q", message[HEAD.size :])]))

    def close(self) -> None:
        self.sending.close()
        for sock in (self.server, self.its, self.node):
            sock.close()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        one = socket.create_connection(listening.getsockname())
        other, _ = listening.accept()
    return one, other


@pytest.fixture
def node() -> Iterator[Node]:
    made = Node()
    yield made
    made.close()


def test_an_image_is_a_sealed_value_under_its_key(node: Node) -> None:
    node.store(b"image")
    sent = node.node.recv(10000)
    head, value = sent.split(b"\r\n$%d\r\n" % (len(b"image") + 44), 1)
    assert head == b"*3\r\n$3\r\nSET\r\n$64\r\nnbdram:image:000102030405060708090a0b0c0d0e0f:0:0000000000000005"
    assert value[-2:] == b"\r\n"
    opened = Seal(SECRET, b"nbdram remote", "").open(value[:-2], image_label(UUID_BYTES, 0, 5))
    assert opened == b"image"


def test_a_batch_is_answered_when_all_of_it_is_known(node: Node) -> None:
    node.store(b"one", b"two", b"three")
    node.node.send(b"+OK\r\n-OOM command not allo")
    node.see_to_it()
    assert node.told() == []
    node.node.send(b"wed\r\n+OK\r\n")
    node.see_to_it()
    assert node.told() == [(b"S", 1, [100, FAILED, 102])]


@pytest.mark.parametrize(("answer", "words"), [(b":1\r\n", [100, FAILED]), (b":0\r\n", [FAILED, FAILED])])
def test_an_image_counts_when_its_replicas_have_it(answer: bytes, words: list[int]) -> None:
    node = Node(replicas=1)
    node.store(b"one", b"two")
    assert node.node.recv(10000).endswith(b"\r\n*3\r\n$4\r\nWAIT\r\n$1\r\n1\r\n$4\r\n1000\r\n")
    node.node.send(b"+OK\r\n-READONLY\r\n")
    node.see_to_it()
    assert node.told() == []
    node.node.send(answer)
    node.see_to_it()
    assert node.told() == [(b"S", 1, words)]
    node.close()


@pytest.mark.parametrize("last_words", [b"", b"+OK\r\n+OK\r\n+OK\r\n+OK\r\n", b"+OK\r\n+O"])
def test_a_connection_that_is_lost_or_talks_nonsense_is_given_up(node: Node, last_words: bytes) -> None:
    node.store(b"one", b"two", b"three")
    node.node.send(last_words)
    node.node.close()
    node.see_to_it()
    node.see_to_it()
    told = node.told()
    assert (b"L", 7, []) in told
    ((_, _, words),) = [one for one in told if one[0] == b"S"]
    assert words[1:] == [FAILED, FAILED]
    node.store(b"four", number=2)
    assert node.told() == [(b"S", 2, [FAILED])]


def test_a_node_that_is_silent_is_given_up(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending_module, "ANSWER_S", 0.05)
    node.store(b"one")
    node.see_to_it()
    time.sleep(0.1)
    node.see_to_it()
    assert node.told() == [(b"L", 7, []), (b"S", 1, [FAILED])]


@pytest.mark.parametrize(("replicas", "answers"), [(0, b"+OK\r\n" * 2), (1, b"+OK\r\n" * 2 + b":1\r\n")])
def test_nobody_is_woken_before_all_is_there_that_a_batch_waits_for(replicas: int, answers: bytes) -> None:
    node = Node(replicas, tcp=True)
    node.store(b"one", b"two", number=1)
    node.store(b"three", b"four", number=2)
    line = node.sending._lines[7].socket
    for number in (1, 2):
        node.node.send(answers[:-1])
        while len(line.recv(100, socket.MSG_PEEK)) < len(answers) - 1:
            pass
        assert not select.select([line], [], [], 0)[0]
        node.node.send(answers[-1:])
        assert select.select([line], [], [], 10)[0]
        node.see_to_it()
        assert node.told() == [(b"S", number, [100, 101])]
    node.close()


def test_a_node_is_not_silent_that_has_answered_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending_module, "ANSWER_S", 1.0)
    node = Node(tcp=True)
    node.store(b"one", b"two")
    line = node.sending._lines[7]
    node.node.send(b"+OK\r\n")
    while not line.socket.recv(100, socket.MSG_PEEK):
        pass
    line.heard_at -= 10
    node.see_to_it()
    assert node.told() == []
    assert len(line.waiting) == 1
    line.heard_at -= 10
    node.see_to_it()
    assert node.told() == [(b"L", 7, []), (b"S", 1, [100, FAILED])]
    node.close()


def test_what_a_socket_does_not_take_at_once_follows(node: Node) -> None:
    node.store(*[NOISE] * 16)
    assert node.sending._lines[7].unsent
    node.node.setblocking(False)
    received = 0
    while node.sending._lines[7].unsent or received < 16 * CLUSTER:
        with suppress(BlockingIOError):
            received += len(node.node.recv(1 << 20))
        node.see_to_it()
    node.node.send(b"+OK\r\n" * 16)
    node.see_to_it()
    assert node.told() == [(b"S", 1, list(range(100, 116)))]


# -- with real servers -------------------------------------------------------------------------------


class Demoted:
    """A device whose memory is short, on a remote, with two processes."""

    def __init__(self, device: Device, packers: Packers) -> None:
        self.device = device
        self.packers = packers
        self.by_threads = 0  # images that the process did not store

    async def fill(self, generation: int) -> None:
        for cluster in range(COUNT):
            async with asyncio.timeout(60):
                while True:
                    try:
                        self.device.write(cluster * CLUSTER, content(cluster, generation))
                        break
                    except OSError:
                        await asyncio.sleep(0.001)
            if not cluster % 8:
                await asyncio.sleep(0)

    async def is_still(self) -> None:
        await eventually(lambda: not self.device.reclaiming)

    def has_processes(self) -> bool:
        for packer in self.packers:
            packer.start()  # if it was lost with the last batch
        return all(packer.is_ready for packer in self.packers)

    def check(self, generation: int) -> None:
        for cluster in range(COUNT):
            assert self.device.read(cluster * CLUSTER, CLUSTER) == content(cluster, generation)


def content(cluster: int, generation: int) -> bytes:
    """Of every second cluster three quarters compress away."""
    mark = b"%07d.%07d\n" % (cluster, generation)
    return mark + (NOISE[16:] if cluster % 2 else NOISE[16 : CLUSTER // 4] + mark * (CLUSTER // 64 * 3))


def never_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes get their time beside others, and threads leave everything to them."""
    as_others = "import sys; from nbdram.memory import packing; packing._NICE = 0; packing.serve(int(sys.argv[1]))"
    monkeypatch.setattr(packer_module, "_PROGRAM", as_others)
    monkeypatch.setattr(packer_module, "LATE_S", 60.0)
    monkeypatch.setattr(packer_module, "_SEND_LATE_S", 60.0)


@asynccontextmanager
async def demoted(servers: Cluster, monkeypatch: pytest.MonkeyPatch, replicas: int = 0) -> AsyncIterator[Demoted]:
    servers.empty()
    monkeypatch.setattr(packer_module, "_MEMORY_EACH", 1)
    for name in ("LATE_S", "_SEND_LATE_S"):
        monkeypatch.setattr(packer_module, name, 60.0)
    monkeypatch.setattr(reclaim, "anonymous_bytes", lambda _=None: 0)  # of tests it changes from one to the next
    remote = Remote(replace(servers.settings, replicas=replicas))
    budget = Budget(64 * MIB)
    exports = Exports(budget, remote=remote)
    packers = Packers(most=2)
    made = Demoted(exports.create("ram", GIB).device, packers)
    submit = RemoteTier.submit

    def counted(tier: RemoteTier, cluster: int, slot: int, image: bytes) -> object:
        made.by_threads += 1
        return submit(tier, cluster, slot, image)

    monkeypatch.setattr(RemoteTier, "submit", counted)
    reclaimer = Reclaimer(budget, exports.devices, packers)
    reclaimer.start()
    await eventually(lambda: made.has_processes() and all(map(remote.writes.is_connected, packers)))
    budget.set_limit(10 * MIB)  # images that were compressed have no room in RAM either
    try:
        yield made
    finally:
        await reclaimer.stop()
        exports.close()
        remote.close()
    assert servers.keys() == []


async def test_what_leaves_ram_is_sent_by_the_process_and_comes_back(
    redis_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_late(monkeypatch)
    async with demoted(redis_cluster, monkeypatch) as here:
        await here.fill(0)
        await here.fill(1)
        await here.is_still()
        remote = here.device.remote
        assert remote
        words = [here.device.words[cluster] for cluster in range(COUNT)]
        far = [word for word in words if word >> TIER_SHIFT & TIER_MASK == Tier.REMOTE and not word & RESIDENT]
        assert len(far) > COUNT // 4
        assert {word >> LENGTH_SHIFT & 0x1FFFF == CLUSTER for word in far} == {True, False}
        assert here.by_threads < 32, "threads have sent images"
        assert remote.remote.used_bytes == here.device.remote_pages * PAGE
        here.check(1)


async def test_after_what_does_not_compress_the_next_is_stored_in_ram_or_sent_in_one_go(
    redis_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_late(monkeypatch)
    async with demoted(redis_cluster, monkeypatch) as here:
        await here.fill(0)
        await here.is_still()
        remote = here.device.remote
        assert remote
        asked: list[Wanted] = []
        pack = Packer.pack

        async def counted(packer: Packer, wanted: Sequence[Wanted]) -> list[int]:
            asked.extend(wanted)
            return await pack(packer, wanted)

        monkeypatch.setattr(Packer, "pack", counted)
        await here.fill(1)
        await here.is_still()
        assert here.device.cold_clusters, "what compresses is in RAM"
        assert len(asked) < COUNT // 4
        assert here.device.cold_pages * PAGE == here.device.ram.allocated_bytes()
        await eventually(lambda: sum(map(len, remote.generations.pages())) == here.device.remote_clusters)
        here.check(1)


async def test_each_process_sends_on_connections_of_its_own(
    redis_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_late(monkeypatch)
    sent: dict[Packer, set[int]] = {}
    send = Packer.send

    async def counted(packer: Packer, wanted: Sequence[WantedToSend]) -> list[int]:
        words = await send(packer, wanted)
        sent.setdefault(packer, set()).update(one.line for one, word in zip(wanted, words, strict=True) if word > 0)
        return words

    monkeypatch.setattr(Packer, "send", counted)
    async with demoted(redis_cluster, monkeypatch) as here:
        await here.fill(0)
        await here.fill(1)
        await here.is_still()
        assert here.by_threads < 32, "the connections were there before something was to be sent"
        first, second = (sent[packer] for packer in here.packers)
        assert len(first) == len(second) == len(redis_cluster.masters)
        assert not first & second
        here.check(1)


async def test_nothing_is_lost_when_the_processes_are_killed_or_their_connections_are(
    redis_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packer_module, "_AGAIN_S", 0.0)
    async with demoted(redis_cluster, monkeypatch) as here:
        await here.fill(0)
        for generation in range(1, 7):
            await eventually(here.has_processes)
            filling = asyncio.create_task(here.fill(generation))
            await asyncio.sleep(0.05 * generation)
            if generation % 2:
                for packer in here.packers:
                    if packer.pid:
                        os.kill(packer.pid, signal.SIGKILL)
            else:
                for node in redis_cluster.masters:
                    await asyncio.to_thread(node.call, "CLIENT", "KILL", "TYPE", "normal")
            await filling
            await here.is_still()
            here.check(generation)
        assert not here.device.integrity_errors
