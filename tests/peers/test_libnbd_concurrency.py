"""Many requests in flight, and many connections to one export, with libnbd."""

import subprocess

import pytest

from .conftest import Serve
from .running import DEBIAN_PYTHON, Server, environment


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_every_one_of_500_requests_in_flight_is_answered_with_its_own_bytes(server: Server, structured: bool) -> None:
    server.script(f"""
        h = connect(structured={structured})
        chance, at, writes = random.Random(3), 17, []
        for number in range(2000):
            length = chance.choice((1, 511, 4095, 4096, 4097, 20000, 65536, 100001))
            writes.append((at, noise(length, number)))
            at += length + chance.choice((0, 1, 4096))
        for first in range(0, 2000, 500):
            window = writes[first : first + 500]
            finish(h, [h.aio_pwrite(nbd.Buffer.from_bytearray(data), at) for at, data in window])
        chance.shuffle(writes)
        for first in range(0, 2000, 500):
            window = [(nbd.Buffer(len(data)), at, data) for at, data in writes[first : first + 500]]
            finish(h, [h.aio_pread(buffer, at) for buffer, at, _ in window])
            for buffer, _, data in window:
                assert buffer.to_bytearray() == data
    """)


def test_commands_of_all_kinds_are_in_flight_at_once(server: Server) -> None:
    """Each lane of 1 MiB is written, trimmed or zeroed, and asked about, while the other lanes are too."""
    server.script("""
        h = connect(nbd.CONTEXT_BASE_ALLOCATION)
        for turn in range(4):
            cookies = []
            for lane in range(96):
                at = lane * MIB
                match (lane + turn) % 4:
                    case 0:
                        cookies.append(h.aio_pwrite(nbd.Buffer.from_bytearray(noise(MIB - 3, lane)), at + 1))
                    case 1:
                        cookies.append(h.aio_trim(MIB, at))
                    case 2:
                        cookies.append(h.aio_zero(MIB, at))
                    case 3:
                        cookies.append(h.aio_block_status(MIB, at, lambda *_: 0))
                        cookies.append(h.aio_pread(nbd.Buffer(MIB), at))
            finish(h, cookies)
            for lane in range(96):
                content = h.pread(MIB - 3, lane * MIB + 1)
                if (lane + turn) % 4 == 0:
                    assert content == noise(MIB - 3, lane)
                elif (lane + turn) % 4 < 3:
                    assert content == bytes(MIB - 3)
    """)


def test_eight_writes_of_32_mib_in_flight_do_not_mix(serve: Serve) -> None:
    server = serve("disk=300M")
    server.script("""
        peers = [connect() for _ in range(4)]
        data = [noise(32 * MIB, number) for number in range(8)]
        cookies = {}
        for number in range(8):
            buffer = nbd.Buffer.from_bytearray(data[number])
            cookies.setdefault(number % 4, []).append(peers[number % 4].aio_pwrite(buffer, number * 32 * MIB + 5))
        for number, peer in enumerate(peers):
            finish(peer, cookies[number])
        for number in range(8):
            assert peers[3 - number % 4].pread(32 * MIB, number * 32 * MIB + 5) == data[number]
    """)


def test_what_one_connection_wrote_the_other_reads_at_once(serve: Serve) -> None:
    server = serve("disk=16M", tcp=True)
    server.script(f"""
        other = unconnected()
        other.connect_uri({server.tcp_uri()!r})
        assert h.can_multi_conn() and other.can_multi_conn()
        for number in range(500):
            h.pwrite(noise(5000, number), number * 1000)
            assert other.pread(5000, number * 1000) == noise(5000, number)
            other.trim(PAGE, 0)
            assert h.pread(PAGE, 0) == bytes(PAGE)
    """)


def test_twenty_connections_share_the_server(serve: Serve) -> None:
    server = serve("disk=32M")
    server.script("""
        peers = [connect(structured=bool(number % 2)) for number in range(20)]
        for turn in range(10):
            buffers = [nbd.Buffer.from_bytearray(noise(MIB, turn * 20 + number)) for number in range(20)]
            cookies = [peer.aio_pwrite(buffers[n], (n + turn) % 20 * MIB) for n, peer in enumerate(peers)]
            for peer, cookie in zip(peers, cookies, strict=True):
                finish(peer, [cookie])
        for number, peer in enumerate(peers):
            assert peer.pread(MIB, (19 - number + 9) % 20 * MIB) == noise(MIB, 9 * 20 + 19 - number)
    """)


def test_a_slow_reader_does_not_hold_up_others(server: Server) -> None:
    server.script("""
        data = noise(32 * MIB)
        h.pwrite(data, 0)
        slow = connect()
        for _ in range(20):
            slow.aio_pread(nbd.Buffer(32 * MIB), 0)  # it never polls again
        for number in range(200):
            assert h.pread(PAGE, number * PAGE) == data[number * PAGE : (number + 1) * PAGE]
        assert slow.aio_in_flight() == 20
    """)


def test_replies_that_nobody_reads_cost_little_memory(server: Server) -> None:
    """32 MiB of every second page, 100 times: what has to be gathered is gathered for one READ at a time."""
    server.script(f"""
        def private_mib():
            with open("/proc/{server.process.pid}/status") as status:
                return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:")) >> 10
        for page in range(0, 8192, 2):
            h.pwrite(b"x", page * PAGE)
        before, lazy, buffer = private_mib(), connect(structured=False), nbd.Buffer(32 * MIB)
        for _ in range(100):
            lazy.aio_pread(buffer, 0)  # it never polls
        for _ in range(1000):
            assert h.pread(1, 0) == b"x"
            grown = private_mib() - before
            assert grown < 80, grown
    """)


def test_clients_killed_in_the_midst_of_writing_leave_no_memory_behind(server: Server) -> None:
    """Server.finish asserts the rest: the server is well, and all memory came back."""
    victim = f"""
import os, sys
sys.argv[1:] = [{server.uri()!r}]
from prelude import *
for number in range(3):
    h.aio_pwrite(nbd.Buffer.from_bytearray(b"x" * (32 * MIB)), number * 32 * MIB + 77)
while h.aio_in_flight():
    h.poll(-1)
    if random.random() < 0.1:
        os.kill(os.getpid(), 9)
"""
    for _ in range(6):
        subprocess.run([DEBIAN_PYTHON, "-c", victim], env=environment(), timeout=30)
    server.script("h.pwrite(b'alive', 0)\nassert h.pread(5, 0) == b'alive'")
