"""READs that wait for one image: answered without a task, all of a turn of the loop at once, and never with what is
not there any more."""

import asyncio
import errno
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdram.memory import fetch
from nbdram.memory.codec import IntegrityError
from nbdram.memory.tiers.disk import SwapArea
from nbdram.protocol.handshake import ReplyMode
from nbdram.protocol.wire import Command
from nbdram.server.commands import ShortRead
from tests.helpers import ALL_MODES, CLUSTER, MIB, PAGE, eventually
from tests.memory.slow_disk import SlowDisk, begun
from tests.server.wired import Wire, wired

MODES = pytest.mark.parametrize("mode", ALL_MODES, ids=[mode.value for mode in ALL_MODES])
SIZE = 4 * MIB
TURNS = 24
NOISE = [random.Random(seed).randbytes(CLUSTER) for seed in range(8)]


def content(cluster: int) -> bytes:
    return b"%08d" % cluster + NOISE[cluster % 8][8:]


@pytest.fixture
def area(tmp_path: Path) -> Iterator[SwapArea]:
    made = SwapArea(tmp_path, 0)
    yield made
    made.close()


@asynccontextmanager
async def cold(mode: ReplyMode, area: SwapArea) -> AsyncIterator[tuple[Wire, SlowDisk]]:
    """A connection to a device that is on disk as a whole; nothing is read before it may."""
    with pytest.MonkeyPatch.context() as patch:
        async with wired(mode, size=SIZE, disks=[area]) as (wire, device):
            slow = SlowDisk(device, patch)
            for cluster in range(SIZE // CLUSTER):
                slow.put(cluster, content(cluster))
            slow.may_go.clear()
            try:
                yield wire, slow
            finally:
                slow.may_go.set()


def ask(wire: Wire, *clusters: int, length: int = PAGE) -> None:
    wire.feed_one(b"".join(wire.client.request(Command.READ, at * CLUSTER, length) for at in clusters))


def short_reads(wire: Wire) -> int:
    return sum(isinstance(work, ShortRead) for work in wire.connection._tasks)


def all_given_back(wire: Wire) -> bool:
    fetcher = wire.connection.fetcher
    return fetcher.short_turns._value == TURNS and fetcher.holding._pages == 0


async def answers(wire: Wire, count: int) -> list[tuple[int, bytes]]:
    return [(answer.error, answer.data) for _, answer in sorted((await wire.client.replies(count)).items())]


@MODES
async def test_more_reads_than_may_wait_at_once_are_all_answered(mode: ReplyMode, area: SwapArea) -> None:
    async with cold(mode, area) as (wire, slow):
        ask(wire, *range(2 * TURNS))
        assert short_reads(wire) == TURNS
        assert len(wire.connection._tasks) == 2 * TURNS
        slow.may_go.set()
        assert await answers(wire, 2 * TURNS) == [(0, content(cluster)[:PAGE]) for cluster in range(2 * TURNS)]
        await eventually(lambda: not wire.connection._tasks)
        assert all_given_back(wire)


@pytest.fixture
def arrived(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What the loop is to be told; the test tells it."""
    told: list[Callable[[], None]] = []

    class Mailbox:
        def callback(self, tell: Callable[..., None]) -> Callable[..., None]:
            def came(*found: Any) -> None:
                told.append(lambda: tell(*found))

            return came

    monkeypatch.setattr(fetch, "Mailbox", Mailbox)
    return told


async def test_what_has_come_in_one_turn_is_sent_at_once(
    area: SwapArea, arrived: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cold(ReplyMode.SIMPLE, area) as (wire, slow):
        sent: list[int] = []
        send = wire.connection._send

        def counted(buffers: list[Any]) -> None:
            sent.append(len(buffers))
            send(buffers)

        monkeypatch.setattr(wire.connection, "_send", counted)
        ask(wire, 1, 2, 3)
        slow.may_go.set()
        await eventually(lambda: len(arrived) == 3)
        for tell in arrived:
            tell()
        assert not sent
        assert await answers(wire, 3) == [(0, content(cluster)[:PAGE]) for cluster in (1, 2, 3)]
        assert sent == [6]  # a header and a page each
        assert not slow.device.senders


async def test_what_is_about_to_be_sent_is_copied_before_its_pages_go(
    area: SwapArea, arrived: list[Callable[[], None]]
) -> None:
    async with cold(ReplyMode.SIMPLE, area) as (wire, slow):
        ask(wire, 5)
        slow.may_go.set()
        await eventually(lambda: len(arrived) == 1)
        arrived[0]()
        assert slow.device.resident_pages == 1
        for _ in slow.device.trim(5 * CLUSTER, 6 * CLUSTER):
            pass
        assert await answers(wire, 1) == [(0, content(5)[:PAGE])]


@MODES
async def test_an_image_that_was_replaced_meanwhile_is_read_again(mode: ReplyMode, area: SwapArea) -> None:
    async with cold(mode, area) as (wire, slow):
        ask(wire, 3, length=CLUSTER)
        await begun(slow, 1)
        slow.put(3, content(4))
        slow.may_go.set()
        assert await answers(wire, 1) == [(0, content(4))]
        assert slow.device.integrity_errors == 0
        assert all_given_back(wire)


@MODES
async def test_an_image_that_is_damaged_is_an_error_of_those_who_read_it(mode: ReplyMode, area: SwapArea) -> None:
    async with cold(mode, area) as (wire, slow):
        slow.error = IntegrityError("an image on disk is not what was stored")
        ask(wire, 3, 3)
        slow.may_go.set()
        assert [error for error, _ in await answers(wire, 2)] == [errno.EIO] * 2
        slow.error = None
        ask(wire, 3)
        assert await answers(wire, 1) == [(0, content(3)[:PAGE])]
        assert all_given_back(wire)


async def test_a_client_that_hangs_up_gives_back_what_it_held(area: SwapArea) -> None:
    async with cold(ReplyMode.SIMPLE, area) as (wire, slow):
        ask(wire, 1, 2, 3)
        assert not all_given_back(wire)
        wire.connection.connection_lost(None)
        assert all_given_back(wire)
        slow.may_go.set()
        await eventually(lambda: not wire.connection.fetcher.is_reading(slow.device))
        assert all_given_back(wire)


async def test_an_error_of_ours_ends_the_connection_and_not_those_of_others(
    area: SwapArea, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with cold(ReplyMode.SIMPLE, area) as (wire, slow):
        fetcher = wire.connection.fetcher
        ask(wire, 3)
        other = asyncio.create_task(fetcher.fetch(slow.device, 3))
        await begun(slow, 1)
        monkeypatch.setattr(slow.device, "read_fetched", lambda *_: 1 / 0)
        slow.may_go.set()
        assert (await other).content == content(3)
        await eventually(lambda: wire.closed)
        assert "a request failed unexpectedly" in caplog.text
        assert all_given_back(wire)
