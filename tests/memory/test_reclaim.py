"""Reclaim goes on, whatever happens to it; and it says "hopeless" only when it is."""

import asyncio
import errno
import random
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import lz4.block
import pytest

from nbdram.memory import reclaim, verdict
from nbdram.memory.budget import Budget
from nbdram.memory.device import Device
from nbdram.memory.layout import Reference, Tier
from nbdram.memory.reclaim import BATCH, Reclaimer
from tests.helpers import CLUSTER, MIB, PAGE, eventually

from .evicting import evict

COUNT = 128  # clusters; half of them fit
LIMIT = COUNT * CLUSTER // 2


def text(cluster: int) -> bytes:
    return b"%07d\n" % cluster * (CLUSTER // 8)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    monkeypatch.setattr(reclaim, "anonymous_bytes", lambda: 0)
    made = Device("paged", 4 * COUNT * CLUSTER, Budget(LIMIT))
    yield made
    made.close()


@asynccontextmanager
async def reclaiming(device: Device) -> AsyncIterator[Reclaimer]:
    reclaimer = Reclaimer(device.budget, lambda: [device])
    reclaimer.start()
    try:
        yield reclaimer
    finally:
        await reclaimer.stop()


async def write(device: Device, cluster: int, content: bytes) -> None:
    """Like a client that waits for memory."""
    async with asyncio.timeout(20):
        while True:
            try:
                device.write(cluster * CLUSTER, content)
                return
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                await asyncio.sleep(0.001)


class Once:
    """What is called in another's place: the first few times it raises."""

    def __init__(self, error: BaseException, real: Callable[..., Any], times: int = 1) -> None:
        self.left = times
        self._error, self._real = error, real

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self.left > 0:
            self.left -= 1
            raise self._error
        return self._real(*arguments, **named)


def in_a_worker(reclaimer: Reclaimer, device: Device, patch: pytest.MonkeyPatch) -> Once:
    once = Once(lz4.block.LZ4BlockError("what?"), device.codec.encode, 20)
    patch.setattr(device.codec, "encode", once)
    return once


def no_memory_in_a_worker(reclaimer: Reclaimer, device: Device, patch: pytest.MonkeyPatch) -> Once:
    once = Once(MemoryError(), device.codec.encode)
    patch.setattr(device.codec, "encode", once)
    return once


def no_memory_for_a_file(reclaimer: Reclaimer, device: Device, patch: pytest.MonkeyPatch) -> Once:
    once = Once(OSError(errno.ENOMEM, "Cannot allocate memory"), device.ram.store, 40)
    patch.setattr(device.ram, "store", once)
    return once


def no_thread_can_be_started(reclaimer: Reclaimer, device: Device, patch: pytest.MonkeyPatch) -> Once:
    once = Once(RuntimeError("can't start new thread"), reclaimer._workers.submit, 3)
    patch.setattr(reclaimer._workers, "submit", once)
    return once


def a_thread_pool_that_is_broken(reclaimer: Reclaimer, device: Device, patch: pytest.MonkeyPatch) -> Once:
    once = Once(AssertionError("a thread that fails to start"), int)
    reclaimer._workers = ThreadPoolExecutor(1, initializer=once)
    return once


def in_the_clock(reclaimer: Reclaimer, device: Device, patch: pytest.MonkeyPatch) -> Once:
    once = Once(KeyError("where am I?"), reclaimer._clock.take)
    patch.setattr(reclaimer._clock, "take", once)
    return once


def in_settling(reclaimer: Reclaimer, device: Device, patch: pytest.MonkeyPatch) -> Once:
    once = Once(ValueError("operation forbidden on released memoryview object"), device.take_images, 3)
    patch.setattr(device, "take_images", once)
    return once


def in_measuring(reclaimer: Reclaimer, device: Device, patch: pytest.MonkeyPatch) -> Once:
    once = Once(OSError(errno.EMFILE, "Too many open files"), lambda: 0)
    patch.setattr(reclaim, "anonymous_bytes", once)
    return once


EXPECTED = (no_memory_for_a_file,)  # no surprises


@pytest.mark.parametrize(
    "surprise",
    [
        in_a_worker,
        no_memory_in_a_worker,
        no_memory_for_a_file,
        no_thread_can_be_started,
        a_thread_pool_that_is_broken,
        in_the_clock,
        in_settling,
        in_measuring,
    ],
)
async def test_no_surprise_ends_reclaim_and_each_is_logged_once(
    device: Device,
    surprise: Callable[[Reclaimer, Device, pytest.MonkeyPatch], Once],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with reclaiming(device) as reclaimer:
        once = surprise(reclaimer, device, monkeypatch)
        for cluster in range(COUNT):
            await write(device, cluster, text(cluster))
        await eventually(lambda: not once.left)
        for cluster in range(COUNT):
            await write(device, COUNT + cluster, text(cluster))
        await eventually(lambda: not device.reclaiming and device.budget.free_pages >= device.budget.wake_below)
        assert device.cold_pages * PAGE == device.ram.allocated_bytes()
    assert all(device.read(cluster * CLUSTER, CLUSTER) == text(cluster % COUNT) for cluster in range(2 * COUNT))
    assert caplog.text.count("reclaim had an error and goes on") == (surprise not in EXPECTED)


async def test_a_device_that_is_closed_while_it_is_compressed_does_not_end_reclaim(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    doomed = Device("doomed", MIB, device.budget)
    devices = [doomed, device]
    reclaimer = Reclaimer(device.budget, lambda: devices)
    encode = doomed.codec.encode
    begun, may_go = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(*arguments: Any) -> Any:
        loop.call_soon_threadsafe(begun.set)
        asyncio.run_coroutine_threadsafe(may_go.wait(), loop).result(20)
        return encode(*arguments)

    monkeypatch.setattr(doomed.codec, "encode", slow)
    doomed.write(0, bytes(CLUSTER - 1) + b"x")
    reclaimer.start()
    try:
        for cluster in range(COUNT // 2 - 6):
            device.write(cluster * CLUSTER, text(cluster))
        await asyncio.wait_for(begun.wait(), 20)
        devices.remove(doomed)
        may_go.set()
        await eventually(lambda: not doomed.reclaiming)
        doomed.close()
        for cluster in range(COUNT):
            await write(device, COUNT + cluster, text(cluster))
        assert device.cold_clusters
        assert all(device.read((COUNT + cluster) * CLUSTER, CLUSTER) == text(cluster) for cluster in range(COUNT))
    finally:
        may_go.set()
        await reclaimer.stop()


@pytest.mark.parametrize("hand_comes_by", [False, True])
def test_what_is_trimmed_and_written_anew_while_it_is_compressed_is_not_taken_for_what_it_was(
    device: Device, hand_comes_by: bool
) -> None:
    """Its word is the same as before, and it is as fresh."""
    reclaimer = Reclaimer(device.budget, lambda: [device])
    device.write(0, b"old " * (CLUSTER // 4))
    jobs, _ = reclaimer._pick(images=False)
    assert [job.cluster for job in jobs] == [0]
    reclaim._store(jobs)
    for _ in device.trim(0, CLUSTER):
        pass
    device.write(0, b"new " * (CLUSTER // 4))
    assert device.words[0] == jobs[0].word
    while hand_comes_by:
        found, came_round = reclaimer._pick(images=False)
        assert not found
        hand_comes_by = not came_round
    reclaimer._settle(jobs)
    assert reclaimer.counters.thrown_away == 1
    assert device.read(0, CLUSTER) == b"new " * (CLUSTER // 4)


async def test_clusters_that_are_touched_all_the_time_are_no_reason_to_give_up(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They compress well: as soon as they are left alone, there is memory."""
    count = LIMIT // CLUSTER - 6
    for cluster in range(count):
        device.write(cluster * CLUSTER, text(cluster))
    async with reclaiming(device) as reclaimer:
        monkeypatch.setattr(reclaim, "_HOPELESS_S", 20.0)
        reclaimer._wanted.set()
        for _ in range(30):
            device.references[:count] = bytes((Reference.TOUCHED,)) * count
            assert device.budget.hopeful
            await asyncio.sleep(0)
        await eventually(lambda: device.budget.free_pages >= device.budget.wake_below)


async def test_what_does_not_compress_is_hopeless_until_it_is_trimmed(device: Device) -> None:
    noise = random.Random(1).randbytes(CLUSTER)
    async with reclaiming(device):
        written = 0
        while device.budget.hopeful:
            try:
                device.write(written * CLUSTER, noise)
                written += 1
            except OSError:
                await asyncio.sleep(0.001)
        assert {device.references[cluster] for cluster in range(written)} == {Reference.STUCK}
        list(device.trim(0, 4 * CLUSTER))
        await write(device, written, noise)
    assert device.read(4 * CLUSTER, CLUSTER) == device.read(written * CLUSTER, CLUSTER) == noise


async def test_a_lowered_budget_is_reached_and_a_raised_one_is_used(device: Device) -> None:
    async with reclaiming(device):
        for cluster in range(COUNT // 2 - 10):
            await write(device, cluster, text(cluster))
        device.budget.set_limit(LIMIT // 4)
        assert device.budget.free_pages < 0
        with pytest.raises(OSError, match="budget"):
            device.write(COUNT * CLUSTER, b"x")
        await eventually(lambda: device.budget.free_pages > 0)
        await write(device, COUNT, text(COUNT))
        assert (device.resident_pages + device.cold_pages + device.index_pages) * PAGE <= LIMIT // 4
        device.budget.set_limit(4 * LIMIT)
        for cluster in range(COUNT):
            device.write(cluster * CLUSTER, text(cluster + 1))
    tiers = {tier for _, _, tier in device.extents(0, COUNT * CLUSTER)}
    assert tiers == {Tier.RESIDENT}


async def test_a_budget_smaller_than_one_batch_is_enough_for_one_write_after_the_other(device: Device) -> None:
    device.budget.set_limit(6 * CLUSTER)
    async with reclaiming(device):
        for cluster in range(40):
            await write(device, cluster, text(cluster))
            assert device.budget.free_pages >= 0
    assert all(device.read(cluster * CLUSTER, CLUSTER) == text(cluster) for cluster in range(40))


async def test_what_would_not_compress_is_tried_again_when_it_was_written_not_when_it_was_read(device: Device) -> None:
    noise = random.Random(7).randbytes(CLUSTER)
    async with reclaiming(device) as reclaimer:
        device.write(0, noise)
        for cluster in range(1, COUNT):
            await write(device, cluster, text(cluster))
        await eventually(lambda: device.references[0] == Reference.STUCK)
        for touched in (False, True):
            assert device.is_resident(0, CLUSTER) if touched else device.read(0, CLUSTER) == noise
            for cluster in range(1, COUNT):
                await write(device, cluster, text(cluster))
        assert reclaimer.counters.incompressible == 1
        device.write(0, noise)
        for cluster in 2 * [*range(1, COUNT)]:  # what was touched has a second chance
            await write(device, cluster, text(cluster))
        await eventually(lambda: reclaimer.counters.incompressible == 2)


async def test_what_is_read_again_takes_the_place_of_what_is_not_though_the_budget_is_used_up(device: Device) -> None:
    async with reclaiming(device):
        for cluster in range(3 * COUNT):
            await write(device, cluster, text(cluster))
        for first in (0, COUNT):
            pages = range(first * CLUSTER, (first + 24) * CLUSTER, PAGE)

            def all_resident(pages: range = pages) -> bool:
                for page in pages:
                    assert device.read(page, PAGE) == text(page // CLUSTER)[:PAGE]
                return all(device.is_resident(page, page + PAGE) for page in pages)

            await eventually(all_resident)


class Looks:
    """How often reclaim has looked for victims, and the process was measured; the latter as often as can be."""

    def __init__(self, reclaimer: Reclaimer, patch: pytest.MonkeyPatch) -> None:
        self.taken = self.found = self.measured = self.overhead = self.verdicts = 0
        for clock in (reclaimer._clock, reclaimer._image_clock):
            patch.setattr(clock, "take", partial(self._take, clock.take))
        patch.setattr(reclaimer._verdict, "pass_on", partial(self._judge, reclaimer._verdict.pass_on))
        patch.setattr(reclaim, "anonymous_bytes", self._measure)
        patch.setattr(reclaim, "_MEASURE_S", 0.0)
        patch.setattr(reclaim, "_MEASURE_BUSY_S", 0.0)

    def _take(self, real: Callable[..., Any], *arguments: Any) -> Any:
        self.taken += 1
        victims, came_round = real(*arguments)
        self.found += len(victims)
        return victims, came_round

    def _judge(self, real: Callable[..., Any], free: int) -> None:
        self.verdicts += 1
        real(free)

    def _measure(self) -> int:
        self.measured += 1
        return self.overhead

    async def while_idle(self) -> int:
        """How often it looks while a long time passes, as reclaim counts it."""
        taken, until = self.taken, self.measured + 500
        await eventually(lambda: self.measured >= until)
        return self.taken - taken


async def test_a_full_server_that_nobody_uses_looks_for_memory_once_and_not_all_the_time(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = random.Random(1).randbytes(CLUSTER)
    monkeypatch.setattr(verdict, "_FIRST_S", 1000.0)
    monkeypatch.setattr(reclaim, "_VERDICT_S", 0.0)
    async with reclaiming(device) as reclaimer:
        looks = Looks(reclaimer, monkeypatch)
        budget = device.budget

        async def looks_once(work: Callable[[], object]) -> None:
            before = looks.verdicts
            work()
            await eventually(lambda: looks.verdicts > before and budget.hopeful)
            assert budget.free_pages < budget.wake_below
            assert await looks.while_idle() == 0

        def fill() -> None:
            for cluster in range(LIMIT // CLUSTER - 5):
                device.write(cluster * CLUSTER, noise)

        def be_refused() -> None:
            with pytest.raises(OSError, match="budget"):
                device.write(COUNT * CLUSTER, noise)

        def grow() -> None:
            looks.overhead += MIB // 4

        await looks_once(fill)
        await looks_once(grow)
        await looks_once(be_refused)
        budget.set_limit(4 * LIMIT)
        await looks.while_idle()
        await looks_once(lambda: budget.set_limit(LIMIT))  # as short as it was, but a new case


async def test_images_that_have_nowhere_to_go_are_not_looked_through(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be a million of them."""
    async with reclaiming(device) as reclaimer:
        device.budget.set_limit(LIMIT // 8)
        looks = Looks(reclaimer, monkeypatch)
        cluster = 0
        while device.budget.hopeful:
            with suppress(OSError):
                device.write(cluster * CLUSTER, text(cluster))
                cluster += 1
            await asyncio.sleep(0)
        assert device.cold_clusters > 64
        device.budget.set_limit(LIMIT // 16)
        found = looks.found
        assert await reclaimer._balance() is False
        assert looks.found - found < 16


async def test_no_more_is_taken_from_those_who_read_than_is_wanted(device: Device) -> None:
    device.budget.set_limit(4 * LIMIT)
    for cluster in range(COUNT):
        await write(device, cluster, text(cluster))
        assert evict(device, cluster)
    for _ in range(3):
        for cluster in range(COUNT):
            assert device.read(cluster * CLUSTER, CLUSTER) == text(cluster)
    assert device.resident_pages == COUNT * CLUSTER // PAGE
    device.references[:COUNT] = bytes((Reference.IDLE,)) * COUNT
    async with reclaiming(device) as reclaimer:
        while device.budget.free_pages >= device.budget.wake_below:  # which follows the limit
            device.budget.set_limit((device.budget.used_pages + device.budget.wake_below - 1) * PAGE)
        device.budget.take(0)
        wanted = device.budget.stop_above - device.budget.free_pages
        await eventually(lambda: device.budget.free_pages >= device.budget.stop_above)
        await asyncio.sleep(0.05)
        assert 0 < reclaimer.counters.dropped_clean <= 1 + wanted * PAGE // CLUSTER + BATCH


async def test_a_fast_writer_finds_reclaim_at_work_before_memory_is_short(device: Device) -> None:
    async with reclaiming(device) as reclaimer:
        for cluster in range(COUNT):
            await write(device, cluster, text(cluster))
            assert device.budget.free_pages >= device.budget.wake_below
            await asyncio.sleep(0.01)
            if reclaimer.counters.compressed:
                return
    pytest.fail("nothing was compressed")


def test_a_verdict_is_believed_longer_each_time_until_it_is_lifted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("nbdram.memory.verdict.time.monotonic", lambda: now)
    judge = verdict.Verdict()
    assert not judge.stands(0)
    pauses = []
    for _ in range(10):
        judge.pass_on(50)
        begun = now
        while judge.stands(50):
            now += 0.25
        pauses.append(now - begun)
    assert pauses == [0.5, 1, 2, 4, 8, 16, 32, 60, 60, 60]
    judge.lift()
    judge.pass_on(50)
    assert judge.stands(50)
    assert not judge.stands(49), "there is less than it was about"
    now += 0.5
    assert not judge.stands(50)
