"""`python -m tests.fuzz.record`: makes the seeds anew, from conversations of real clients and of real servers.

Clients talk to `nbdram serve` through a proxy that keeps what they send: their handshakes are seeds of `haggling`, and
their requests become programs of `serving`. For `dialing`, our own client asks nbdram, nbdkit and qemu-nbd, and what
these say is kept. `words` has what the documentation tells users to write.
"""

import asyncio
import hashlib
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from nbdram.errors import NbdramError
from nbdram.protocol.wire import Command, Option
from tests.helpers import ALL_MODES, PATIENCE_S, dial
from tests.peers.running import Server, run, tool

from .dialing import conversation
from .program import SIZE, program_of
from .targets import SEEDS
from .words import SEEDS as WORDS

_IHAVEOPT: Final = b"IHAVEOPT"
_QUESTIONS: Final = (0, 1, 1 | 4, 2, 8, 16 | 1, 32, 64, 127, 63)  # see `dialing.conversation`

Conversation = bytearray  # what a client sent


class Proxy:
    """Passes connections on, and keeps what clients send."""

    def __init__(self, path: Path, behind: Path) -> None:
        self.conversations: list[Conversation] = []
        self._behind = str(behind)
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(32)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client = self._listening.accept()[0]
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._behind)
            kept = Conversation()
            self.conversations.append(kept)
            for source, target, sink in ((client, server, kept), (server, client, None)):
                threading.Thread(target=_pass_on, args=(source, target, sink), daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket, kept: Conversation | None) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            if kept is not None:
                kept += data
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def split(sent: bytes) -> tuple[bytes, int, list[tuple[int, int, int, int]]]:
    """A conversation as its handshake, the number of its reply mode, and its requests."""
    at, mode = 4, 0
    while sent[at : at + 8] == _IHAVEOPT:
        option, length = struct.unpack_from(">II", sent, at + 8)
        mode = {Option.STRUCTURED_REPLY: 1, Option.EXTENDED_HEADERS: 2}.get(option, mode)
        at += 16 + length
    handshake, requests = sent[:at], []
    layout, size = (">IHHQQQ", 32) if mode == 2 else (">IHHQQI", 28)
    while len(sent) - at >= size:
        _, flags, command, _, offset, length = struct.unpack_from(layout, sent, at)
        requests.append((command, flags, offset, length))
        at += size + (length if command == Command.WRITE else 0)
    return handshake, mode, requests


def _clients(uri: str, files: Path) -> None:
    image, other = files / "image", files / "other"
    image.write_bytes(b"nbdram" * 9000 + bytes(200_000) + b"x" * 5000)
    image.write_bytes(image.read_bytes().ljust(SIZE, b"\0"))
    run("nbdinfo", uri)
    run("nbdinfo", "--list", uri)
    run("nbdinfo", "--map", uri)
    run("nbdinfo", "--map=x-nbdram:tier", uri)
    run("nbdinfo", uri.replace("ram?", "nobody?"), code=1)
    run("nbdcopy", image, uri)
    run("nbdcopy", uri, other)
    run("nbdcopy", "--requests=4", "--request-size=32768", "--allocated", image, uri)
    run("qemu-img", "info", uri)
    run("qemu-img", "map", "-f", "raw", uri)
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, uri)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, uri)
    steps = "write -P 7 1000 70000|write -z 4096 65536|write -zu 65536 65536|discard 0 131072|read -P 0 0 4096|flush"
    run("qemu-io", "-f", "raw", uri, *(word for step in steps.split("|") for word in ("-c", step)))
    run(
        "qemu-io",
        "-f",
        "raw",
        "-t",
        "none",
        uri,
        "-c",
        "aio_write -f 300 512",
        "-c",
        "aio_read 0 300k",
        "-c",
        "aio_flush",
    )
    job = ("--name=fio", "--ioengine=nbd", f"--uri={uri}", f"--size={SIZE}", "--rw=randrw", "--bsrange=512-64k")
    run("fio", *job, "--bs_unaligned", "--iodepth=8", "--io_size=1M", "--randseed=1", cwd=files)


