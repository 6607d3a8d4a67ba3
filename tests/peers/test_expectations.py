"""What the suites of libnbd and of nbd expect of any server, where no other test here has it already.

nbd's tester replays a long trace and looks at every block; libnbd starts servers by socket activation, sends what it
should not, and goes on; both put other programs in between.
"""

import asyncio
import errno
import hashlib
import random
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdram.protocol.handshake import ReplyMode
from nbdram.protocol.wire import Command, CommandFlag
from tests.helpers import ALL_MODES, CHUNK_MODES, KIB, MIB, PAGE, PATIENCE_S, Client, running

from .conftest import Serve
from .running import Server, output, random_bytes, run, same_bytes, tool

BLOCK = 512


# -- the integrity replay --------------------------------------------------------------------------------


def block(number: int, at: int) -> bytes:
    """What write `number` puts into block `at`: half of it noise, so that it compresses, but not away."""
    if not number:
        return bytes(BLOCK)
    return hashlib.shake_128(b"%d %d" % (number, at)).digest(BLOCK // 2) + number.to_bytes(8, "big") * (BLOCK // 16)


class Replay:
    """Requests of several connections to one device; never two at a time that overlap, unless both READ.

    Each block tells which write it is of and where it belongs: a stale one is found, and one in the wrong place.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.blocks = size // BLOCK
        self.random = random.Random(seed)
        self.written = array("L", [0]) * self.blocks  # the last write of each block; 0: zeros
        self.busy: set[int] = set()
        self.number = 0
        self.read_bytes = 0

    async def run(self, client: Client, batches: int, depth: int) -> None:
        for _ in range(batches):
            await self._batch(client, depth)

    async def _batch(self, client: Client, depth: int) -> None:
        asked = bytearray()
        expected: dict[int, bytes] = {}
        changes: list[tuple[range, int]] = []
        claimed: set[int] = set()
        for _ in range(depth):
            length = self.random.choice((1, 1, 2, 7, 8, 8, 16, 64, 129, 300, 1000))
            start = self.random.randrange(self.blocks - length + 1)
            blocks = range(start, start + length)
            if not self.busy.isdisjoint(blocks):
                continue
            self.busy.update(blocks)
            claimed.update(blocks)
            self.number += 1
            offset, size = blocks.start * BLOCK, length * BLOCK
            flags = CommandFlag.FUA if self.number % 16 == 3 else 0
            kind = self.random.random()
            if kind < 0.45:
                asked += client.request(Command.READ, offset, size)
                expected[client.last_cookie] = b"".join(block(self.written[at], at) for at in blocks)
            elif kind < 0.9:
                data = b"".join(block(self.number, at) for at in blocks)
                asked += client.request(Command.WRITE, offset, flags=flags, payload=data)
                changes.append((blocks, self.number))
            else:
                asked += client.request(Command.WRITE_ZEROES, offset, size, flags=flags)
                changes.append((blocks, 0))
            expected.setdefault(client.last_cookie, b"")
        if self.random.random() < 0.3:
            asked += client.request(Command.FLUSH)
            expected[client.last_cookie] = b""
        sending = asyncio.create_task(client.send(bytes(asked)))
        answers = await client.replies(len(expected))
        await sending
        assert {answer.error for answer in answers.values()} <= {0}
        assert {cookie: answer.data for cookie, answer in answers.items()} == expected, (
            "a block is not what was written"
        )
        for blocks, number in changes:
            self.written[blocks.start : blocks.stop] = array("L", [number]) * len(blocks)
        self.read_bytes += sum(map(len, expected.values()))
        self.busy -= claimed

    async def verify(self, client: Client) -> None:
        step = MIB // BLOCK
        for start in range(0, self.blocks, step):
            found = await client.read(start * BLOCK, MIB)
            assert found == b"".join(block(self.written[at], at) for at in range(start, start + step))


async def test_the_huge_replay_finds_in_every_block_what_was_last_written(tmp_path: Path) -> None:
    swap = tmp_path / "swap"
    options = ("--export", "ram=48M", "--memory", "56M", "--swap", f"disk:{swap},max=64M")
    async with running(tmp_path, *options) as server:
        replay = Replay(48 * MIB, seed=7)
        clients = [await server.entered(mode=mode) for mode in ALL_MODES]
        try:
            await asyncio.gather(*(replay.run(client, 40, 33) for client in clients))
            await replay.verify(clients[0])
            assert replay.read_bytes > 48 * MIB
        finally:
            for client in clients:
                client.kill()


# -- several connections ---------------------------------------------------------------------------------


async def test_a_flush_covers_what_others_have_had_acknowledged_also_past_the_end_of_the_server() -> None:
    """CAN_MULTI_CONN: acknowledged on one connection, flushed on another, there for a third, and for all later ones."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shm:
        directory = Path(shm)
        options = ("--export", "ram=64M", "--memory", "256M", "--state-dir", str(directory / "state"))
        pieces = [random_bytes(300 * KIB, seed) for seed in range(6)]
        async with running(directory, *options) as server:
            writers = [await server.entered(mode=ALL_MODES[number % 3]) for number in range(6)]
            other = await server.entered(mode=ReplyMode.STRUCTURED)
            await asyncio.gather(*(writer.write(n * MIB + n, pieces[n]) for n, writer in enumerate(writers)))
            assert (await other.call(Command.FLUSH)).error == 0
            server.process.kill()
            await server.process.wait()
            for client in (*writers, other):
                client.kill()
        async with running(directory, *options) as server, await server.entered() as client:
            for number, piece in enumerate(pieces):
                assert await client.read(number * MIB + number, len(piece)) == piece


# -- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ALL_MODES, ids=[mode.value for mode in ALL_MODES])
async def test_each_of_many_mistakes_is_answered_and_what_is_in_between_is_done(
    tmp_path: Path, mode: ReplyMode
) -> None:
    """One connection, everything in flight at once: unaligned, oversized, of no bytes, past the end, not negotiated."""
    options = ("--export", "ram=8M", "--memory", "64M")
    async with running(tmp_path, *options) as server, await server.entered(mode=mode) as client:
        size, most = client.size, 32 * MIB
        wrong = [
            (Command.READ, size - 1, 2, 0, b"", errno.EINVAL),
            (Command.READ, 2**64 - 1, 1, 0, b"", errno.EINVAL),
            (Command.READ, 0, most + 1, 0, b"", errno.EINVAL),
            (Command.WRITE, size, 0, 0, b"x" * 777, errno.ENOSPC),
            (Command.WRITE, size - 100 * KIB, 0, 0, b"x" * 200_001, errno.ENOSPC),
            (Command.TRIM, size - 1, 2, 0, b"", errno.EINVAL),
            (Command.WRITE_ZEROES, 1, size, 0, b"", errno.ENOSPC),
            (Command.BLOCK_STATUS, 0, PAGE, 0, b"", errno.EINVAL),  # no context was negotiated
            (Command.TRIM, 0, PAGE, CommandFlag.REQ_ONE, b"", errno.EINVAL),
            (99, 0, PAGE, 0, b"", errno.EINVAL),
        ]
        asked, expected = bytearray(), {}
        for turn in range(60):
            for command, offset, length, flags, payload, error in wrong:
                asked += client.request(command, offset, length, flags=flags, payload=payload)
                expected[client.last_cookie] = (error, b"")
                at = (len(expected) * 1013) % (size - 1000)
                asked += client.request(Command.WRITE, at, payload=bytes((turn + 1,)) * 999)
                expected[client.last_cookie] = (0, b"")
            asked += client.request(Command.READ, 8, 0)
            expected[client.last_cookie] = (0, b"")
        sending = asyncio.create_task(client.send(bytes(asked)))
        answers = await client.replies(len(expected))
        await sending
        assert {cookie: (answer.error, answer.data) for cookie, answer in answers.items()} == expected
        if mode in CHUNK_MODES:
            assert all(answer.message for answer in answers.values() if answer.error)
        assert await client.read(1013, 999) == b"\1" * 999


# -- other programs in between ---------------------------------------------------------------------------


def test_libnbd_starts_the_server_by_socket_activation(serve: Serve, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nbdram", "serve", "--listen", "fd", "--export", "disk=16M", "--memory", "64M"]
    command += ["--metrics", "off", "--control", str(tmp_path / "control")]
    serve("disk=1M").script(f"""
        h = nbd.NBD()
        h.connect_systemd_socket_activation({command!r})
        assert h.get_size() == 16 * MIB
        h.pwrite(noise(100_000), 12345)
        assert h.pread(100_000, 12345) == noise(100_000)
        h.shutdown()
    """)


@contextmanager
def between(*command: str | Path, socket: Path) -> Iterator[str]:
    """A program that passes requests on."""
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    try:
        for _ in range(int(PATIENCE_S * 100)):
            if socket.exists():
                break
            with pytest.raises(subprocess.TimeoutExpired):  # it is still there
                process.wait(0.01)
        yield f"nbd+unix:///?socket={socket}"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("program", ["nbdkit", "qemu-nbd"])
def test_what_passes_through_another_program_is_as_it_was(server: Server, tmp_path: Path, program: str) -> None:
    """Copied in through nbdkit's or qemu's own client, holes and all, and out by the straight way."""
    socket, image, back = tmp_path / "between", tmp_path / "image", tmp_path / "back"
    with image.open("wb") as file:
        file.truncate(128 * MIB)
        for at in (0, 5 * MIB + 512, 128 * MIB - 70_000):
            file.seek(at)
            file.write(random_bytes(70_000, at))
    commands = {
        "nbdkit": (tool("nbdkit"), "-f", "-U", socket, "nbd", f"uri={server.uri()}"),
        "qemu-nbd": (tool("qemu-nbd"), "-t", "-k", socket, "-f", "raw", "--discard=unmap", "-e", "4", server.uri()),
    }
    with between(*commands[program], socket=socket) as uri:
        run("nbdcopy", image, uri)
        assert '"type": 3' in output("nbdinfo", "--map", "--json", uri)  # it sees the holes
    assert server.allocated_bytes() < MIB
    run("nbdcopy", server.uri(), back)
    assert same_bytes(image, back, 128 * MIB)
