"""What a large WRITE leaves that ends in its middle: nothing but old and new bytes, each in its place.

Pages that were not resident are old or new. Of those that were, the one sector where the stream ended may be new in
its beginning: see docs/design.md.
"""

import struct
from pathlib import Path

import pytest

from nbdram.protocol.handshake import ReplyMode
from nbdram.protocol.wire import Command
from nbdram.server import connection
from nbdram.server.connection import DIRECT_BYTES
from tests.helpers import ALL_MODES, CLUSTER, PAGE, Served, served
from tests.memory.evicting import evict

SECTOR = 512
AREA = 2 * CLUSTER
MODES = pytest.mark.parametrize("mode", ALL_MODES, ids=[mode.value for mode in ALL_MODES])
OFFSETS = pytest.mark.parametrize("offset", [0, 1, 511, PAGE + 512])
LENGTHS = pytest.mark.parametrize("length", [DIRECT_BYTES, DIRECT_BYTES + 700])


@pytest.fixture(autouse=True, params=[False, True], ids=["", "alone"])
def alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether each connection takes what there is right from its socket, as one that is alone does."""
    monkeypatch.setattr(connection, "_ALONE_BATCHES", 0 if request.param else 1 << 30)


def content(generation: int, start: int, end: int) -> bytes:
    """Bytes [start, end) of the area; no two places, and no two generations, have the same in 16 bytes."""
    first = start // 16 * 16
    return b"".join(struct.pack(">QQ", generation, at) for at in range(first, end, 16))[start - first : end - first]


def cuts_of(offset: int, length: int) -> list[int]:
    """Where a payload may end before its end: around its first and last sectors and pages, and here and there."""
    edges = {at - offset for at in (SECTOR, 2 * SECTOR, PAGE, 2 * PAGE, 2 * PAGE + SECTOR)}
    edges |= {(offset + length) // unit * unit - offset for unit in (SECTOR, PAGE)} | {0, length, 20_000, 33_333}
    return sorted({cut for edge in edges for cut in (edge - 1, edge, edge + 1) if 0 <= cut < length})


def check(found: bytes, generation: int, offset: int, end: int) -> None:
    old, new = generation - 1, generation
    assert found == content(old, 0, offset) + content(new, offset, end) + content(old, end, AREA)


@MODES
@OFFSETS
@LENGTHS
async def test_over_resident_pages_all_that_came_is_new_and_all_else_old(
    tmp_path: Path, mode: ReplyMode, offset: int, length: int
) -> None:
    async with served(tmp_path) as here:
        for generation, cut in enumerate(cuts_of(offset, length), 1):
            here.device().write(0, content(generation - 1, 0, AREA))
            await die(here, mode, generation, offset, length, cut)
            check(here.device().read(0, AREA), generation, offset, offset + cut)


@MODES
@OFFSETS
async def test_pages_that_were_not_resident_are_old_or_new(tmp_path: Path, mode: ReplyMode, offset: int) -> None:
    length = DIRECT_BYTES + 700
    async with served(tmp_path) as here:
        device = here.device()
        for generation, cut in enumerate(cuts_of(offset, length), 1):
            list(device.trim(0, device.size))
            device.write(0, content(generation - 1, 0, AREA))
            for cluster in range(AREA // CLUSTER):
                assert evict(device, cluster)
            resident = set(device.edge_pages(offset, offset + length))  # in part: the WRITE makes them resident first
            await die(here, mode, generation, offset, length, cut)
            end = offset + cut
            if end & -PAGE not in resident:
                end = max(offset, end & -PAGE)
            check(device.read(0, AREA), generation, offset, end)


async def die(here: Served, mode: ReplyMode, generation: int, offset: int, length: int, cut: int) -> None:
    """A client that dies when it has sent `cut` bytes of a payload, in one to three pieces."""
    client = await here.entered("ram", mode)
    whole = client.request(Command.WRITE, offset, payload=content(generation, offset, offset + length))
    sent = len(whole) - length + cut
    await client.send_in_pieces(whole[:sent], [sent // 3, sent // 2][: generation % 3])
    client.kill()
    await here.all_gone()
    assert not here.device().incoming
