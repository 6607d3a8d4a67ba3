"""Who uses the server in a soak: each for ever, paced, and checking all that it reads."""

import asyncio
import random
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import quote

from nbdram.observe.control import ask
from nbdram.protocol.handshake import ReplyMode
from nbdram.protocol.wire import Command, Option
from tests.helpers import ALL_MODES, IHAVEOPT, KIB, MIB, PAGE, Client, Running, client_flags, dial
from tests.peers.campaign import Writer
from tests.peers.running import run
from tests.peers.test_fio import VERIFIED

HUNG_UP: Final = (ConnectionError, asyncio.IncompleteReadError)
_TOOLS_BYTES: Final = 12 * MIB
_PROBE_BYTES: Final = 4 * MIB
_EACH_VISIT_S: Final = 20.0
# On a machine that is busy with other things everything may take long; that is no failure of the server.
_PATIENCE_S: Final = 180.0


@dataclass
class Soak:
    """The server, and what the clients have seen."""

    server: Running
    pause_s: float
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    verified_bytes: int = 0
    requests: int = 0
    visits: dict[str, int] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)  # of the probe, since somebody took them

    def visited(self, kind: str) -> None:
        self.visits[kind] = self.visits.get(kind, 0) + 1

    async def pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self.ended.wait(), seconds)

    async def entered(self, export: str, mode: ReplyMode) -> Client:
        client = await dial(self.server.path)
        client.patience_s = _PATIENCE_S
        try:
            await client.enter(export, mode)
        except BaseException:
            client.kill()
            raise
        return client

    def control(self, what: str, method: str = "GET", body: dict[str, object] | None = None) -> dict[str, object]:
        return ask(self.server.directory / "control", what, method, body)

    async def forgotten(self, export: str) -> None:
        """Wait until the server has done with the clients of an export that are gone."""
        async with asyncio.timeout(_PATIENCE_S):
            while self._connections(export):
                await asyncio.sleep(0.02)

    def _connections(self, export: str) -> int:
        exports = self.control("stats")["exports"]
        assert isinstance(exports, list)
        return int(next(found["connections"] for found in exports if found["name"] == export))


async def write(soak: Soak, number: int, size: int) -> None:
    """Reads, writes, trims against a model; in all reply modes by turns; leaves politely or by hanging up."""
    export, writer, chance = f"busy{number}", Writer(number * size, size), random.Random(number)
    turn = number
    while not soak.ended.is_set():
        mode, turn = ALL_MODES[turn % 3], turn + 1
        client = await soak.entered(export, mode)
        until, before = time.monotonic() + _EACH_VISIT_S, writer.acknowledged
        while time.monotonic() < until and not soak.ended.is_set():
            await writer.step(client)
            await soak.pause(soak.pause_s)
        if turn % 2:
            await _vanish(writer, client, chance.random() * 0.02)
        else:
            await client.send(client.request(Command.DISC))
            assert not await client.rest()
        client.kill()
        soak.requests += writer.acknowledged - before
        await soak.forgotten(export)
        async with await soak.entered(export, mode) as client:
            await writer.verify(client)
        soak.verified_bytes += size
        soak.visited(mode.value)


async def _vanish(writer: Writer, client: Client, after_s: float) -> None:
    """Hang up with requests in flight."""
    step = asyncio.create_task(writer.step(client))
    await asyncio.sleep(after_s)
    client.kill()
    with suppress(*HUNG_UP):
        await step


async def probe(soak: Soak) -> None:
    """Small reads, one at a time: how long does the server take?"""
    chance = random.Random(0)
    content = chance.randbytes(_PROBE_BYTES // 2) + bytes(range(256)) * (_PROBE_BYTES // 512)
    async with await soak.entered("probe", ReplyMode.SIMPLE) as client:
        await client.write(0, content)
        while not soak.ended.is_set():
            at = chance.randrange(_PROBE_BYTES // PAGE) * PAGE
            began = time.perf_counter()
            found = await client.read(at, PAGE)
            soak.latencies.append(time.perf_counter() - began)
            assert found == content[at : at + PAGE], "the probe reads something else"
            soak.requests += 1
            await soak.pause(0.02)


async def use_tools(soak: Soak, directory: Path) -> None:
    """What people use: qemu-img, nbdcopy, nbdinfo, fio, one after the other."""
    uri = f"nbd+unix:///tools?socket={quote(str(soak.server.path))}"
    image, back = directory / "image", directory / "back"
    number = 0
    while not soak.ended.is_set():
        number += 1
        chance = random.Random(number)
        text = b"".join(b"%015d\n" % chance.randrange(1 << 40) for _ in range(_TOOLS_BYTES // 32))
        image.write_bytes(chance.randbytes(_TOOLS_BYTES - len(text)) + text)
        rounds = (
            ("nbdcopy", image, uri),
            ("qemu-img", "compare", "-f", "raw", "-F", "raw", image, uri),
            ("nbdinfo", "--map", uri),
            ("nbdcopy", uri, back),
        )
        for name, *arguments in rounds:
            await asyncio.to_thread(run, name, *arguments)
            soak.visited(name)
            await soak.pause(20 * soak.pause_s)
        assert back.read_bytes() == image.read_bytes()
        soak.verified_bytes += 2 * _TOOLS_BYTES
        await asyncio.to_thread(_fio, uri, directory)
        soak.visited("fio")


def _fio(uri: str, directory: Path) -> None:
    job = ("--name=job", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bsrange=512-128k", "--iodepth=16")
    run("fio", *job, "--size=8M", *VERIFIED, cwd=directory)


async def come_and_go(soak: Soak) -> None:
    """Connections that come to little or nothing."""
    number = 0
    while not soak.ended.is_set():
        number += 1
        client = await dial(soak.server.path)
        client.patience_s = _PATIENCE_S
        match number % 5:
            case 0:
                await client.greet()
                await client.ask(Option.LIST)
            case 1:
                await client.send(client_flags() + IHAVEOPT)
            case 2:
                await client.send(b"GET / HTTP/1.0\r\n\r\n" * 4)
                await client.rest()
            case 3:
                await client.enter("probe")
                await client.send(b"".join(client.request(Command.READ, 0, MIB) for _ in range(8)))
            case _:
                await client.enter("probe", ReplyMode.EXTENDED)
                await client.send(client.request(Command.DISC))
                await client.rest()
        client.kill()
        soak.visited("came and went")
        await soak.pause(5 * soak.pause_s)


async def make_and_remove(soak: Soak) -> None:
    """Exports that are made, grown, written, read and removed."""
    number = 0
    while not soak.ended.is_set():
        number += 1
        name = f"passing{number}"
        data = random.Random(number).randbytes(256 * KIB)
        await asyncio.to_thread(soak.control, "exports", "POST", {"name": name, "size": "16M"})
        await asyncio.to_thread(soak.control, f"exports/{name}/resize", "POST", {"size": "1T"})
        async with await soak.entered(name, ReplyMode.STRUCTURED) as client:
            for at in (0, (1 << 40) - len(data)):
                await client.write(at, data)
                assert await client.read(at, len(data)) == data
        soak.verified_bytes += 2 * len(data)
        await asyncio.to_thread(soak.control, f"exports/{name}?force", "DELETE")
        soak.visited("export made and removed")
        await soak.pause(100 * soak.pause_s)
