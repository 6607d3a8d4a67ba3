"""Paging as clients see it: whatever the disk does and however little memory there is, reads are right or an error."""

import asyncio
import errno
import os
import random
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from nbdram.config import SwapSettings
from nbdram.memory import reclaim
from nbdram.memory.layout import SLOT_SHIFT, TIER_MASK, TIER_SHIFT, Tier
from nbdram.protocol.handshake import ReplyMode
from nbdram.protocol.wire import Command
from tests.helpers import ALL_MODES, CLUSTER, KIB, MIB, PAGE, Client, Served, eventually, served
from tests.memory.tiers.mounts import mounted
from tests.memory.tiers.rigs import swap_files
from tests.server.paged import Owner, flaky_disk, together

RUNS = int(os.environ.get("NBDRAM_TEST_PAGING_RUNS", "3"))
NOISE = [random.Random(seed).randbytes(CLUSTER) for seed in range(16)]


@pytest.fixture(autouse=True)
def _only_devices_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process has taken for other tests is none of ours."""
    monkeypatch.setattr(reclaim, "anonymous_bytes", lambda: 0)


def check_books(server: Served) -> None:
    exports = server.server.exports
    devices = [export.device for export in exports]
    counted = sum(device.resident_pages + device.cold_pages + device.index_pages for device in devices)
    assert exports.budget.used_pages == counted
    for device in devices:
        assert device.ram.allocated_bytes() == device.cold_pages * PAGE


async def settled(server: Served) -> None:
    """Until no worker has anything to do."""
    exports, reclaimer = server.server.exports, server.server.reclaimer
    await eventually(lambda: not reclaimer._at_work and not any(export.device.reclaiming for export in exports))


def content(cluster: int) -> bytes:
    """Half of it does not compress."""
    return NOISE[cluster % 16][: CLUSTER // 2] + b"%08d" % cluster * (CLUSTER // 16)


@pytest.mark.parametrize("seed", range(RUNS))
async def test_random_load_on_a_disk_that_fails_at_random_with_memory_for_a_sixth(tmp_path: Path, seed: int) -> None:
    """Four clients on two exports; the budget goes up and down meanwhile. Each second run has a small disk besides."""
    size, limit = 24 * CLUSTER, MIB
    swap = [SwapSettings(tmp_path / "swap")]
    if seed % 2:
        swap.append(SwapSettings(tmp_path / "small", 8 * CLUSTER))
    mode = ALL_MODES[seed % 3]
    with flaky_disk(seed) as disk:
        async with (
            served(tmp_path, "a=1G", "b=1G,density", memory="1M", swap=tuple(swap), write_wait_s=0.5) as server,
            AsyncExitStack() as stack,
        ):
            budget = server.server.exports.budget
            owners = []
            for number in range(4):
                client = await stack.enter_async_context(await server.entered("ab"[number % 2], mode))
                owners.append(Owner(client, seed * size + number // 2 * 512 * MIB, size))

            async def change_budget() -> None:
                chance = random.Random(seed)
                while True:
                    budget.set_limit(chance.randrange(limit // 2, 2 * limit))
                    await asyncio.sleep(0.05)

            changing = asyncio.create_task(change_budget())
            stack.callback(changing.cancel)
            disk.well = False
            await together(owners, 120)
            changing.cancel()
            budget.set_limit(limit)
            disk.well = True
            for owner in owners:
                await owner.check(0, size)
            await settled(server)
            check_books(server)
            counters = server.server.reclaimer.counters
            assert min(counters.compressed, counters.demoted) > 0
            assert min(disk.failed.values()) > 0


async def test_a_disk_that_gets_full_while_it_is_demoted_to_loses_nothing_and_is_used_again_when_it_has_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with mounted(tmp_path, "ext4", size_bytes=8 * MIB) as point:
        swap = (SwapSettings(point),)
        async with served(tmp_path, "ram=1G", memory="4M", swap=swap, write_wait_s=0.0) as server:
            server.server.exports.budget.set_limit(4 * MIB)
            async with await server.entered() as client:
                written = 0
                refused = 0
                while refused < 20:  # until RAM is full too, with time for the disk to take what it can
                    answer = await client.call(Command.WRITE, written * CLUSTER, payload=content(written))
                    if answer.error:
                        assert answer.error == errno.ENOSPC
                        refused += 1
                        await settled(server)
                        await asyncio.sleep(0.01)
                    else:
                        written += 1
                assert written * CLUSTER // 2 > 7 * MIB
                assert caplog.text.count("can't write swap: No space left on device") == 1
                for cluster in range(written):
                    assert await client.read(cluster * CLUSTER, CLUSTER) == content(cluster)
                assert (await client.call(Command.TRIM, 0, written // 2 * CLUSTER)).error == 0

                async def fits_again() -> None:
                    answer = await client.call(Command.WRITE, 0, payload=content(1))
                    while answer.error:
                        await asyncio.sleep(0.01)
                        answer = await client.call(Command.WRITE, 0, payload=content(1))

                await asyncio.wait_for(fits_again(), 60)
                for cluster in range(written // 2, written):
                    assert await client.read(cluster * CLUSTER, CLUSTER) == content(cluster)


async def test_what_one_disk_has_no_room_for_goes_to_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    allowed = 2 * MIB
    with mounted(tmp_path, "ext4", size_bytes=8 * MIB) as point:
        swap = (SwapSettings(point), SwapSettings(tmp_path / "small", allowed), SwapSettings(tmp_path / "large"))
        async with served(tmp_path, "ram=1G", memory="4M", swap=swap) as server, await server.entered() as client:
            server.server.exports.budget.set_limit(4 * MIB)
            for cluster in range(768):
                await client.write(cluster * CLUSTER, NOISE[cluster % 16])
            full, small, large = server.server.areas
            assert caplog.text.count("can't write swap: No space left on device") == 1
            assert full.used_bytes > 4 * MIB
            assert allowed - MIB < small.used_bytes <= allowed
            assert large.used_bytes > 30 * MIB
            for cluster in range(768):
                assert await client.read(cluster * CLUSTER, CLUSTER) == NOISE[cluster % 16]
            assert (await client.call(Command.TRIM, 0, 768 * CLUSTER)).error == 0
            await settled(server)
            await eventually(lambda: not full.used_bytes + small.used_bytes + large.used_bytes)


async def filled(server: Served, client: Client, count: int, tier: Tier) -> dict[int, int]:
    """Clusters that are in a tier, and their words."""
    for cluster in range(count):
        await client.write(cluster * CLUSTER, content(cluster))
    await settled(server)
    device = next(iter(server.server.exports)).device
    words = {cluster: device.word(cluster) for cluster in range(count)}
    return {cluster: word for cluster, word in words.items() if word >> TIER_SHIFT & TIER_MASK == tier}


@pytest.mark.parametrize("how", ["a flipped bit in RAM", "a flipped bit on disk", "a file that others have cut off"])
async def test_damage_is_an_error_of_that_cluster_alone_until_it_is_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    tier = Tier.RAM if "RAM" in how else Tier.DISK
    async with served(tmp_path, "ram=1G", memory="4M", swap=(SwapSettings(tmp_path / "swap"),)) as server:
        server.server.exports.budget.set_limit(2 * MIB)
        device = next(iter(server.server.exports)).device
        async with await server.entered(mode=ReplyMode.STRUCTURED) as client:
            found = await filled(server, client, 128, tier)
            victim = max(found) if "cut off" in how else sorted(found)[len(found) // 2]
            slot = 2 * victim + (found[victim] >> SLOT_SHIFT & 1)
            if tier == Tier.RAM:
                flip(device.backing.cold_fd, slot * CLUSTER + 1000)
            else:
                (fd,) = swap_files(tmp_path / "swap")
                if "cut off" in how:
                    with open(f"/proc/self/fd/{fd}", "r+b") as file:
                        file.truncate(slot * (CLUSTER + PAGE))
                else:
                    flip(fd, slot * (CLUSTER + PAGE) + 1000)
            for at in (victim * CLUSTER, victim * CLUSTER + 4 * PAGE - 512):
                assert (await client.call(Command.READ, at, PAGE)).error == errno.EIO
            assert (await client.call(Command.READ, (victim - 1) * CLUSTER, 2 * CLUSTER)).error == errno.EIO
            assert (await client.call(Command.WRITE, victim * CLUSTER + 7, payload=b"a part")).error == errno.EIO
            for cluster in set(range(128)) - {victim}:
                assert await client.read(cluster * CLUSTER, CLUSTER) == content(cluster)
            if "cut off" not in how:  # that may pass, and is no reason to give the data up
                assert device.integrity_errors >= 4
                assert caplog.text.count(f"the data at offset {victim * CLUSTER} is lost") == 1
            await client.write(victim * CLUSTER, content(1))
            assert await client.read(victim * CLUSTER, CLUSTER) == content(1)


def flip(fd: int, offset: int) -> None:
    (byte,) = os.pread(fd, 1, offset)
    os.pwrite(fd, bytes((byte ^ 1,)), offset)


async def test_a_thousand_small_exports_share_one_budget(tmp_path: Path) -> None:
    """Each is written once; all of them together are four times what fits without compression."""
    async with served(tmp_path, "ram=1G", memory="16M") as server:
        exports = server.server.exports
        exports.budget.set_limit(16 * MIB)
        for number in range(1000):
            exports.create(f"small{number}", MIB)
        for number in range(1000):
            async with await server.entered(f"small{number}") as client:
                await client.write(0, b"%08d" % number * (64 * KIB // 8))
        await eventually(lambda: exports.budget.free_pages >= exports.budget.wake_below)
        for number in range(0, 1000, 7):
            async with await server.entered(f"small{number}") as client:
                assert await client.read(0, 64 * KIB) == b"%08d" % number * (64 * KIB // 8)
        await settled(server)
        check_books(server)
        assert server.server.reclaimer.counters.compressed > 700


async def test_an_export_whose_clients_never_stop_writing_does_not_starve_the_others(tmp_path: Path) -> None:
    """Eight connections write much more than fits; two others, which want a page now and then, get it each time."""
    async with served(tmp_path, "noisy=1G", "quiet=1G", memory="8M") as server:
        server.server.exports.budget.set_limit(8 * MIB)
        done = 0
        over = False

        async def noisy(number: int) -> None:
            nonlocal done
            async with await server.entered("noisy") as client:
                turn = 0
                while not over:
                    at = (number * 64 + turn % 64) * CLUSTER
                    answer = await client.call(Command.WRITE, at, payload=b"%08d" % turn * (4 * CLUSTER // 8))
                    assert answer.error == 0
                    turn, done = turn + 1, done + 1

        async def quiet(number: int) -> int:
            """How much the noisy ones have written while this one waited, at most."""
            most = 0
            async with await server.entered("quiet") as client:
                for turn in range(40):
                    before = done
                    await client.write((number * 40 + turn) * CLUSTER, b"%08d" % turn * (PAGE // 8))
                    most = max(most, done - before)
            return most

        writers = [asyncio.create_task(noisy(number)) for number in range(8)]
        await eventually(lambda: done > 300)
        waited = await asyncio.gather(quiet(0), quiet(1))
        over = True
        await asyncio.gather(*writers)
        assert max(waited) <= 64, "a few turns of each of the others"


@pytest.mark.parametrize("length", [8 * PAGE, 40 * CLUSTER], ids=["small", "large"])
async def test_a_state_directory_that_others_fill_is_enospc_and_no_page_is_lost(tmp_path: Path, length: int) -> None:
    new = b"n" * length
    with mounted(tmp_path, "tmpfs", "size=64m") as point:
        async with (
            served(tmp_path, "ram=32M", state_dir=point / "state", write_wait_s=0.1) as server,
            await server.entered() as client,
        ):
            await client.write(0, content(0))
            free = server.server.exports.budget.free_pages
            with (point / "other").open("wb", buffering=0) as other:
                while os.statvfs(point).f_bavail > 3:
                    other.write(bytes(PAGE))
                answer = await client.call(Command.WRITE, MIB, payload=new)
                assert answer.error == errno.ENOSPC
                assert await client.read(0, CLUSTER) == content(0)
                there = await client.read(MIB, length)
                pages = there.count(b"n") // PAGE
                assert there == new[: pages * PAGE] + bytes(length - pages * PAGE)
                assert server.server.exports.budget.free_pages == free - pages
            (point / "other").unlink()
            await client.write(MIB, new)
            assert await client.read(MIB, length) == new
