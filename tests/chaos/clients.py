"""Faults that clients make: they die in the middle of what they do, and there are too many of them."""

import asyncio
import random
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from nbdram.protocol.handshake import ReplyMode
from tests.helpers import MIB, dial
from tests.peers.running import tool

from .world import HUNG_UP, PATIENCE_S, Setting, World

_SECTOR: Final = 512
_FILES: Final = 64
_CROWD: Final = 150
_IMAGE_BYTES: Final = 8 * MIB


@contextmanager
def nothing_special(directory: Path) -> Iterator[Setting]:
    yield Setting(directory / "swap")


@contextmanager
def with_another_export(directory: Path) -> Iterator[Setting]:
    yield Setting(directory / "swap", options=("--export", f"scratch={_IMAGE_BYTES}"))


@contextmanager
def with_few_files(directory: Path) -> Iterator[Setting]:
    yield Setting(directory / "swap", prefix=("prlimit", f"--nofile={_FILES}:{_FILES}"))


def _sector(number: int, at: int) -> bytes:
    return struct.pack(">QQ", number, at) * (_SECTOR // 16)


async def die(world: World, seconds: float) -> str:
    """nbdcopy is killed with -9 while it writes, again and again: each sector is that of one copy."""
    image, chance = world.directory / "image", random.Random(3)
    uri = f"nbd+unix:///scratch?socket={world.server.path}"
    until, number, unfinished, torn = time.monotonic() + seconds, 0, 0, 0
    while time.monotonic() < until or number < 3:
        number += 1
        image.write_bytes(b"".join(_sector(number, at) for at in range(0, _IMAGE_BYTES, _SECTOR)))
        copying = await asyncio.create_subprocess_exec(
            tool("nbdcopy"), "--connections=2", "--requests=16", str(image), uri, stderr=asyncio.subprocess.DEVNULL
        )
        with suppress(TimeoutError):
            await asyncio.wait_for(copying.wait(), chance.uniform(0.02, 0.2))
        if copying.returncode is None:
            copying.kill()
            unfinished += 1
        await copying.wait()
        torn += await _torn_sectors(world, number)
    did = f"{number} times nbdcopy wrote {_IMAGE_BYTES // MIB} MiB and was killed with -9, {unfinished} times half-way"
    return f"{did}; sectors cut in the middle: {torn}"


async def _torn_sectors(world: World, newest: int) -> int:
    """How many sectors begin as one copy and go on as an older one; nothing else may be in any of them."""
    torn = 0
    async with await dial(world.server.path) as client:
        client.patience_s = PATIENCE_S
        await client.enter("scratch", ReplyMode.EXTENDED)
        for start in range(0, _IMAGE_BYTES, MIB):
            found = await client.read(start, MIB)
            for at in range(start, start + MIB, _SECTOR):
                sector = found[at - start : at - start + _SECTOR]
                first, last = (int.from_bytes(sector[place : place + 8], "big") for place in (0, _SECTOR - 16))
                assert max(first, last) <= newest
                new, old = (_sector(number, at) if number else bytes(_SECTOR) for number in (first, last))
                if sector != new:
                    torn += 1
                    cut = next(place for place in range(_SECTOR) if sector[place] != new[place])
                    assert first >= last
                    assert sector[cut:] == old[cut:], f"a sector of more than two copies: {at:#x}"
    return torn


async def crowd_in(world: World, seconds: float) -> str:
    """Far more connections than the server may have open files, held until the end; then they go away."""
    crowd = []
    turned_away = 0
    until = time.monotonic() + seconds
    for number in range(_CROWD):
        try:
            client = await dial(world.server.path)
        except OSError:
            turned_away += 1
            continue
        crowd.append(client)
        client.patience_s = 0.2
        with suppress(*HUNG_UP):
            await client.enter("disk", ReplyMode.SIMPLE)
        if number % 10 == 0:
            for gone in list(world.clients)[:1]:
                gone.kill()  # a writer must find a place again, which it can't before the others leave
    await asyncio.sleep(max(0.0, until - time.monotonic()))
    entered = sum(client.size > 0 for client in crowd)
    for client in crowd:
        client.kill()
    return f"{_CROWD} connections to a server of {_FILES} open files: {entered} were served"
