"""A client that does not read, or that sends more than anybody asked for, costs a bounded amount of memory."""

import asyncio
import errno
import gc
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nbdram.config import Limits
from nbdram.memory.budget import Budget
from nbdram.protocol.handshake import ReplyMode
from nbdram.protocol.wire import Command
from nbdram.server import commands
from nbdram.server.service import RECEIVE_BYTES
from tests.helpers import (
    ALL_MODES,
    CHUNK_MODES,
    GIB,
    KIB,
    MIB,
    PAGE,
    PATIENCE_S,
    Running,
    client_flags,
    eventually,
    go,
    request,
    running,
)
from tests.server.wired import Wire, wired

MODES = pytest.mark.parametrize("mode", ALL_MODES, ids=[mode.value for mode in ALL_MODES])
SIZE = 64 * MIB
MEMORY = 128 * MIB
# One batch: what a client that never reads may have waiting for it, besides what the socket takes.
BATCH_BYTES = 5 * MIB


def waiting_bytes(wire: Wire) -> int:
    connection = wire.connection
    return sum(map(len, connection._unsent)) + len(connection._held)


async def feed_until_paused(wire: Wire, data: bytes, times: int) -> int:
    """How many repetitions of `data` were taken before the connection would take no more."""
    for number in range(times):
        at = 0
        while at < len(data):
            if wire.paused:
                return number
            at += wire.feed_one(data[at:])
    return times