async def _own_client(path: Path) -> None:
    """What no client of Debian's speaks: extended headers, and options of all kinds."""
    for mode in ALL_MODES:
        contexts = () if mode is ALL_MODES[0] else ("base:allocation", "x-nbdram:tier")
        async with await dial(path) as client:
            await client.enter("ram", mode, contexts)
            await client.write(100, b"abc" * 40_000)
            await client.call(Command.WRITE_ZEROES, 8192, 70_000)
            await client.call(Command.TRIM, 0, SIZE)
            await client.call(Command.CACHE, 0, SIZE)
            await client.read(0, SIZE)
            if contexts:
                await client.call(Command.BLOCK_STATUS, 0, SIZE)
            await client.send(client.request(Command.DISC))
            await client.rest()


@contextmanager
def _peer(*command: str, socket_path: Path) -> Iterator[str]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        _wait_for(socket_path.exists)
        yield str(socket_path)
    finally:
        process.terminate()
        process.wait()


def _wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def _heard(path: str, choice: int) -> bytes:
    """What a server says in a conversation of ours."""
    heard, wanted = bytearray((choice,)), None
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE_S)
        sock.connect(path)
        steps = conversation(choice)
        with suppress(StopIteration, NbdramError, EOFError, ConnectionError):
            wanted = next(steps)
            while True:
                if isinstance(wanted, bytes):
                    sock.sendall(wanted)
                    wanted = next(steps)
                else:
                    piece = _exactly(sock, wanted)
                    heard += piece
                    wanted = steps.send(piece)
    return bytes(heard)


def _exactly(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = sock.recv(length - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def _keep(target: str, seeds: list[bytes], longest: int) -> None:
    directory = SEEDS / target
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.iterdir():
        if not old.name.startswith("found-"):  # what broke something once
            old.unlink()
    for seed in seeds:
        if len(seed) <= longest:
            (directory / hashlib.sha1(seed).hexdigest()[:12]).write_bytes(seed)
    print(f"{target}: {len(list(directory.iterdir()))} seeds")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="nbdram-record-") as name:
        files = Path(name)
        server = Server(files, (f"ram={SIZE}", "ro=4K,ro,description=a device"), memory="128M", tcp=False)
        proxy = Proxy(files / "proxy", server.socket)
        _clients(f"nbd+unix:///ram?socket={files}/proxy", files)
        asyncio.run(_own_client(files / "proxy"))
        parts = [split(bytes(sent)) for sent in proxy.conversations]
        heard = [_heard(str(server.socket), choice) for choice in _QUESTIONS]
        kit, emulator = files / "nbdkit", files / "qemu"
        with _peer(tool("nbdkit"), "-f", "-U", str(kit), "-e", "ram", "memory", "1M", socket_path=kit) as path:
            heard += [_heard(path, choice) for choice in _QUESTIONS]
        served = ("-t", "-k", str(emulator), "-x", "ram", "-f", "raw", str(files / "image"))
        with _peer(tool("qemu-nbd"), *served, socket_path=emulator) as path:
            heard += [_heard(path, choice) for choice in _QUESTIONS]
        server.finish()
    _keep("haggling", [b"\0" + handshake for handshake, _, _ in parts], 1200)
    talks = [(mode, requests) for _, mode, requests in parts if requests]
    programs = [program_of(mode, requests) for mode, requests in talks]
    programs += [program_of(mode | 4, requests, reclaim=True) for mode, requests in talks]
    programs += [program_of(mode | 44, requests[::-1], reclaim=True) for mode, requests in talks]
    programs += [program_of(mode | 192, requests) for mode, requests in talks]
    _keep("serving", programs, 600)
    _keep("dialing", heard, 600)
    _keep("words", [bytes((number,)) + text.encode() for number, text in WORDS], 120)


if __name__ == "__main__":
    main()
