"""How many may come, and how long they may take to say what they want."""

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest

from nbdram.protocol.handshake import Failure
from nbdram.protocol.wire import Option
from nbdram.server import connection as connection_module
from tests.helpers import (
    Client,
    Served,
    command_line,
    dial,
    eventually,
    info_payload,
    running,
    served,
)


async def half_way(here: Served) -> Client:
    client = await here.client()
    await client.greet()
    return client


async def test_a_handshake_has_a_limit_in_time_whatever_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "HANDSHAKE_TIMEOUT_S", 0.2)
    async with served(tmp_path) as here, await here.client() as silent, await half_way(here) as chatty:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            for _ in range(30):
                await chatty.ask(Option.INFO, info_payload("nobody"))
                await asyncio.sleep(0.05)
            pytest.fail("it was let talk for 1.5 s")
        assert len(await silent.rest()) == 18
        await here.all_gone()
        assert here.server.service.counters.handshake_failures[Failure.LATE] == 2


async def test_who_has_entered_may_be_silent_for_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "HANDSHAKE_TIMEOUT_S", 0.05)
    async with served(tmp_path) as here, await here.entered() as client:
        await asyncio.sleep(0.1)
        assert await client.read(0, 1) == b"\0"


async def test_after_32_options_the_handshake_is_over(tmp_path: Path) -> None:
    async with served(tmp_path) as here, await half_way(here) as client:
        for _ in range(32):
            await client.ask(Option.LIST)
        assert await client.rest() == b""


async def test_the_oldest_half_handshake_makes_room_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "MAX_HANDSHAKES", 3)
    async with served(tmp_path) as here, await here.entered() as inside:
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
        await asyncio.sleep(0.05)
        async with await here.entered() as late:
            assert await late.read(0, 10) == b"still here"
