"""Major faults: one read per image, and never the content of an image that is not the cluster's any more."""

import asyncio
import errno
import os
import random
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdram.memory.budget import Budget
from nbdram.memory.codec import IntegrityError
from nbdram.memory.device import Piece
from nbdram.memory.fetch import Fetcher
from nbdram.memory.layout import LENGTH_SHIFT
from nbdram.memory.readahead import ReadAhead
from nbdram.memory.tiers.disk import SwapArea
from nbdram.server.exports import Exports
from tests.helpers import CLUSTER, MIB, PAGE
from tests.memory.slow_disk import SlowDisk, begun

OLD, NEW = (random.Random(seed).randbytes(CLUSTER) for seed in (1, 2))


@pytest.fixture
def fetcher() -> Iterator[Fetcher]:
    made = Fetcher()
    yield made
    made.close()


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDisk]:
    area = SwapArea(tmp_path, 0)
    exports = Exports(Budget(64 * MIB), [area])
    yield SlowDisk(exports.create("slow", MIB).device, monkeypatch)
    exports.close()
    area.close()


def joined(pieces: list[Piece]) -> bytes:
    return b"".join(b"".join(buffers) if buffers else bytes(end - start) for start, end, buffers in pieces)


async def test_however_many_want_an_image_it_is_read_once(slow: SlowDisk, fetcher: Fetcher) -> None:
    slow.put(3, OLD)
    slow.may_go.clear()
    reads = [asyncio.create_task(fetcher.gather(slow.device, 3 * CLUSTER, 4 * CLUSTER)) for _ in range(20)]
    await begun(slow, 1)
    slow.may_go.set()
    for read in reads:
        assert joined(await read) == OLD
    assert slow.loads == 1


@pytest.mark.parametrize("after_reading", [True, False])
async def test_an_image_that_was_replaced_by_one_as_long_in_its_slot_is_read_again(
    slow: SlowDisk, fetcher: Fetcher, after_reading: bool
) -> None:
    slow.put(3, OLD)
    before = slow.device.word(3)
    slow.may_go.clear()
    slow.after_reading = after_reading
    read = asyncio.create_task(fetcher.gather(slow.device, 3 * CLUSTER, 4 * CLUSTER))
    await begun(slow, 1)
    slow.put(3, NEW)
    assert slow.device.word(3) == before, "the word does not tell them apart"
    slow.may_go.set()
    assert joined(await read) == NEW
    assert slow.device.integrity_errors == 0


async def test_an_image_that_was_replaced_is_not_installed_for_a_write(slow: SlowDisk, fetcher: Fetcher) -> None:
    slow.put(3, OLD)
    slow.may_go.clear()
    edge = asyncio.create_task(fetcher.fetch_edges(slow.device, 3 * CLUSTER + 10, 3 * CLUSTER + 20))
    await begun(slow, 1)
    slow.put(3, NEW)
    slow.may_go.set()
    await edge
    assert slow.device.read(3 * CLUSTER, CLUSTER) == NEW


async def test_an_image_that_went_away_while_it_could_not_be_read_is_no_error(slow: SlowDisk, fetcher: Fetcher) -> None:
    slow.put(3, OLD)
    slow.may_go.clear()
    slow.error = IntegrityError("an image on disk is not what was stored")
    read = asyncio.create_task(fetcher.gather(slow.device, 3 * CLUSTER, 4 * CLUSTER))
    await begun(slow, 1)
    slow.device.write(3 * CLUSTER, NEW)
    slow.may_go.set()
    assert joined(await read) == NEW
    assert slow.device.integrity_errors == 0


async def test_a_read_error_is_everybodys_who_waits_but_not_of_those_who_come_later(
    slow: SlowDisk, fetcher: Fetcher, caplog: pytest.LogCaptureFixture
) -> None:
    slow.put(3, OLD)
    slow.may_go.clear()
    slow.error = IntegrityError("an image on disk is not what was stored")
    reads = [asyncio.create_task(fetcher.gather(slow.device, 3 * CLUSTER, 4 * CLUSTER)) for _ in range(5)]
    await begun(slow, 1)
    slow.may_go.set()
    for read in reads:
        with pytest.raises(IntegrityError):
            await read
    assert caplog.text.count("the data at offset 196608 is lost") == 1
    slow.error = None
    assert joined(await fetcher.gather(slow.device, 3 * CLUSTER, 4 * CLUSTER)) == OLD


async def test_who_waits_for_an_error_gets_it_without_the_frames_of_the_others(
    slow: SlowDisk, fetcher: Fetcher
) -> None:
    slow.put(3, OLD)
    slow.may_go.clear()
    slow.error = OSError(errno.EIO, "a bad block")
    reads = [asyncio.create_task(fetcher.fetch(slow.device, 3)) for _ in range(5)]
    await begun(slow, 1)
    slow.may_go.set()
    await asyncio.wait(reads)
    errors = [read.exception() for read in reads]
    frames = [len(traceback.extract_tb(error.__traceback__)) for error in errors if error]
    assert frames == [1] * 5


