"""A real server is killed with -9 under load, again and again, and started again on the same state directory."""

import asyncio
import os
import random
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdram.observe.control import ask
from tests.helpers import MIB, PATIENCE_S, TIB, Running, command_line, running

from .campaign import Writer
from .killed import POINTS

KILLS = int(os.environ.get("NBDRAM_TEST_KILLS", "4"))
COUNTS = [int(count) for count in os.environ.get("NBDRAM_TEST_COUNTS", "8").split(",")]
ROOMY = ("--memory", "512M")
REGION = 10 * MIB


def killing(point: str, count: int) -> list[str]:
    """A server that is killed at the `count`-th time that it comes to a point."""
    return [sys.executable, "-m", "tests.peers.killed", point, str(count)]


def writers(size: int = REGION) -> list[Writer]:
    """Two at the start of the device, one in its middle, one at its end."""
    return [Writer(base, size) for base in (0, size, TIB // 2, TIB - size)]


def tight(swap: Path) -> tuple[str, ...]:
    """So little memory that the campaign's data moves to images, and on to disk."""
    return "--memory", "44M", "--swap", f"disk:{swap}"


@asynccontextmanager
async def started(directory: Path, *options: str, command: Sequence[str] = ()) -> AsyncIterator[Running]:
    """A server on the state directory below `directory`."""
    arguments = ["--state-dir", str(directory / "state"), "--export", "disk=1T", "--metrics", "off"]
    arguments += ["--listen", f"unix:{directory / 'nbd.sock'}", "--control", str(directory / "control"), *options]
    whole = [*command, "serve", *arguments] if command else command_line("serve", *arguments)
    async with running(directory, command=whole) as server:
        yield server


async def killed(server: Running) -> None:
    """Wait until it is dead, by -9 and nothing else."""
    async with asyncio.timeout(PATIENCE_S):
        await server.process.wait()
    assert server.process.returncode == -signal.SIGKILL, (await server.ended()).errors


async def all_is_there(server: Running, busy: list[Writer]) -> None:
    async with await server.entered("disk") as client:
        for writer in busy:
            await writer.verify(client)


async def campaign(directory: Path, options: tuple[str, ...], kills: int) -> dict[str, Any]:
    """Start, verify, write, kill at a random moment; and a last look. Returns how the last server found the export."""
    busy, moment = writers(), random.Random(kills)
    for _ in range(kills):
        async with started(directory, *options) as server:
            await all_is_there(server, busy)
            async with asyncio.TaskGroup() as group:
                for writer in busy:
                    group.create_task(writer.work(server))
                await asyncio.sleep(moment.uniform(0.05, 0.6))
                server.process.kill()
            await killed(server)
    async with started(directory, *options) as server:
        found: dict[str, Any] = ask(directory / "control", "stats")["exports"][0]
        await all_is_there(server, busy)
    assert all(writer.acknowledged for writer in busy)
    return found


async def test_kill_9_under_load_loses_nothing_that_was_acknowledged(shm: Path) -> None:
    export = await campaign(shm, ROOMY, KILLS)
    assert export["resident"]


async def test_kill_9_under_a_tight_budget_with_swap_loses_nothing(shm: Path, tmp_path: Path) -> None:
    export = await campaign(shm, tight(tmp_path / "swap"), KILLS)
    assert export["resident"]
    assert export["compressed"] + export["disk"], "the budget was not tight enough to say anything"


@pytest.mark.parametrize("point", [point for point in POINTS if "manifest" not in point])
async def test_kill_9_between_two_stores_loses_nothing(shm: Path, tmp_path: Path, point: str) -> None:
    busy, options = writers(), tight(tmp_path / "swap")
    for count in COUNTS:
        async with started(shm, *options, command=killing(point, count)) as server:
            async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
                for writer in busy:
                    group.create_task(writer.work(server))
            await killed(server)
        async with started(shm, *options) as server:
            await all_is_there(server, busy)


@pytest.mark.parametrize("point", [point for point in POINTS if "manifest" in point])
async def test_kill_9_while_an_export_is_made_leaves_all_of_it_or_nothing(shm: Path, point: str) -> None:
    for count in (1, 2, 3):
        with pytest.raises(AssertionError, match="did not start"):
            async with started(shm, *ROOMY, command=killing(point, count)):
                pass
        async with started(shm, *ROOMY) as server, await server.entered("disk") as client:
            await client.write(0, b"works")
        assert len(list((shm / "state").iterdir())) == 4, "files that belong to no device"
        shutil.rmtree(shm / "state")
