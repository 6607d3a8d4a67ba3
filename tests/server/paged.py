"""Clients of a server with a budget of some clusters and a disk that fails at random; each knows what it must read."""

import asyncio
import errno
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from nbdram.memory.tiers import disk
from nbdram.protocol.wire import Command, CommandFlag
from tests.helpers import CLUSTER, PAGE, Answer, Client

# A longer READ with a simple reply can't end in an error: the server hangs up.
_LENGTHS = (512, PAGE, 5 * PAGE, CLUSTER, 100_000, 4 * CLUSTER)


class FlakyDisk:
    """The `os` of the disk tier. While it is not `well`, reads and writes fail at random, or are short."""

    def __init__(self, seed: int) -> None:
        self.well = True
        self.failed = {"read": 0, "write": 0}
        self._random = random.Random(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        if self._fails("read", 0.3):
            if self._random.random() < 0.5:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return os.pread(fd, length // 2, offset)
        return os.pread(fd, length, offset)

    def pwrite(self, fd: int, content: bytes, offset: int) -> int:
        if self._fails("write", 0.1):
            if self._random.random() < 0.5:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return os.pwrite(fd, content[: len(content) // 2], offset)
        return os.pwrite(fd, content, offset)

    def _fails(self, what: str, share: float) -> bool:
        fails = not self.well and self._random.random() < share
        self.failed[what] += fails
        return fails


@contextmanager
def flaky_disk(seed: int) -> Iterator[FlakyDisk]:
    """Under all disk tiers; one that has failed is asked again at once."""
    with pytest.MonkeyPatch.context() as patch:
        made = FlakyDisk(seed)
        patch.setattr(disk, "os", made)
        patch.setattr(disk, "_RETRY_S", 0.0)
        yield made


class Owner:
    """Has the bytes [base, base + size) of an export for itself, and does random things to them."""

    def __init__(self, client: Client, base: int, size: int) -> None:
        self.client, self.base = client, base
        self.model = bytearray(size)
        self.refused: dict[int, int] = {}  # how many requests, by errno
        self._random = random.Random(base)

    async def play(self, count: int) -> None:
        for _ in range(count):
            length = self._random.choice(_LENGTHS)
            at = self._random.randrange(len(self.model) - length)
            if self._random.random() < 0.5:
                at = at // PAGE * PAGE
            match self._random.randrange(12):
                case 0:
                    await self._trim(at, length)
                case 1:
                    await self._zero(at, length)
                case 2 | 3 | 4 | 5:
                    await self.check(at, length)
                case _:
                    await self._write(at, length)

    def _content(self, length: int) -> bytes:
        match self._random.randrange(8):
            case 0:
                return bytes(length)
            case 1 | 2 | 3:
                return self._random.randbytes(length)
            case _:
                return (b"%08d " % self._random.randrange(10**8) * (length // 9 + 1))[:length]

    async def _call(self, command: int, at: int, length: int, **how: Any) -> Answer:
        answer = await self.client.call(command, self.base + at, length, **how)
        if answer.error:
            self.refused[answer.error] = self.refused.get(answer.error, 0) + 1
            assert answer.error == errno.EIO or (answer.error == errno.ENOSPC and command != Command.READ), answer
        return answer

    async def _write(self, at: int, length: int) -> None:
        data = self._content(length)
        answer = await self._call(Command.WRITE, at, length, payload=data)
        await self._changed(at, data, answer)

    async def _zero(self, at: int, length: int) -> None:
        flags = self._random.choice((0, CommandFlag.NO_HOLE))
        answer = await self._call(Command.WRITE_ZEROES, at, length, flags=flags)
        await self._changed(at, bytes(length), answer)

    async def _trim(self, at: int, length: int) -> None:
        """Whole pages are zero afterwards, or as they were; the rest is as it was."""
        await self._call(Command.TRIM, at, length)
        first, end = -(-at // PAGE) * PAGE, (at + length) // PAGE * PAGE
        if first < end:
            await self._adopt(first, bytes(end - first))

    async def _changed(self, at: int, data: bytes, answer: Answer) -> None:
        if answer.error:
            await self._adopt(at, data)
        else:
            self.model[at : at + len(data)] = data

    async def _adopt(self, at: int, data: bytes) -> None:
        """What was refused, or may be left undone, leaves each sector old or new."""
        found = await self._read(at, len(data))
        for start, end in _sectors(at, at + len(data)):
            sector = found[start - at : end - at]
            assert sector in (self.model[start:end], data[start - at : end - at]), "neither old nor new"
        self.model[at : at + len(data)] = found

    async def check(self, at: int, length: int) -> None:
        assert await self._read(at, length) == self.model[at : at + length], f"{length} bytes at {self.base + at}"

    async def _read(self, at: int, length: int) -> bytes:
        """Some day the disk will do it: an error that passes does no harm."""
        for _ in range(1000):
            answer = await self._call(Command.READ, at, length)
            if not answer.error:
                return answer.data
        raise AssertionError("the disk has never worked")


def _sectors(start: int, end: int) -> Iterator[tuple[int, int]]:
    while start < end:
        stop = min(end, (start // 512 + 1) * 512)
        yield start, stop
        start = stop


async def together(owners: list[Owner], count: int) -> None:
    await asyncio.gather(*(owner.play(count) for owner in owners))
