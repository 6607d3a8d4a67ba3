"""How a server ends: nobody new comes in, what has come in is answered, and then it goes, whatever clients do."""

import asyncio
import signal
from pathlib import Path

import pytest

from nbdram.protocol.handshake import ReplyMode
from nbdram.protocol.wire import Command
from nbdram.server import server as server_module
from tests.helpers import ALL_MODES, GIB, MIB, PAGE, Client, Running, dial, eventually, running, served

MODES = pytest.mark.parametrize("mode", ALL_MODES, ids=[mode.value for mode in ALL_MODES])
SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


async def told_to_stop(here: Running, number: signal.Signals = signal.SIGTERM) -> None:
    """Send a signal and wait until the server lets nobody in any more."""
    here.process.send_signal(number)
    await eventually(lambda: not here.path.exists())


async def half_a_write(here: Running, client: Client) -> bytes:
    """Send the first half of a WRITE, and wait until it has come in; the other half."""
    whole = client.request(Command.WRITE, 0, payload=b"x" * (4 * MIB))
    await client.send(whole[: 2 * MIB])
    async with await here.entered() as other:
        while await other.read(MIB, 1) != b"x":
            await asyncio.sleep(0.001)
    return whole[2 * MIB :]


@SIGNALS
async def test_a_signal_ends_the_server_quietly_and_well(tmp_path: Path, number: signal.Signals) -> None:
    async with running(tmp_path) as here, await here.entered() as client:
        await client.write(0, b"x")
        here.process.send_signal(number)
        assert await client.rest() == b""
        ended = await here.ended()
    assert (ended.code, ended.output, ended.errors) == (0, "", "")
    assert not any(path.is_socket() for path in tmp_path.iterdir())


@MODES
async def test_requests_that_were_sent_before_are_answered(tmp_path: Path, mode: ReplyMode) -> None:
    async with running(tmp_path, "--memory", "512M") as here, await here.entered("ram", mode) as client:
        for number in range(32):
            await client.write(number * GIB, bytes([number]) * MIB)
        requests = [client.request(Command.READ, number * GIB, 2 * MIB) for number in range(32)]
        requests.append(client.request(Command.TRIM, 0, 31 * GIB // 8))
        requests.append(client.request(Command.WRITE, 5, payload=b"y" * 100))
        await client.send(b"".join(requests))
        here.process.send_signal(signal.SIGTERM)
        answers = await client.replies(len(requests))
        assert all(answer.error == 0 for answer in answers.values())
        assert await client.rest() == b""
        assert (await here.ended()).code == 0


@MODES
async def test_a_write_that_is_coming_in_is_taken_to_its_end(tmp_path: Path, mode: ReplyMode) -> None:
    async with running(tmp_path) as here, await here.entered("ram", mode) as client:
        rest = await half_a_write(here, client)
        await told_to_stop(here)
        await client.send(rest)
        assert (await client.replies(1))[1].error == 0
        assert await client.rest() == b""
        assert (await here.ended()).code == 0


async def test_while_it_stops_nobody_new_comes_in(tmp_path: Path) -> None:
    listen = ("--listen", f"unix:{tmp_path / 'nbd.sock'}", "--listen", "tcp://127.0.0.1:0")
    async with running(tmp_path, *listen, uris=2) as here, await here.entered() as client:
        port = int(here.uris[1].split(":")[2].split("/")[0])
        await half_a_write(here, client)
        await told_to_stop(here)
        with pytest.raises(FileNotFoundError):
            await dial(here.path)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        assert here.process.returncode is None


@SIGNALS
async def test_a_second_signal_ends_it_at_once(tmp_path: Path, number: signal.Signals) -> None:
    async with running(tmp_path) as here, await here.entered() as client:
        await half_a_write(here, client)
        await told_to_stop(here)
        here.process.send_signal(number)
        assert (await here.ended()).code == 1
        assert await client.rest() == b""


async def test_a_client_that_never_reads_does_not_keep_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "DRAIN_TIMEOUT_S", 0.05)
    async with served(tmp_path) as here, await here.entered() as client:
        await client.write(0, bytes(range(128)) * (MIB // 128))
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.send(client.request(Command.READ, 0, MIB) * 50)
        await eventually(lambda: bool(here.connection()._unsent))
        await here.server.stop()
        assert not here.connections


async def test_requests_behind_a_slow_reader_are_answered_before_it_stops(tmp_path: Path) -> None:
    async with served(tmp_path) as here, await here.entered() as client:
        await client.write(0, bytes(range(128)) * (MIB // 128))
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.send(b"".join(client.request(Command.READ, 0, MIB) for _ in range(30)))
        await eventually(lambda: bool(here.connection()._unsent))
        stopping = asyncio.create_task(here.server.stop())
        await asyncio.sleep(0.02)
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert len(await client.replies(30)) == 30
        await stopping


async def test_cve_2015_0847_signals_while_connections_churn(tmp_path: Path) -> None:
    """Those that a foreground process gets and has no use for."""
    idle = (signal.SIGCHLD, signal.SIGPIPE, signal.SIGWINCH, signal.SIGURG, signal.SIGCONT, signal.SIGSTOP)

    async def churn(here: Running) -> None:
        while True:
            async with await here.entered() as client:
                await client.write(0, bytes(PAGE))

    async with running(tmp_path) as here:
        visitors = [asyncio.create_task(churn(here)) for _ in range(8)]
        for number in idle * 30:
            here.process.send_signal(number)
            here.process.send_signal(signal.SIGCONT)
            await asyncio.sleep(0.001)
        assert not any(visitor.done() for visitor in visitors)
        here.process.send_signal(signal.SIGTERM)
        ended = await here.ended()
        await asyncio.gather(*visitors, return_exceptions=True)
    assert (ended.code, ended.errors) == (0, "")
