"""A server under load, into which a fault is put: clients check all they read, and know what must be there afterwards.

The data is more than memory has room for, so it is compressed and swapped all the time. After the fault every client
must get on; then all is compared over new connections, the server must end well, and `nbdram check` must find its state
whole.
"""

import asyncio
import errno
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from nbdram.protocol.wire import Command
from tests.helpers import (
    ALL_MODES,
    MIB,
    Answer,
    Client,
    Running,
    command_line,
    run,
    running,
)
from tests.peers.campaign import Writer

HUNG_UP: Final = (OSError, asyncio.IncompleteReadError, TimeoutError)
WRITERS: Final = 3
REGION: Final = 10 * MIB
# Twice as much as a server needs for itself: data has to go to disk.
MEMORY: Final = "40M"
PATIENCE_S: Final = 240.0


@dataclass
class Setting:
    """What is special about a server: what runs it, and where; `allowed`: errors that a fault is an excuse for."""

    swap: Path
    memory: tuple[str, ...] = ("--memory", MEMORY)
    prefix: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    allowed: frozenset[int] = frozenset()
    dial: Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]] | None = None


class Tolerant(Client):
    """A client that asks again when a READ is answered with an error that there is an excuse for."""

    allowed: frozenset[int] = frozenset()
    told: Counter[str]

    async def read(self, offset: int, length: int) -> bytes:
        until = time.monotonic() + PATIENCE_S
        while True:
            answer = await self.call(Command.READ, offset, length)
            if answer.error == 0:
                return answer.data
            assert answer.error in self.allowed, answer
            assert time.monotonic() < until, "the error does not go away"
            self.told[errno.errorcode[answer.error]] += 1
            await asyncio.sleep(0.1)


class BusyWriter(Writer):
    """A writer that takes some errors for an answer, and then looks what has become of its region."""

    allowed: frozenset[int] = frozenset()
    told: Counter[str]

    def refused(self, cookie: int, answer: Answer) -> None:
        assert answer.error in self.allowed, f"{self.in_doubt[cookie].command.name}: {answer}"
        self.told[errno.errorcode[answer.error]] += 1
        if self.in_doubt[cookie].command == Command.READ:
            del self.in_doubt[cookie]

    async def step(self, client: Client) -> None:
        await super().step(client)
        if self.in_doubt:
            await self.verify(client)


@dataclass
class World:
    """The server and its clients; `told`: errors that were answered; `longest_s`: what a batch of requests took."""

    server: Running
    setting: Setting
    directory: Path
    writers: list[BusyWriter] = field(default_factory=list)
    told: Counter[str] = field(default_factory=Counter)
    hang_ups: int = 0
    longest_s: float = 0.0
    ended: bool = False
    clients: set[Client] = field(default_factory=set)

    def __post_init__(self) -> None:
        for number in range(WRITERS):
            writer = BusyWriter(number * REGION, REGION)
            writer.allowed, writer.told = self.setting.allowed, self.told
            self.writers.append(writer)

    @property
    def pid(self) -> int:
        return self.server.process.pid

    @property
    def acknowledged(self) -> int:
        return sum(writer.acknowledged for writer in self.writers)

    async def entered(self, number: int = 0) -> Client:
        """A new connection, in one of the reply modes."""
        streams = self.setting.dial() if self.setting.dial else asyncio.open_unix_connection(str(self.server.path))
        client = Tolerant(*await streams)
        client.patience_s = PATIENCE_S
        client.allowed, client.told = self.setting.allowed, self.told
        self.clients.add(client)
        try:
            await client.enter("disk", ALL_MODES[number % 3])
        except BaseException:
            self.close(client)
            raise
        return client

    def close(self, client: Client) -> None:
        client.kill()
        self.clients.discard(client)

    async def keep_busy(self, number: int) -> None:
        """Write and read until all is over; connect again after a hang-up, and look at what was in doubt."""
        writer = self.writers[number]
        while not self.ended:
            client = None
            try:
                client = await self.entered(number)
                await writer.verify(client)
                while not self.ended:
                    began = time.monotonic()
                    await writer.step(client)
                    self.longest_s = max(self.longest_s, time.monotonic() - began)
            except HUNG_UP:
                self.hang_ups += 1
                await asyncio.sleep(0.1)
            finally:
                if client:
                    self.close(client)

    async def everybody_gets_on(self, requests: int = 20) -> None:
        """Wait until each writer has so many more requests acknowledged."""
        goals = [(writer, writer.acknowledged + requests) for writer in self.writers]
        async with asyncio.timeout(PATIENCE_S):
            while any(writer.acknowledged < goal for writer, goal in goals):
                assert self.server.process.returncode is None, "the server has ended"
                await asyncio.sleep(0.02)

    async def verify(self) -> None:
        """Compare everything, over a new connection of each kind."""
        for number, writer in enumerate(self.writers):
            client = await self.entered(number + 1)
            try:
                await writer.verify(client)
            finally:
                self.close(client)


Inject = Callable[[World, float], Awaitable[str]]  # puts a fault into it for so many seconds; says what it did


@dataclass(frozen=True)
class Result:
    """A line of the table."""

    fault: str
    did: str
    seconds: float
    requests: int
    hang_ups: int
    told: dict[str, int]
    longest_s: float

    def line(self) -> str:
        told = ", ".join(f"{count} {name}" for name, count in sorted(self.told.items())) or "none"
        return (
            f"| {self.fault} | {self.did} | {self.seconds:.0f} | {self.requests} | {told} | {self.hang_ups} "
            f"| {self.longest_s:.1f} | {WRITERS * REGION // MIB} MiB whole |"
        )


HEAD: Final = (
    "| fault | what happened | s | requests checked | errors told | hang-ups | longest batch, s | in the end |\n"
    "|---|---|---:|---:|---|---:|---:|---|"
)


@asynccontextmanager
async def world(directory: Path, setting: Setting) -> AsyncIterator[World]:
    """A server in its setting, which must end well."""
    state = directory / "state"
    command = [*setting.prefix, *command_line("serve", *setting.memory, "--metrics", "off", "--export", "disk=1T")]
    command += ["--state-dir", str(state), "--control", str(directory / "control")]
    command += ["--listen", f"unix:{directory / 'nbd.sock'}", "--swap", f"disk:{setting.swap}", *setting.options]
    uris = (1 + setting.options.count("--listen")) * (1 + setting.options.count("--export"))
    async with running(directory, command=command, environment=setting.environment, uris=uris) as server:
        here = World(server, setting, directory)
        try:
            yield here
            server.process.terminate()
            end = await server.ended()
        except BaseException as failure:
            if server.process.returncode is None:
                server.process.kill()
            with suppress(Exception):
                failure.add_note((await server.ended()).errors[-5000:])
            raise
        assert end.code == 0, end
        assert "Traceback" not in end.errors, end.errors
    checked = await run("check", str(state))
    assert checked.code == 0, checked


async def campaign(directory: Path, name: str, setting: Setting, inject: Inject, seconds: float) -> Result:
    """Clients at work, the fault, clients at work; and the last look."""
    began = time.monotonic()
    async with world(directory, setting) as here:
        async with asyncio.TaskGroup() as group:
            for number in range(WRITERS):
                group.create_task(here.keep_busy(number))
            await here.everybody_gets_on()
            here.longest_s = 0.0
            did = await inject(here, seconds)
            await here.everybody_gets_on()
            here.ended = True
        await here.verify()
        lasted = time.monotonic() - began
        told = dict(here.told)
        return Result(name, did, lasted, here.acknowledged, here.hang_ups, told, here.longest_s)
