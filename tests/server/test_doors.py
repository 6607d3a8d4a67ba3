"""How fast clients may come, and that a crowd keeps nobody out who comes from somewhere else."""

import asyncio
import errno
import os
import socket
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdram.config import Endpoint, Limits
from nbdram.protocol.handshake import Failure
from nbdram.protocol.wire import Command
from nbdram.server.doors import Door, Newcomers, _origin
from nbdram.server.service import SEND_BUFFER_BYTES
from tests.helpers import GREETING, MIB, PAGE, Client, Served, dial, eventually, served

HERE = (Endpoint(host="127.0.0.1", port=0),)


async def from_address(here: Served, source: str) -> Client:
    (endpoint,) = here.server.endpoints
    return Client(*await asyncio.open_connection("127.0.0.1", endpoint.port, local_addr=(source, 0)))


def too_fast(here: Served) -> int:
    return here.server.service.counters.handshake_failures[Failure.TOO_FAST]


def newcomers(rate: int) -> tuple[Newcomers, Callable[[float], None]]:
    now = [100.0]

    def pass_by(seconds: float) -> None:
        now[0] += seconds

    return Newcomers(rate, lambda: now[0]), pass_by


def admitted(door: Newcomers, who: str, count: int = 100, cost: int = 1) -> int:
    """Of so many that come at once."""
    return [door.admit(who, cost) for _ in range(count)].count(True)


def test_a_crowd_gets_half_of_what_is_saved_up_and_the_rest_is_shared_among_addresses() -> None:
    door, pass_by = newcomers(100)
    assert admitted(door, "another", 300) == 100
    assert admitted(door, "crowd", 300) == 50
    assert admitted(door, "third") == 33
    pass_by(1.0)
    assert [admitted(door, f"visitor {number}", 3) for number in range(60)] == [3] * 33 + [2] * 9 + [0] * 18


def test_a_crowd_at_many_addresses_keeps_nobody_out_who_comes_in_order_to_stay() -> None:
    door, pass_by = newcomers(100)
    good_ones = 0
    for _ in range(33):  # seconds; each address is sure of two newcomers in each, but there is no room for so many
        for number in range(100):
            admitted(door, f"crowd {number}", 3)
        if admitted(door, "good", 1):
            door.settle("good")
            good_ones += 1
        pass_by(1.0)
    assert good_ones >= 30, "in the first seconds, all are newcomers"


def test_what_came_to_nothing_is_forgotten_after_a_while() -> None:
    door, pass_by = newcomers(10)
    assert admitted(door, "clumsy") == 10
    assert sum(admitted(door, f"visitor {number}", 1) for number in range(8)) == 8, "of the 10 that are left"
    pass_by(1.0)
    assert sum(admitted(door, f"visitor {number}", 1) for number in range(10)) == 10, "of 12"
    assert not admitted(door, "clumsy", 1)
    for _ in range(2):
        pass_by(11.0)
        assert admitted(door, "another", 1)
    assert sum(admitted(door, f"visitor {number}", 1) for number in range(17)) == 17, "of 19"
    assert admitted(door, "clumsy", 1)


def test_over_tls_half_as_many_are_let_in() -> None:
    door, _ = newcomers(100)
    assert admitted(door, "crowd", 300, cost=2) == 50


def test_without_a_limit_everybody_is_let_in() -> None:
    door, _ = newcomers(0)
    assert all(door.admit("crowd") for _ in range(10_000))


def test_addresses_of_one_ipv6_network_count_as_one() -> None:
    assert _origin("2001:db8:1:2::3") == _origin("2001:db8:1:2:ffff::4") != _origin("2001:db8:1:3::3")
    assert _origin("fe80::1%eth0") == _origin("fe80::2")
    assert _origin("::ffff:192.0.2.1") == _origin("192.0.2.1") != _origin("192.0.2.2")


