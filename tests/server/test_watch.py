"""While a connection receives by itself the event loop does not watch its socket: it misses nothing by that."""

import asyncio
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdram.protocol.wire import Command
from nbdram.server import connection
from nbdram.server.watch import Watch
from tests.helpers import PAGE, PATIENCE_S, Client, eventually, served
from tests.server.test_lingering import send_all


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        yield ours, theirs


async def test_what_comes_while_its_eyes_are_shut_is_seen_afterwards(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    loop = asyncio.get_running_loop()
    seen = asyncio.Event()
    loop.add_reader(ours, seen.set)
    await asyncio.sleep(0.01)  # it watches from its next turn on
    watch = Watch()
    try:
        assert watch.suspend(ours.fileno())
        theirs.send(b"x")
        for _ in range(10):
            await asyncio.sleep(0.001)
        assert not seen.is_set()
        watch.resume(ours.fileno())
        await asyncio.wait_for(seen.wait(), PATIENCE_S)
    finally:
        loop.remove_reader(ours)


async def test_what_is_not_watched_can_t_be_suspended(pair: tuple[socket.socket, socket.socket]) -> None:
    assert not Watch().suspend(pair[0].fileno())


async def test_with_too_many_open_files_it_goes_on_watching(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    loop, watch = asyncio.get_running_loop(), Watch()
    loop.add_reader(pair[0], lambda: None)
    await asyncio.sleep(0.01)
    try:
        with monkeypatch.context() as meanwhile:
            meanwhile.setattr(os, "dup", full)
            assert not watch.suspend(pair[0].fileno())
        assert watch.suspend(pair[0].fileno()), "there is room again"
        watch.resume(pair[0].fileno())
    finally:
        loop.remove_reader(pair[0])


def test_other_event_loops_go_on_watching(pair: tuple[socket.socket, socket.socket]) -> None:
    async def main() -> bool:
        loop = asyncio.get_running_loop()
        loop.add_reader(pair[0], lambda: None)
        return Watch().suspend(pair[0].fileno())

    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        assert not runner.run(main())


async def keep_busy(client: Client) -> None:
    """More WRITEs than one recv has room for, sent by a thread while the server receives them."""
    writes = [client.request(Command.WRITE, number * PAGE, payload=bytes((number,)) * PAGE) for number in range(200)]
    await asyncio.to_thread(send_all, client.writer.get_extra_info("socket").fileno(), b"".join(writes))


@pytest.fixture
def lingering(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every connection lingers, unwatched from its first batch on; what was asked of the watch."""
    for name, value in {"_ALONE_BATCHES": 0, "_LINGER_S": 1.0, "_SPIN_S": 0.05, "_UNWATCHED_FROM": 1}.items():
        monkeypatch.setattr(connection, name, value)
    asked: list[str] = []
    suspend, resume = Watch.suspend, Watch.resume

    def note_suspend(self: Watch, fd: int) -> bool:
        asked.append("suspend")
        return suspend(self, fd)

    def note_resume(self: Watch, fd: int) -> None:
        asked.append("resume")
        resume(self, fd)

    monkeypatch.setattr(Watch, "suspend", note_suspend)
    monkeypatch.setattr(Watch, "resume", note_resume)
    return asked


async def test_a_connection_that_was_busy_is_heard_again(tmp_path: Path, lingering: list[str]) -> None:
    async with served(tmp_path) as server, await server.entered() as client:
        for _ in range(3):
            await keep_busy(client)
            assert len(await client.replies(200)) == 200
            await asyncio.sleep(0.1)  # longer than the server waits for more
            assert await client.read(7 * PAGE, PAGE) == bytes((7,)) * PAGE
        await client.send(client.request(Command.DISC))
        assert await client.reader.read() == b""
        assert lingering
        assert lingering == ["suspend", "resume"] * (len(lingering) // 2)


async def test_a_connection_that_could_not_be_heard_again_is_ended(
    tmp_path: Path, lingering: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def deaf(self: Watch, fd: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")  # of fs.epoll.max_user_watches

    async with served(tmp_path) as server, await server.entered() as client, await server.entered() as other:
        monkeypatch.setattr(Watch, "resume", deaf)
        await keep_busy(client)
        await eventually(lambda: len(server.connections) == 1)
        assert "suspend" in lingering
        assert await other.read(0, PAGE) == bytes(PAGE)
