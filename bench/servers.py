"""A server under test: started, watched until it serves, and ended whatever happens."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, Self
from urllib.parse import quote

from bench import proc
from bench.errors import BenchError
from nbdram.config import parse_size

START_TIMEOUT_S: Final = 20.0
STOP_TIMEOUT_S: Final = 10.0
DEFAULT_EXPORT: Final = "ram"
_GREETING: Final = b"NBDMAGIC"
_RAM_DIRECTORY: Final = Path("/dev/shm")


class Server:
    """One server process, with a directory of its own on tmpfs and a Unix socket in it.

    `argv` makes the command line from that directory; the server is to listen on
    `socket_in(directory)`. `announces` is a text that it prints once it is ready, if it prints any.
    """

    def __init__(self, name: str, argv: Callable[[Path], list[str]], announces: str = "") -> None:
        self.name = name
        self._argv = argv
        self._announces = announces
        self._directory: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @property
    def directory(self) -> Path:
        assert self._directory, f"{self.name} was not started"
        return self._directory

    @property
    def socket_path(self) -> Path:
        return socket_in(self.directory)

    @property
    def pid(self) -> int:
        assert self._process, f"{self.name} was not started"
        return self._process.pid

    def uri(self, export: str = DEFAULT_EXPORT) -> str:
        return f"nbd+unix:///{quote(export)}?socket={quote(str(self.socket_path))}"

    def cpu_s(self) -> float:
        """CPU time that the server and its descendants have used so far."""
        return proc.cpu_s(self.pid)

    def settle(self) -> None:
        """Wait until it has done what it does while nobody asks it for anything, and would take from who is next."""

    def memory(self) -> proc.Memory:
        return proc.memory(self.pid, memfd_prefix="nbdram")

    def log_tail(self) -> str:
        """The last that the server said, for an error message."""
        text = (self.directory / "log").read_text(errors="replace").strip()
        return text[-1000:] or "(it said nothing)"

    def check_alive(self) -> None:
        assert self._process, f"{self.name} was not started"
        code = self._process.poll()
        if code is not None:
            raise BenchError(f"{self.name} has ended with code {code}: {self.log_tail()}")

    def _start(self) -> None:
        where = _RAM_DIRECTORY if _RAM_DIRECTORY.is_dir() else None
        self._directory = Path(tempfile.mkdtemp(prefix="nbdram-bench-", dir=where))
        argv = self._argv(self._directory)
        if not shutil.which(argv[0]):
            raise BenchError(f"{argv[0]} is not installed")
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us; we end the server
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._is_ready():
            self.check_alive()
            if time.monotonic() > deadline:
                tail = self.log_tail()
                raise BenchError(f"{self.name} was not ready after {START_TIMEOUT_S:.0f} s: {tail}")
            time.sleep(0.02)

    def _is_ready(self) -> bool:
        if self._announces not in (self.directory / "log").read_text(errors="replace"):
            return False
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(self.socket_path))
                return probe.recv(len(_GREETING)) == _GREETING
            except OSError:
                return False

    def _stop(self) -> None:
        try:
            if self._process:
                _end(self._process)
        finally:
            if self._directory:
                shutil.rmtree(self._directory, ignore_errors=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def running(servers: Iterable[Server]) -> Iterator[list[Server]]:
    """All of them, until the block ends."""
    with ExitStack() as stack:
        yield [stack.enter_context(server) for server in servers]


def free_port() -> int:
    """A TCP port of loopback that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def socket_in(directory: Path) -> Path:
    return directory / "socket"


def nbdram(exports: Mapping[str, str], memory: str = "4G", name: str = "nbdram", options: Sequence[str] = ()) -> Server:
    """Ours; `exports` are names and sizes, as in {"ram": "1G"}."""

    def argv(directory: Path) -> list[str]:
        command = [sys.executable, "-m", "nbdram", "serve", "--memory", memory]
        command += ["--listen", f"unix:{socket_in(directory)}"]
        for export, size in exports.items():
            command += ["--export", f"{export}={size}"]
        return [*command, *options]

    return Server(name, argv, announces="nbd+unix://")


def nbdkit(size: str) -> Server:
    """nbdkit's memory plugin; it serves its one device under every export name."""
    return Server("nbdkit", lambda d: ["nbdkit", "-f", "-U", str(socket_in(d)), "memory", size])


def qemu_nbd(size: str) -> Server:
    """qemu-nbd on a sparse file on tmpfs."""

    def argv(directory: Path) -> list[str]:
        disk = directory / "disk"
        subprocess.run(["truncate", "-s", size, disk], check=True)
        command = ["qemu-nbd", "--shared=0", "--persistent", "-x", DEFAULT_EXPORT]
        command += ["-k", str(socket_in(directory)), "-f", "raw", "--aio=threads"]
        return [*command, "--cache=writeback", str(disk)]

    return Server("qemu-nbd", argv)


def floor(size: str) -> Server:
    """A server in C that does no work beyond the socket's (see floor.c): one connection at a time."""

    def argv(directory: Path) -> list[str]:
        program = directory / "floor"
        if not shutil.which("cc"):
            raise BenchError("cc is not installed: the floor is a C program")
        subprocess.run(["cc", "-O2", "-o", program, Path(__file__).parent / "floor.c"], check=True)
        return [str(program), str(socket_in(directory)), str(parse_size(size))]

    return Server("floor", argv)


PEERS: Final[Mapping[str, Callable[[str], Server]]] = {"nbdkit": nbdkit, "qemu-nbd": qemu_nbd}
