"""Writers that keep a server busy until it is killed, and know what must be there afterwards."""

import asyncio
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from nbdram.protocol.wire import Command
from tests.helpers import PAGE, Answer, Client, Running

_KINDS = [Command.WRITE, Command.READ, Command.TRIM, Command.WRITE_ZEROES]
_SHARES = [10, 4, 1, 1]
_LENGTHS = [512, PAGE, 3 * PAGE, 64 << 10, 100_000, 256 << 10]


@dataclass(frozen=True)
class Change:
    """A request; `data` is what is at `start` of the region once it is done."""

    command: Command
    offset: int
    length: int
    start: int
    data: bytes


@dataclass
class Writer:
    """Has the bytes [base, base + size) of the export "disk" for itself."""

    base: int
    size: int
    content: bytearray = field(default_factory=bytearray)
    in_doubt: dict[int, Change] = field(default_factory=dict)  # by cookie: sent, and not acknowledged
    acknowledged: int = 0

    def __post_init__(self) -> None:
        self.content = bytearray(self.size)
        self._random = random.Random(self.base)

    async def work(self, server: Running) -> None:
        """Until the server is gone."""
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            async with await server.entered("disk") as client:
                while True:
                    await self.step(client)

    async def step(self, client: Client) -> None:
        """A few requests at once, none over another's bytes."""
        requests, pending, trims = b"", 0, []
        for change in self._plan():
            payload = change.data if change.command == Command.WRITE else b""
            requests += client.request(change.command, self.base + change.offset, change.length, payload=payload)
            self.in_doubt[client.last_cookie] = change
            pending += 1
        client.writer.write(requests)
        for _ in range(pending):
            ((cookie, answer),) = (await client.replies(1)).items()
            if answer.error:
                self.refused(cookie, answer)
                continue
            if self.in_doubt[cookie].command == Command.TRIM:
                trims.append(cookie)
                continue
            change = self.in_doubt.pop(cookie)
            end = change.start + len(change.data)
            if change.command == Command.READ:
                assert answer.data == self.content[change.start : end], "what is read is not what was written"
            self.content[change.start : end] = change.data
            self.acknowledged += 1
        for cookie in trims:
            await self._look_at_trimmed(client, self.in_doubt[cookie])
            del self.in_doubt[cookie]

    def refused(self, cookie: int, answer: Answer) -> None:
        """A request was answered with an error, which must not be."""
        raise AssertionError(f"{self.in_doubt[cookie].command.name}: {answer}")

    async def _look_at_trimmed(self, client: Client, change: Change) -> None:
        """Where memory is short, a page of a cold cluster may be left as it was; from here on it stays what it is."""
        for at in range(change.start, change.start + len(change.data), PAGE):
            found = await client.read(self.base + at, PAGE)
            assert found in (bytes(PAGE), self.content[at : at + PAGE]), "a trimmed page is neither old nor zeros"
            self.content[at : at + PAGE] = found

    def _plan(self) -> Iterator[Change]:
        chance = self._random
        at = chance.randrange(self.size // 4)
        while at < self.size:
            at = -(-at // PAGE) * PAGE if chance.random() < 0.7 else at
            length = min(chance.choice(_LENGTHS), self.size - at)
            if length > 0:
                yield self._change(chance.choices(_KINDS, _SHARES)[0], at, length)
            at += length + chance.randrange(self.size // 4)

    def _change(self, command: Command, at: int, length: int) -> Change:
        start, end = at, at + length
        match command:
            case Command.WRITE:
                data = self._payload(length)
            case Command.READ:
                data = bytes(self.content[at:end])
            case Command.TRIM:  # of whole pages only
                start = min(-(-at // PAGE) * PAGE, end)
                data = bytes(max(0, end // PAGE * PAGE - start))
            case _:
                data = bytes(length)
        return Change(command, at, length, start, data)

    def _payload(self, length: int) -> bytes:
        """Half of it compresses well, the rest not at all."""
        if self._random.random() < 0.5:
            return self._random.randbytes(length)
        return (self._random.randbytes(32) * (length // 32 + 1))[:length]

    async def verify(self, client: Client) -> None:
        """Everything acknowledged is there; each byte in doubt is what it was or what it should have become."""
        found = bytearray()
        for at in range(0, self.size, 1 << 20):
            found += await client.read(self.base + at, min(1 << 20, self.size - at))
        expected = bytearray(self.content)
        for change in self.in_doubt.values():
            for at in range(change.start, change.start + len(change.data)):
                if found[at] == change.data[at - change.start]:
                    expected[at] = found[at]
        wrong = next(
            (at for at in range(0, self.size, PAGE) if found[at : at + PAGE] != expected[at : at + PAGE]), None
        )
        assert wrong is None, f"the page at {self.base + wrong:#x} is not what was acknowledged"
        self.content, self.in_doubt = found, {}
