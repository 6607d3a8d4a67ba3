"""How many may come, and how long they may take to say what they want."""

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest

from nbdram.config import Limits
from nbdram.protocol.handshake import Failure, ReplyMode
from nbdram.protocol.wire import Command, Option
from nbdram.server.quiet import sweep
from tests.helpers import (
    PATIENCE_S,
    Client,
    Running,
    Served,
    command_line,
    dial,
    eventually,
    info_payload,
    request,
    running,
    served,
)


async def half_way(here: Served) -> Client:
    client = await here.client()
    await client.greet()
    return client


async def test_a_handshake_has_a_limit_in_time_whatever_is_said(tmp_path: Path) -> None:
    limits = Limits(handshake_timeout_s=0.2)
    async with served(tmp_path, limits=limits) as here, await here.client() as silent, await half_way(here) as chatty:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            for _ in range(30):
                await chatty.ask(Option.INFO, info_payload("nobody"))
                await asyncio.sleep(0.05)
            pytest.fail("it was let talk for 1.5 s")
        assert len(await silent.rest()) == 18
        await here.all_gone()
        assert here.server.service.counters.handshake_failures[Failure.LATE] == 2


async def test_who_has_entered_may_be_silent_for_longer(tmp_path: Path) -> None:
    async with served(tmp_path, limits=Limits(handshake_timeout_s=1.0)) as here, await here.entered() as client:
        await asyncio.sleep(1.1)
        assert await client.read(0, 1) == b"\0"


async def test_after_32_options_the_handshake_is_over(tmp_path: Path) -> None:
    async with served(tmp_path) as here, await half_way(here) as client:
        for _ in range(32):
            await client.ask(Option.LIST)
        assert await client.rest() == b""


async def test_the_oldest_half_handshake_makes_room_for_the_next(tmp_path: Path) -> None:
    async with served(tmp_path, limits=Limits(handshakes=3)) as here, await here.entered() as inside:
        idle = [await half_way(here) for _ in range(3)]
        async with await here.entered() as late:
            assert await idle[0].rest() == b""
            assert await late.read(0, 1) == b"\0"
        assert len(here.server.service.haggling) == 2
        assert await inside.read(0, 1) == b"\0"
        for client in idle:
            client.kill()


async def test_one_connection_too_many_is_turned_away_and_the_others_are_served(tmp_path: Path) -> None:
    async with served(tmp_path) as here:
        service = here.server.service
        service.max_connections = 3
        inside = [await here.entered() for _ in range(3)]
        for _ in range(2):
            async with await here.client() as late:
                assert await late.rest() == b""
        assert service.counters.handshake_failures[Failure.TURNED_AWAY] == 2
        for client in inside:
            assert await client.read(0, 1) == b"\0"
        inside[0].kill()
        await eventually(lambda: len(here.connections) == 2)
        async with await here.entered() as late:
            assert await late.read(0, 1) == b"\0"
        for client in inside:
            client.kill()


async def test_half_handshakes_do_not_take_the_places_of_others(tmp_path: Path) -> None:
    async with served(tmp_path) as here:
        here.server.service.max_connections = 3
        idle = [await half_way(here) for _ in range(3)]
        inside = [await here.entered() for _ in range(3)]
        for client in inside:
            assert await client.read(0, 1) == b"\0"
        for client in (*idle, *inside):
            client.kill()


async def test_too_many_open_files_keep_new_clients_out_and_nobody_else(tmp_path: Path) -> None:
    command = [
        *("prlimit", "--nofile=64", *command_line("serve", "--export", "ram=1G", "--memory", "64M")),
        *("--listen", f"unix:{tmp_path / 'nbd.sock'}", "--control", str(tmp_path / "control")),
    ]
    async with running(tmp_path, command=command) as here, await here.entered() as inside:
        visitors = []
        for _ in range(100):
            visitor = await dial(here.path)
            try:
                await visitor.enter()
            except (ConnectionError, asyncio.IncompleteReadError):
                visitor.kill()
                break
            visitors.append(visitor)
        assert 5 < len(visitors) < 64
        await inside.write(0, b"still here")
        assert await visitors[-1].read(0, 10) == b"still here"
        for visitor in visitors:
            visitor.kill()
        async with await let_in(here) as late:
            assert await late.read(0, 10) == b"still here"


async def let_in(here: Running) -> Client:
    """As soon as the server has seen that others are gone."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                return await here.entered()
            await asyncio.sleep(0.01)


async def test_who_asks_for_nothing_for_too_long_is_hung_up_on(tmp_path: Path) -> None:
    async with served(tmp_path, limits=Limits(idle_timeout_s=1.0)) as here:
        async with await here.entered() as idle, await here.entered() as busy:
            gone = asyncio.create_task(idle.rest())
            while not gone.done():
                assert await busy.read(0, 1) == b"\0"
                await asyncio.sleep(0.01)
            assert await gone == b""
        assert here.server.service.counters.hung_up == {"idle": 1, "stalled": 0, "forbidden": 0, "removed": 0}


async def test_idle_clients_stay_by_default(tmp_path: Path) -> None:
    async with served(tmp_path) as here, await here.entered():
        for now in (0.0, 1e9, 2e9):
            sweep(here.server.service, now)
        await asyncio.sleep(0.01)
        assert len(here.connections) == 1


@pytest.mark.parametrize("deaf", [True, False], ids=["reads no reply", "sends no rest"])
async def test_who_stops_in_the_middle_is_hung_up_on(tmp_path: Path, deaf: bool) -> None:
    async with served(tmp_path, limits=Limits(stall_timeout_s=0.3)) as here:
        async with await here.entered() as client, await here.entered() as idle:
            await idle.write(0, bytes(65536))
            if deaf:
                client.writer.transport.pause_reading()  # type: ignore[attr-defined]
                await client.send(b"".join(client.request(Command.READ, 0, 65536) for _ in range(500)))
            else:
                await client.send(request(ReplyMode.SIMPLE, Command.WRITE, 0, 1 << 20) + bytes(1 << 19))
            await eventually(lambda: len(here.connections) == 1)
            assert await idle.read(0, 1) == b"\0", "who only waits may go on doing so"
        assert here.server.service.counters.hung_up["stalled"] == 1
        assert not here.device().incoming