async def test_a_crowd_at_one_address_keeps_nobody_out_who_comes_from_another(tmp_path: Path) -> None:
    async with served(tmp_path, listen=HERE, limits=Limits(newcomers=10)) as here:
        crowd = await asyncio.gather(*(from_address(here, "127.0.0.2") for _ in range(100)))
        await eventually(lambda: too_fast(here) > 0)
        async with await from_address(here, "127.0.0.3") as good:
            await good.enter()
            assert await good.read(0, 1) == b"\0"
        for client in crowd:
            client.kill()
        await here.all_gone()


async def a_crowd(here: Served, count: int = 30) -> list[Client]:
    """Of one address, and more than can be let in."""
    crowd = [await from_address(here, "127.0.0.2") for _ in range(count)]
    await eventually(lambda: too_fast(here) + len(here.connections) == count)
    return crowd


async def test_who_is_turned_away_hears_nothing_and_is_hung_up_on_later(tmp_path: Path) -> None:
    async with served(tmp_path, listen=HERE, limits=Limits(newcomers=2)) as here:
        crowd = await a_crowd(here)
        (door,) = here.server._doors
        assert here.server.service.held == too_fast(here) > 0
        assert not any(client.reader.at_eof() for client in crowd)
        door._held = deque((0.0, client) for _, client in door._held)
        door._let_go()
        assert here.server.service.held == 0
        await eventually(lambda: [client.reader.at_eof() for client in crowd].count(True) == too_fast(here))
        for client in crowd:
            client.kill()
        await here.all_gone()


async def test_for_lack_of_files_those_held_for_longest_are_hung_up_on(tmp_path: Path) -> None:
    async with served(tmp_path, listen=HERE, limits=Limits(newcomers=2)) as here:
        service = here.server.service
        service.files = 20
        crowd = await a_crowd(here)
        assert 0 < service.held == 20 - 2 * (len(here.connections) + 1)
        gone = too_fast(here) - service.held
        await eventually(lambda: [client.reader.at_eof() for client in crowd].count(True) == gone)
        for client in crowd:
            client.kill()


async def test_clients_of_a_unix_socket_wait_for_their_turn(tmp_path: Path) -> None:
    async with served(tmp_path, limits=Limits(newcomers=20)) as here:
        clients = [await dial(here.path) for _ in range(50)]  # a burst of 40, and then 20 a second
        for client in clients:
            assert await client.receive(len(GREETING)) == GREETING
            client.kill()
        assert not too_fast(here)


class _Exhausted(socket.socket):
    """A listening socket for which there are no files, the first time."""

    failures = 0

    def accept(self) -> Any:
        if not self.failures:
            self.failures += 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


async def test_too_many_open_files_keep_newcomers_waiting(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with served(tmp_path) as here:
        sock = _Exhausted(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(str(tmp_path / "another.sock"))
        door = Door(sock, here.server.service, here.server._connect_local, tls=False)
        async with await dial(tmp_path / "another.sock") as client:
            await client.enter()
        assert sock.failures == 1
        assert "nobody can be let in: Too many open files" in caplog.text
        await door.close()


def send_buffer(here: Served, number: int) -> int:
    connection = sorted(here.connections, key=lambda connection: connection.opened_at)[number]
    sock = connection._transport.get_extra_info("socket")
    size: int = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    return size


async def test_large_send_buffers_are_for_those_who_read(tmp_path: Path) -> None:
    """And for no more of them than are a small part of the budget."""
    async with served(tmp_path) as here, await here.entered() as deaf:
        await deaf.write(0, bytes(MIB))
        deaf.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await deaf.send(b"".join(deaf.request(Command.READ, 0, MIB) for _ in range(64)))
        service = here.server.service
        most = max(8, service.exports.budget.limit_pages * PAGE // 16 // (2 * SEND_BUFFER_BYTES))
        readers = [await here.entered() for _ in range(most + 4)]
        for reader in readers:
            assert len(await reader.read(0, MIB)) == MIB
        sizes = [send_buffer(here, number) for number in range(most + 5)]
        assert sizes[0] < SEND_BUFFER_BYTES
        granted = [size for size in sizes if size >= SEND_BUFFER_BYTES]
        assert len(granted) == most
        assert len(service.roomy) == len(granted)
        for reader in readers:
            reader.kill()
        await eventually(lambda: not here.server.service.roomy)