async def test_a_reader_that_breaks_is_an_error_of_the_disk(slow: SlowDisk, fetcher: Fetcher) -> None:
    slow.put(3, OLD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slow.device, "load_image", lambda *_: 1 // 0)
        with pytest.raises(OSError, match="ZeroDivisionError") as caught:
            await fetcher.gather(slow.device, 3 * CLUSTER, 4 * CLUSTER)
    assert caught.value.errno == errno.EIO
    assert joined(await fetcher.gather(slow.device, 3 * CLUSTER, 4 * CLUSTER)) == OLD


async def test_a_page_that_is_asked_for_becomes_resident_alone(slow: SlowDisk, fetcher: Fetcher) -> None:
    slow.put(3, OLD)
    at = 3 * CLUSTER + 5 * PAGE
    assert joined(await fetcher.gather(slow.device, at + 7, at + 9)) == OLD[5 * PAGE + 7 : 5 * PAGE + 9]
    assert slow.device.resident_pages == 1
    assert slow.device.word(3) >> LENGTH_SHIFT


async def test_an_edge_for_which_there_is_no_memory_is_enospc(slow: SlowDisk, fetcher: Fetcher) -> None:
    slow.put(3, OLD)
    slow.device.budget.set_limit((slow.device.budget.used_pages) * PAGE)
    with pytest.raises(OSError, match="budget") as caught:
        await fetcher.fetch_edges(slow.device, 3 * CLUSTER + 10, 3 * CLUSTER + 20)
    assert caught.value.errno == errno.ENOSPC


async def test_who_comes_when_the_reading_is_just_over_gets_what_was_read(slow: SlowDisk, fetcher: Fetcher) -> None:
    slow.put(3, OLD)
    read: list[Callable[[], None]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetcher._mailbox, "callback", lambda tell: lambda *found: read.append(lambda: tell(*found)))
        first = asyncio.create_task(fetcher.fetch(slow.device, 3))
        while not read:
            await asyncio.sleep(0.001)
        edges = asyncio.create_task(fetcher.fetch_edges(slow.device, 3 * CLUSTER + 1, 3 * CLUSTER + 2))
        await asyncio.sleep(0)
        read[0]()  # the loop is told just now
        await edges
        assert slow.device.read(3 * CLUSTER, PAGE) == OLD[:PAGE]
        assert (await first).content == OLD
    assert slow.loads == 1


# -- what the kernel has at hand ------------------------------------------------------------------------


async def test_what_the_kernel_has_in_its_cache_needs_no_thread(
    slow: SlowDisk, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv
    asked: list[int] = []

    def preadv(fd: int, buffers: list[bytearray], offset: int, flags: int = 0) -> int:
        """From the real file, as file systems do that have such reads, and when it is in the page cache."""
        asked.append(flags)
        return real(fd, buffers, offset)

    slow.put(3, OLD)
    monkeypatch.setattr(slow.device.disk, "load_now", slow.load_now)
    monkeypatch.setattr(os, "preadv", preadv)
    images = fetcher.at_hand(slow.device, 3 * CLUSTER, 4 * CLUSTER)
    assert images
    assert images[3].content == OLD
    del images
    assert joined(await fetcher.gather(slow.device, 3 * CLUSTER, 4 * CLUSTER)) == OLD
    assert slow.loads == 0
    assert fetcher.fetched == slow.device.disk_faults == 2
    assert asked == [os.RWF_NOWAIT, os.RWF_NOWAIT]


async def test_whatever_the_kernel_says_without_waiting_a_thread_reads_the_rest(
    slow: SlowDisk, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow.put(3, OLD)
    assert slow.device.disk
    assert slow.load_now(3, 0, CLUSTER) in (OLD, None), "some file systems have no such reads"
    found = 0

    def load_now(cluster: int, slot: int, length: int) -> bytes | None:
        nonlocal found
        image = slow.load_now(cluster, slot, length)
        found += image is not None
        return image

    monkeypatch.setattr(slow.device.disk, "load_now", load_now)
    assert joined(await fetcher.gather(slow.device, 3 * CLUSTER, 4 * CLUSTER)) == OLD
    assert found + slow.loads == fetcher.fetched == 1


@pytest.mark.parametrize("found", [BlockingIOError(errno.EAGAIN, "not now"), OSError(errno.EOPNOTSUPP, "no"), 4096])
async def test_what_would_wait_for_the_disk_is_read_by_a_thread(
    slow: SlowDisk, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch, found: OSError | int
) -> None:
    def preadv(fd: int, buffers: list[bytearray], offset: int, flags: int = 0) -> int:
        assert flags == os.RWF_NOWAIT
        if isinstance(found, OSError):
            raise found
        return found

    slow.put(3, OLD)
    monkeypatch.setattr(slow.device.disk, "load_now", slow.load_now)
    monkeypatch.setattr(os, "preadv", preadv)
    assert fetcher.at_hand(slow.device, 3 * CLUSTER, 4 * CLUSTER) is None
    assert joined(await fetcher.gather(slow.device, 3 * CLUSTER, 4 * CLUSTER)) == OLD
    assert slow.loads == 1


async def test_damage_that_is_at_hand_is_found_and_told(
    slow: SlowDisk, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow.put(3, OLD)
    assert slow.device.disk
    monkeypatch.setattr(slow.device.disk, "load_now", slow.load_now)
    os.pwrite(slow.device.disk.files[0], b"?" * 64, 2 * 3 * (CLUSTER + PAGE) + 1000)
    assert fetcher.at_hand(slow.device, 3 * CLUSTER, 4 * CLUSTER) is None
    with pytest.raises(IntegrityError):
        await fetcher.gather(slow.device, 3 * CLUSTER, 4 * CLUSTER)
    assert slow.device.integrity_errors == 1


def test_an_image_that_is_not_there_is_not_looked_for_in_ram(slow: SlowDisk) -> None:
    slow.put(3, OLD)
    with pytest.raises(IntegrityError):
        slow.device.decode(3, slow.device.word(3), 0, PAGE, b"")


# -- reading ahead -------------------------------------------------------------------------------------


async def read_in_order(slow: SlowDisk, fetcher: Fetcher, ahead: ReadAhead, step: int, end: int) -> None:
    for at in range(0, end, step):
        ahead.follow(slow.device, at, at + step)
        cluster = at // CLUSTER
        content = random.Random(cluster).randbytes(CLUSTER)[at % CLUSTER : at % CLUSTER + step]
        assert joined(await fetcher.gather(slow.device, at, at + step)) == content


@pytest.fixture
def full(slow: SlowDisk) -> SlowDisk:
    """All of the device is on disk, and there is no memory to make it resident."""
    for cluster in range(MIB // CLUSTER):
        slow.put(cluster, random.Random(cluster).randbytes(CLUSTER))
    budget = slow.device.budget
    budget.attach(lambda: None)
    budget.set_overhead(budget.limit_pages - budget.used_pages - budget.wake_below)
    while budget.free_pages > budget.wake_below:
        budget.take(1)
    return slow


@pytest.mark.parametrize("step", [PAGE, CLUSTER])
async def test_a_client_that_reads_in_order_has_each_image_read_once(
    full: SlowDisk, fetcher: Fetcher, step: int
) -> None:
    await read_in_order(full, fetcher, ReadAhead(fetcher), step, MIB)
    assert full.loads <= MIB // CLUSTER + 1  # the first one before it was known that the client goes on
    assert full.device.resident_pages == 0


async def test_what_comes_next_is_read_while_the_client_has_not_asked_for_it(full: SlowDisk, fetcher: Fetcher) -> None:
    ahead = ReadAhead(fetcher)
    await read_in_order(full, fetcher, ahead, CLUSTER, 3 * CLUSTER)
    await begun(full, 3 + 4)  # the window has doubled once
    while fetcher.is_reading(full.device):
        await asyncio.sleep(0.001)
    assert full.loads == 3 + 4
    images = fetcher.at_hand(full.device, 3 * CLUSTER, 4 * CLUSTER)
    assert images
    assert list(images) == [3]


async def test_a_client_that_jumps_about_has_nothing_read_ahead(full: SlowDisk, fetcher: Fetcher) -> None:
    ahead = ReadAhead(fetcher)
    for loads, cluster in enumerate((7, 3, 9, 1, 5), 1):
        ahead.follow(full.device, cluster * CLUSTER, (cluster + 1) * CLUSTER)
        await fetcher.gather(full.device, cluster * CLUSTER, (cluster + 1) * CLUSTER)
        assert full.loads == loads


async def test_an_image_that_was_read_ahead_is_forgotten_when_its_cluster_is_written(
    full: SlowDisk, fetcher: Fetcher
) -> None:
    ahead = ReadAhead(fetcher)
    await read_in_order(full, fetcher, ahead, CLUSTER, 2 * CLUSTER)
    await begun(full, 4)
    full.device.budget.set_limit(128 * MIB)
    full.put(3, NEW)
    assert joined(await fetcher.gather(full.device, 3 * CLUSTER, 4 * CLUSTER)) == NEW


async def test_a_disk_that_fails_ahead_of_the_client_fails_nobody_who_does_not_come(
    full: SlowDisk, fetcher: Fetcher
) -> None:
    ahead = ReadAhead(fetcher)
    await read_in_order(full, fetcher, ahead, CLUSTER, CLUSTER)
    full.error = OSError(errno.EIO, "a bad block")
    ahead.follow(full.device, CLUSTER, 2 * CLUSTER)
    await begun(full, 4)
    while fetcher.is_reading(full.device):
        await asyncio.sleep(0.001)
    full.error = None
    await read_in_order(full, fetcher, ReadAhead(fetcher), CLUSTER, MIB)
    assert full.device.integrity_errors == 0
