"""While there is nothing else to do, images in RAM get smaller, each once, and nothing is lost by it."""

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdram.memory import densifying, packing
from nbdram.memory.budget import Budget
from nbdram.memory.codec import DENSE_LEVEL, Codec
from nbdram.memory.densifying import Densifier
from nbdram.memory.device import Device
from nbdram.memory.layout import DENSE, RESIDENT, SLOT_SHIFT, Reference
from nbdram.memory.packer import Packer, Packers, Wanted
from nbdram.memory.reclaim import Reclaimer
from tests.helpers import CLUSTER, MIB, PAGE, eventually
from tests.memory.test_packer import LIMIT, image_of, ready, started
from tests.memory.test_statedir import leave, make, taken_up

COUNT = 3 * LIMIT // 2 // CLUSTER  # clusters; two thirds of them fit

_TEXT = b"".join(path.read_bytes() for path in sorted(Path(densifying.__file__).parent.glob("*.py")))


def prose(cluster: int, generation: int = 0) -> bytes:
    """What a closer look compresses better."""
    chance = random.Random(cluster << 8 | generation)
    start, length = chance.randrange(len(_TEXT) - CLUSTER), chance.randrange(CLUSTER // 2, CLUSTER)
    return _TEXT[start : start + length].ljust(CLUSTER, b".")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(densifying, "_LOOK_S", 0.001)


@pytest.fixture
def device() -> Iterator[Device]:
    made = Device("paged", 2 * COUNT * CLUSTER, Budget(LIMIT))
    yield made
    made.close()


@asynccontextmanager
async def densifying_of(device: Device) -> AsyncIterator[tuple[Reclaimer, Packers]]:
    """Reclaim that has a process which is ready, and what makes its images smaller."""
    packers = Packers(most=1)
    reclaimer = Reclaimer(device.budget, lambda: [device], packers)
    densifier = Densifier(reclaimer, lambda: [device])
    reclaimer.start()
    device.budget.set_limit(LIMIT + device.budget.overhead_pages * PAGE)
    await ready(packers.first)
    densifier.start()
    try:
        yield reclaimer, packers
    finally:
        await densifier.stop()
        await reclaimer.stop()


async def fill(device: Device, count: int = COUNT) -> None:
    async with asyncio.timeout(60):
        for cluster in range(count):
            while True:
                try:
                    device.write(cluster * CLUSTER, prose(cluster))
                    break
                except OSError:
                    await asyncio.sleep(0.001)
            if not cluster % 16:
                await asyncio.sleep(0)


async def all_dense(device: Device) -> None:
    def is_so() -> bool:
        cold = [at for at in range(COUNT) if device.references[at] == Reference.COLD]
        return bool(cold) and all(device.words[at] & DENSE for at in cold) and not device.reclaiming

    await eventually(is_so)


async def test_images_get_smaller_each_once_and_say_the_same(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    make_denser = Packer.make_denser

    async def noted(packer: Packer, wanted: Sequence[Wanted]) -> list[int]:
        asked.extend(cluster for _, cluster, _ in wanted)
        return await make_denser(packer, wanted)

    monkeypatch.setattr(Packer, "make_denser", noted)
    async with densifying_of(device) as (reclaimer, _):
        await fill(device)
        await eventually(lambda: reclaimer.counters.made_denser > 0)
        before = device.cold_pages / device.cold_clusters
        await all_dense(device)
        assert reclaimer.counters.made_denser > COUNT // 3
        assert device.cold_pages / device.cold_clusters < 0.97 * before
        assert len(asked) == len(set(asked))
        assert device.cold_pages * PAGE == device.ram.allocated_bytes()
        for cluster in range(COUNT):
            assert device.read(cluster * CLUSTER, CLUSTER) == prose(cluster)
    assert not device.reclaiming


async def test_nothing_is_lost_by_what_clients_do_meanwhile(device: Device) -> None:
    chance = random.Random(1)
    model: dict[int, bytes] = {}  # counts against the budget, too: there must not be many
    some = chance.sample(range(COUNT), 100)
    async with densifying_of(device) as (reclaimer, _):
        counters = reclaimer.counters
        await fill(device)
        for turn in range(3000):
            cluster = chance.choice(some)
            at, content = cluster * CLUSTER, model.get(cluster) or prose(cluster)
            kind = turn % 4
            if kind == 0:
                page = chance.randrange(16) * PAGE
                data = chance.randbytes(PAGE)
                try:
                    device.write(at + page, data)
                except OSError:
                    continue
                model[cluster] = content[:page] + data + content[page + PAGE :]
            elif kind == 1:
                list(device.trim(at, at + CLUSTER))
                model[cluster] = bytes(CLUSTER)
            else:
                assert device.read(at, CLUSTER) == content
            if busy := device.reclaiming.intersection(some):  # one that is under way just now
                cluster = min(busy)
                content = model.get(cluster) or prose(cluster)
                try:
                    device.write(cluster * CLUSTER, b"!" * PAGE)
                except OSError:
                    continue
                model[cluster] = b"!" * PAGE + content[PAGE:]
            await asyncio.sleep(0.0002 * (turn % 7 == 0))
        await all_dense(device)
        assert counters.made_denser
        for cluster in range(COUNT):
            assert device.read(cluster * CLUSTER, CLUSTER) == (model.get(cluster) or prose(cluster))
        assert device.cold_pages * PAGE == device.ram.allocated_bytes()
        assert device.integrity_errors == 0


async def test_it_waits_while_reclaim_has_something_to_do(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    async with densifying_of(device) as (reclaimer, _):
        done = iter(range(1 << 30))
        with monkeypatch.context() as busy:
            busy.setattr(Reclaimer, "done", property(lambda _: next(done)))
            await fill(device)
            await asyncio.sleep(0.1)
            assert reclaimer.counters.made_denser == 0
        await eventually(lambda: reclaimer.counters.made_denser > 0)


async def test_exports_that_want_density_have_it_already(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sequence[Wanted]] = []

    async def noted(_: Packer, wanted: Sequence[Wanted]) -> list[int]:
        asked.append(wanted)
        return [packing.STUCK] * len(wanted)

    monkeypatch.setattr(Packer, "make_denser", noted)
    made = Device("dense", 2 * COUNT * CLUSTER, Budget(LIMIT), Codec.dense())
    async with densifying_of(made) as (reclaimer, _):
        await fill(made)
        await eventually(lambda: reclaimer.counters.compressed > 0 and not made.reclaiming)
        await asyncio.sleep(0.1)
        assert not asked
    made.close()


async def test_a_device_may_go_in_between(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    going = Device("going", 4 * MIB, Budget(64 * MIB))
    devices = [going]
    asked = 0
    make_denser = Packer.make_denser

    async def last(packer: Packer, wanted: Sequence[Wanted]) -> list[int]:
        nonlocal asked
        asked += 1
        images = await make_denser(packer, wanted)
        devices.clear()
        asyncio.get_running_loop().call_soon(going.close)
        return images

    for cluster in range(4 * MIB // CLUSTER):
        going.write(cluster * CLUSTER, prose(cluster))
        going.take_images(
            cluster, [packing.pack(going.backing.hot_fd, going.ram, going.codec, cluster, going.words[cluster])]
        )
    monkeypatch.setattr(Packer, "make_denser", last)
    packers = Packers(most=1)
    monkeypatch.setattr(Packers, "_allowed", lambda self, _: list(self))
    reclaimer = Reclaimer(going.budget, lambda: devices, packers)
    densifier = Densifier(reclaimer, lambda: devices)
    await ready(packers.first)
    reclaimer.counters.compressed = 1
    densifier.start()
    await eventually(lambda: asked > 0 and not devices)
    await asyncio.sleep(0.1)
    await densifier.stop()
    await packers.stop()
    assert asked == 1
    assert "reclaim had an error" not in caplog.text


async def test_nothing_is_lost_with_the_process(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    async with densifying_of(device) as (reclaimer, packers):
        await fill(device)
        await eventually(lambda: reclaimer.counters.made_denser > 0)
        pid = packers.first.pid
        assert pid
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: not packers.first.is_ready and not device.reclaiming)
        for cluster in range(COUNT):
            assert device.read(cluster * CLUSTER, CLUSTER) == prose(cluster)
        assert device.cold_pages * PAGE == device.ram.allocated_bytes()
    assert "reclaim had an error" not in caplog.text


@asynccontextmanager
async def one_image(content: bytes) -> AsyncIterator[tuple[Device, Packer, int, Densifier]]:
    """A device whose first cluster is in an image, a process that is ready, and the image's word."""
    device = Device("one", MIB, Budget(8 * MIB))
    device.write(0, content)
    async with started() as packer:
        (image,) = await packer.pack([(device, 0, device.words[0])])
        device.take_images(0, [image])
        yield device, packer, image, Densifier(Reclaimer(device.budget, lambda: [device]), lambda: [device])
    device.close()


async def test_what_would_not_get_smaller_stays_as_it_is_and_is_not_tried_again() -> None:
    content = (random.Random(1).randbytes(PAGE // 2) + bytes(PAGE // 2)) * 16
    async with one_image(content) as (device, packer, image, densifier):
        assert await packer.make_denser([(device, 0, image)]) == [packing.STUCK]
        await densifier._make_denser(packer, [(device, 0, image)])
        assert device.words[0] == image | DENSE
        assert not densifying._coarse(device, 0, 16)
        assert device.read(0, CLUSTER) == content
        # The next image, over this one, may be worth a look again.
        device.write(0, b"n" * PAGE)
        (over,) = await packer.pack([(device, 0, device.words[0])])
        assert not over & DENSE
        device.take_images(0, [over])
        assert device.read(0, CLUSTER) == b"n" * PAGE + content[PAGE:]


def written(device: Device) -> bytes:
    device.write(PAGE, b"n" * PAGE)
    return prose(0)[:PAGE] + b"n" * PAGE + prose(0)[2 * PAGE :]


def trimmed(device: Device) -> bytes:
    list(device.trim(0, CLUSTER))
    return bytes(CLUSTER)


def read(device: Device) -> bytes:
    assert device.read(0, PAGE) == prose(0)[:PAGE]
    return prose(0)


@pytest.mark.parametrize("act", [written, trimmed, read])
async def test_an_image_of_what_was_touched_meanwhile_is_thrown_away(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[Device], bytes]
) -> None:
    make_denser = Packer.make_denser
    expected = b""

    async def meanwhile(packer: Packer, wanted: Sequence[Wanted]) -> list[int]:
        nonlocal expected
        images = await make_denser(packer, wanted)
        assert images[0] > 0
        expected = act(wanted[0][0])
        return images

    monkeypatch.setattr(Packer, "make_denser", meanwhile)
    async with one_image(prose(0)) as (device, packer, image, densifier):
        await densifier._make_denser(packer, [(device, 0, image)])
        assert densifier._counters.thrown_away == 1
        assert densifier._counters.made_denser == 0
        assert device.read(0, CLUSTER) == expected
        assert device.cold_pages * PAGE == device.ram.allocated_bytes()
        assert not device.reclaiming


async def test_a_damaged_image_is_left_to_whoever_reads_it() -> None:
    async with one_image(prose(0)) as (device, packer, image, densifier):
        os.pwrite(device.ram.fd, b"?" * 64, (image >> SLOT_SHIFT & 1) * CLUSTER)
        await densifier._make_denser(packer, [(device, 0, image)])
        assert device.words[0] == image
        assert not device.reclaiming
        assert densifier._counters.made_denser == 0


async def test_the_smaller_image_is_in_the_other_slot_and_the_word_tells_that_it_is_dense() -> None:
    async with one_image(prose(0)) as (device, packer, image, _):
        (denser,) = await packer.make_denser([(device, 0, image)])
        assert denser & DENSE
        assert not denser & RESIDENT
        assert denser >> SLOT_SHIFT & 1 != image >> SLOT_SHIFT & 1
        assert image_of(device, 0, image) == image_of(device, 0, denser) == prose(0)


def test_the_next_process_knows_a_dense_image(shm: Path) -> None:
    state, device, _ = make(shm / "state")
    device.write(0, prose(0))
    image = packing.pack(device.backing.hot_fd, device.ram, device.codec, 0, device.words[0])
    device.take_images(0, [image])
    denser = packing.make_denser(device.ram, Codec(level=DENSE_LEVEL), 0, image)
    device.take_images(0, [denser])
    assert denser & DENSE
    pages = device.cold_pages
    leave(state, device)
    with taken_up(shm / "state") as found:
        assert found.words[0] == denser
        assert found.references[0] == Reference.COLD
        assert (found.cold_clusters, found.cold_pages) == (1, pages)
        assert found.read(0, CLUSTER) == prose(0)
