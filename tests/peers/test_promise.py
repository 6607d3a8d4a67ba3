"""`--memory` is a promise: what the server holds stays within 5 % of it, whatever its clients do.

Sampled from outside: private memory (RssAnon), and what the kernel has allocated for the memory files.
"""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Self

import pytest

from nbdram.protocol.handshake import ReplyMode
from nbdram.protocol.wire import Command, Option, OptionReply
from tests.helpers import CLUSTER, KIB, MIB, client_flags, go, option, request

from .conftest import Serve
from .running import Server, random_bytes
from .test_fio import fio, transferred

PROMISE = 1.05


class Watch:
    """The most that a server holds while the block runs."""

    def __init__(self, server: Server) -> None:
        self.most = 0
        self.where = ""
        self.samples = 0
        self._server = server
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.001):
            private, files = self._server.private_bytes(), self._server.allocated_bytes()
            if private + files > self.most:
                self.most, self.where = private + files, f"{private >> 20} MiB private, {files >> 20} MiB in files"
            self.samples += 1


Kept = Callable[..., tuple[Server, Callable[[], AbstractContextManager[None]]]]


@pytest.fixture
def kept(serve: Serve) -> Kept:
    """Starts a server with so much memory besides what the process itself takes, and gives the promise to test."""
    overhead = serve("probe=1M").private_bytes()

    def start(mib: int, export: str, *options: str) -> tuple[Server, Callable[[], AbstractContextManager[None]]]:
        promised = overhead + mib * MIB
        server = serve(export, memory=str(promised), options=options)

        @contextmanager
        def promise() -> Iterator[None]:
            with Watch(server) as watch:
                yield
            assert watch.samples > 20
            assert watch.most <= PROMISE * promised, f"{watch.where} were held, {promised >> 20} MiB were promised"

        return server, promise

    return start


@pytest.mark.parametrize(("mib", "swap"), [(16, False), (44, True)], ids=["ram", "disk"])
def test_under_sustained_writes_of_any_size(kept: Kept, tmp_path: Path, mib: int, swap: bool) -> None:
    """Twice as much as fits, of which a part can be compressed away; four connections write all of it."""
    size = mib * 2
    server, promise = kept(mib, f"disk={size}M", *(("--swap", f"disk:{tmp_path}") if swap else ()))
    common = ("--numjobs=4", f"--size={size}M", "--buffer_compress_percentage=70", "--refill_buffers=1")
    for rw, length, depth, times in (("randwrite", "4k", 32, 0.25), ("write", "1m", 8, 1), ("write", "32m", 2, 1)):
        how = (f"--rw={rw}", f"--bs={length}", f"--iodepth={depth}", f"--io_size={int(times * size)}M")
        with promise():
            done = fio(tmp_path, server.uri(), *how, *common)
        assert transferred(done, "write") >= size * MIB


def content(cluster: int, raw_bytes: int) -> bytes:
    """Of a cluster: so much that does not compress, and much that does."""
    return random_bytes(raw_bytes, cluster) + b"%07d\n" % cluster * ((CLUSTER - raw_bytes) // 8)


class SlowReader:
    """A client that asks for much, and takes its time."""

    def __init__(self, server: Server, mode: ReplyMode) -> None:
        self.mode = mode
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(server.socket))
        wanted = [option(Option.STRUCTURED_REPLY)] if mode is ReplyMode.STRUCTURED else []
        self.socket.sendall(client_flags() + b"".join(wanted) + go("disk"))
        self._receive(18)
        for _ in (*wanted, go):
            kind = 0
            while kind != OptionReply.ACK:
                kind, length = struct.unpack(">12xII", self._receive(20))
                self._receive(length)

    def _receive(self, length: int) -> bytes:
        return self.socket.recv(length, socket.MSG_WAITALL)

    def ask(self, offsets: list[int], length: int) -> None:
        asked = [request(self.mode, Command.READ, at, length, cookie=at) for at in offsets]
        self.socket.sendall(b"".join(asked))

    def take(self, count: int, length: int, raw_bytes: int) -> None:
        """So many simple replies, each of which must be right."""
        for _ in range(count):
            assert self._receive(8) == bytes.fromhex("6744669800000000")
            at = int.from_bytes(self._receive(8), "big")
            for cluster in range(at // CLUSTER, (at + length) // CLUSTER):
                assert self._receive(CLUSTER) == content(cluster, raw_bytes)


@pytest.mark.parametrize("mode", [ReplyMode.SIMPLE, ReplyMode.STRUCTURED], ids=["simple", "structured"])
@pytest.mark.parametrize("swap", [False, True], ids=["ram", "disk"])
def test_while_clients_ask_for_much_cold_data_and_take_none_of_it(
    kept: Kept, tmp_path: Path, mode: ReplyMode, swap: bool
) -> None:
    """Queued replies, images that were read from disk, and large answers in one piece count too."""
    size, raw_bytes = 80, 48 * KIB if swap else 8 * KIB
    server, promise = kept(40, f"disk={size}M", *(("--swap", f"disk:{tmp_path}") if swap else ()))
    server.script(f"""
        for cluster in range({size * MIB // CLUSTER}):
            data = noise({raw_bytes}, cluster) + b"%07d\\n" % cluster * {(CLUSTER - raw_bytes) // 8}
            h.pwrite(data, cluster * 65536)
    """)
    for length, count in ((64 * KIB, 300), (256 * KIB, 64), (16 * MIB, 2)):
        with ExitStack() as stack:
            with promise():
                readers = [SlowReader(server, mode) for _ in range(8)]
                for number, reader in enumerate(readers):
                    stack.enter_context(reader.socket)
                    spots = [(7 * number + turn) % (size * MIB // length) for turn in range(count)]
                    reader.ask([spot * length for spot in spots], length)
                time.sleep(0.3)
            if mode is ReplyMode.SIMPLE:
                readers[0].take(count, length, raw_bytes)
                readers[7].take(count, length, raw_bytes)