@MODES
@pytest.mark.parametrize("length", [16, PAGE, 256 * KIB, 8 * MIB])
async def test_reads_whose_replies_nobody_takes_stop_being_parsed(mode: ReplyMode, length: int) -> None:
    async with wired(mode, size=SIZE, memory=MEMORY) as (wire, device):
        device.write(0, bytes(range(1, 129)) * (8 * MIB // 128))
        wire.stop_reading()
        taken = await feed_until_paused(wire, request(mode, Command.READ, 0, length) * 64, 100_000)
        assert taken < 100_000
        assert waiting_bytes(wire) < BATCH_BYTES + length + RECEIVE_BYTES
        assert len(wire.connection._tasks) <= Limits().requests_in_flight


@MODES
@pytest.mark.parametrize(
    ("free_pages", "most"),
    [(8192, Limits().requests_in_flight), (200, 16), (0, 1), (-200, 1)],
    ids=["memory", "short", "used-up", "over"],
)
async def test_tasks_of_one_connection_are_bounded(mode: ReplyMode, free_pages: int, most: int) -> None:
    """Fewer where memory is short: the server's own are taken from the same budget."""
    async with wired(mode, size=SIZE, memory=MEMORY) as (wire, device):
        device.write(0, b"x")
        device.budget.give(free_pages - device.budget.free_pages)
        holes = [wire.client.request(Command.READ, 0, 300 * KIB) for _ in range(200)]
        wire.feed_one(b"".join(holes))
        assert wire.paused
        assert len(wire.connection._tasks) == most
        answers = await wire.client.replies(200)
        assert all(len(answer.data) == 300 * KIB for answer in answers.values())


@pytest.mark.parametrize("mode", CHUNK_MODES)
async def test_block_status_of_many_extents_is_answered_one_at_a_time(mode: ReplyMode) -> None:
    async with wired(mode, size=SIZE, memory=MEMORY, contexts=["base:allocation"]) as (wire, device):
        for page in range(0, SIZE // PAGE, 2):
            device.write(page * PAGE, b"x")
        wire.stop_reading()
        await feed_until_paused(wire, request(mode, Command.BLOCK_STATUS, 0, SIZE) * 64, 2)
        await eventually(lambda: waiting_bytes(wire) > 0)  # the socket is full
        for _ in range(3000):
            await asyncio.sleep(0)
        assert len(wire.connection._tasks) > 50
        assert waiting_bytes(wire) < MIB


@MODES
async def test_a_client_that_sends_without_a_pause_lets_others_have_their_turn(mode: ReplyMode) -> None:
    async with wired(mode, size=SIZE, memory=MEMORY) as (wire, device):
        payload = bytes(range(1, 129)) * (8 * MIB // 128)
        data = wire.client.request(Command.WRITE, 0, payload=payload)
        at = turns = 0
        while at < len(data):
            taken = 0
            while at < len(data) and not wire.paused:
                taken += (fed := wire.feed_one(data[at:]))
                at += fed
            assert taken <= MIB + 256 * KIB  # the last receive may be as large as its buffer
            turns += wire.paused
            await asyncio.sleep(0)
        assert turns >= 8
        assert [answer.error for answer in (await wire.client.replies(1)).values()] == [0]
        assert device.read(0, 8 * MIB) == payload


@MODES
async def test_a_client_that_reads_late_gets_all_of_it(mode: ReplyMode) -> None:
    async with wired(mode, size=SIZE, memory=MEMORY) as (wire, device):
        data = bytes(range(1, 129)) * (8 * MIB // 128)
        device.write(0, data)
        wire.stop_reading()
        reads = [wire.client.request(Command.READ, number * KIB, 256 * KIB) for number in range(100)]
        feeding = asyncio.create_task(wire.feed(b"".join(reads)))
        for _ in range(100):
            await asyncio.sleep(0)
        wire.read_again()
        answers = await wire.client.replies(100)
        await feeding
        expected = [data[number * KIB : number * KIB + 256 * KIB] for number in range(100)]
        assert [answer.data for _, answer in sorted(answers.items())] == expected


async def test_a_write_that_is_refused_for_want_of_memory_keeps_no_view_of_the_device() -> None:
    gc.disable()  # it would tidy up some time; until then a device could not be closed, which `wired` does at its end
    try:
        async with wired(ReplyMode.SIMPLE, size=SIZE, memory=20 * PAGE) as (wire, device):
            device.write(0, b"x" * PAGE)
            read = wire.client.request(Command.READ, 0, PAGE)
            write = wire.client.request(Command.WRITE, MIB, payload=b"y" * 128 * KIB)
            assert wire.feed_one(read + write) == len(read + write)
            answers = await wire.client.replies(2)
            assert [answer.error for _, answer in sorted(answers.items())] == [0, errno.ENOSPC]
    finally:
        gc.enable()


@MODES
async def test_what_waits_to_be_sent_is_copied_before_its_pages_go(mode: ReplyMode) -> None:
    async with wired(mode, size=SIZE, memory=MEMORY) as (wire, device):
        device.write(0, b"x" * (4 * MIB))
        wire.stop_reading()
        await wire.feed(wire.client.request(Command.READ, 0, 4 * MIB))
        assert wire.paused
        list(device.trim(0, SIZE))
        assert device.resident_pages == 0
        wire.read_again()
        (answer,) = (await wire.client.replies(1)).values()
        assert answer.data == b"x" * (4 * MIB)


# -- measured from outside ---------------------------------------------------------------------------


def flood(path: Path, handshake: bytes, piece: bytes, total_bytes: int, patience_s: float) -> int:
    """Send, and never read; how much was taken before a piece took too long."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.sendall(handshake)
        sock.settimeout(patience_s)
        sent = 0
        try:
            while sent < total_bytes:
                sock.sendall(piece)
                sent += len(piece)
        except TimeoutError:
            pass
        return sent


async def flooded(here: Running, piece: bytes, total_bytes: int, patience_s: float) -> tuple[int, int]:
    """(bytes taken, KiB that the server's own memory grew by); another client is served meanwhile."""
    async with await here.entered() as other:
        await other.write(0, b"x" * MIB)
        before = here.memory_kib("RssAnon")
        loop = asyncio.get_running_loop()
        hello = client_flags() + go("ram")
        flooding = loop.run_in_executor(None, flood, here.path, hello, piece, total_bytes, patience_s)
        grown = 0
        while not flooding.done():
            await other.read(0, PAGE)
            grown = max(grown, here.memory_kib("RssAnon") - before)
            await asyncio.sleep(0.01)
        return await flooding, grown


async def test_gibibytes_of_writes_at_once_cost_only_the_pages_that_they_write(tmp_path: Path) -> None:
    async with running(tmp_path, "--export", "ram=64M", "--memory", "128M") as here:
        piece = request(ReplyMode.SIMPLE, Command.WRITE, 0, 32 * MIB) + b"x" * (32 * MIB)
        taken, grown_kib = await flooded(here, piece, 2 * GIB, PATIENCE_S)
        assert taken >= 2 * GIB
        assert grown_kib < 16 * KIB


@pytest.mark.parametrize("length", [PAGE, MIB])
async def test_requests_without_end_and_without_a_reader_cost_little(tmp_path: Path, length: int) -> None:
    async with running(tmp_path, "--export", "ram=64M", "--memory", "128M") as here:
        piece = request(ReplyMode.SIMPLE, Command.READ, 0, length) * 1000
        taken, grown_kib = await flooded(here, piece, 100 * MIB, 1.0)
        assert taken < 100 * MIB
        assert grown_kib < 16 * KIB


async def test_a_request_that_is_cancelled_just_when_memory_is_freed_waits_no_longer() -> None:
    """Else a READ, or a WRITE_ZEROES, of a client that is gone goes on."""
    budget = Budget(MEMORY)
    budget.attach(lambda: None)
    tries: list[int] = []

    def work() -> None:
        tries.append(budget.free_pages)
        budget.take(2 * MEMORY // PAGE)

    connection: Any = SimpleNamespace(device=SimpleNamespace(budget=budget))
    waiting = asyncio.create_task(commands._Patience(connection, PATIENCE_S).enough_for(work))
    await eventually(lambda: budget.waiting == 1)
    budget.freed(everyone=True)
    waiting.cancel()
    await asyncio.wait([waiting], timeout=PATIENCE_S)
    assert waiting.cancelled()
    assert len(tries) == 1
    assert budget.waiting == 0
