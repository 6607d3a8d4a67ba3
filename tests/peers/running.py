"""Runs the server and the real clients, each as a process, the way a user would."""

import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest

from bench.proc import private_bytes

PAGE = 4096
TIMEOUT_S = 180
# libnbd's Python module is Debian's and fits only Debian's Python.
DEBIAN_PYTHON = "/usr/bin/python3"
DEBIAN_SCRIPTS = Path(__file__).parent / "debian"

PACKAGE_OF = {
    "nbdinfo": "libnbd-bin",
    "nbdcopy": "libnbd-bin",
    "nbdsh": "python3-libnbd",
    DEBIAN_PYTHON: "python3-libnbd",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "fio": "fio",
    "nbd-client": "nbd-client",
    "openssl": "openssl",
}


def tool(name: str) -> str:
    """The path of a client. A missing one is a failure, never a skip."""
    path = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if path is None:
        pytest.fail(f"{name} is not installed: apt-get install {PACKAGE_OF[name]}")
    return path


def environment() -> dict[str, str]:
    """Ours, with Debian's Python in front of the virtual environment's: nbdsh takes the first one."""
    path = "/usr/bin:" + os.environ["PATH"]
    return {**os.environ, "PATH": path, "PYTHONPATH": str(DEBIAN_SCRIPTS), "LC_ALL": "C.UTF-8"}


def run(
    name: str, *arguments: str | Path, code: int = 0, stdin: bytes | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run a client to its end; any other exit code than `code` fails the test with all that it said."""
    command = [tool(name), *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, env=environment(), cwd=cwd, timeout=TIMEOUT_S)
    if done.returncode != code:
        said = (done.stdout[-3000:] + b"\n" + done.stderr[-3000:]).decode(errors="replace")
        pytest.fail(f"{' '.join(command)}: exit code {done.returncode}, not {code}\n{said}")
    return done


def output(name: str, *arguments: str | Path, code: int = 0) -> str:
    """What a client prints."""
    return run(name, *arguments, code=code).stdout.decode()


TRIM_EVERYTHING = """
step = 2**32 - 4096
for at in range(0, h.get_size(), step):
    h.trim(min(step, h.get_size() - at), at)
"""


class Server:
    """`nbdram serve` in a process of its own, on a Unix socket, and on loopback with `tcp`."""

    def __init__(self, directory: Path, exports: tuple[str, ...], *options: str, memory: str, tcp: bool) -> None:
        self.directory = directory
        self.socket = directory / "nbd.sock"
        self.exports = exports
        self._stderr = directory / "server.err"
        command = [sys.executable, "-m", "nbdram", "serve", "--memory", memory, "--listen", f"unix:{self.socket}"]
        command += ["--metrics", "off"]
        if tcp:
            command += ["--listen", "tcp://127.0.0.1:0"]
        for export in exports:
            command += ["--export", export]
        command += options
        with self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        self.announced = self._read_announcement(2 * len(exports) * (2 if tcp else 1))

    def _read_announcement(self, line_count: int) -> list[str]:
        """Two lines for each export and address; the server is ready once it has printed them."""
        assert self.process.stdout
        lines = [self.process.stdout.readline().strip() for _ in range(line_count)]
        if not all(lines):
            pytest.fail(f"the server did not start: {self.stderr()}")
        return lines

    def stderr(self) -> str:
        return self._stderr.read_text()

    def uri(self, export: str = "disk") -> str:
        return f"nbd+unix:///{quote(export)}?socket={self.socket}"

    def tcp_uri(self, export: str = "disk") -> str:
        return next(line for line in self.announced if line.startswith("nbd://") and line.endswith("/" + export))

    @property
    def port(self) -> str:
        return self.tcp_uri(self.exports[0].partition("=")[0]).partition("127.0.0.1:")[2].partition("/")[0]

    def allocated_bytes(self) -> int:
        """What the kernel has allocated for the server's memory files, seen from outside."""
        files = {}  # by inode: a map keeps a duplicate of its file's descriptor
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # a connection that was closed meanwhile
                if "memfd:nbdram" in os.readlink(link):
                    status = link.stat()
                    files[status.st_ino] = status.st_blocks * 512
        return sum(files.values())

    def private_bytes(self) -> int:
        """What the process, and the one that compresses for it, take beside the memory files: RssAnon."""
        return private_bytes(self.process.pid)

    def script(self, text: str, export: str = "disk", uri: str = "") -> str:
        """Run lines of Python with libnbd; what they find in scope is in debian/prelude.py."""
        path = self.directory / "script.py"
        path.write_text("from prelude import *\n" + textwrap.dedent(text))
        return output(DEBIAN_PYTHON, path, uri or self.uri(export))

    def trim_everything(self) -> None:
        for export in self.exports:
            name, _, rest = export.partition("=")
            if ",ro" not in rest:
                self.script(TRIM_EVERYTHING, export=name)

    def finish(self) -> None:
        """What every test ends with: all memory comes back, SIGTERM ends the server well, nothing was raised."""
        try:
            assert self.process.poll() is None, f"the server has died: {self.stderr()}"
            if self.allocated_bytes():
                self.trim_everything()
            assert self.allocated_bytes() == 0, "everything was trimmed, but not all memory came back"
        finally:
            self.process.send_signal(signal.SIGTERM)
            try:
                code = self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                code = self.process.wait()
            assert self.process.stdout
            self.process.stdout.close()
        assert code == 0, f"the server left with {code} at SIGTERM: {self.stderr()}"
        assert "Traceback" not in self.stderr(), self.stderr()


Extents = list[tuple[int, int]]  # (offset, length), in order


def random_bytes(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


def write_sparse(path: Path, size: int, extents: Extents, seed: int = 0) -> None:
    """A file of random data at `extents` and holes everywhere else."""
    with path.open("wb") as file:
        file.truncate(size)
        for number, (offset, length) in enumerate(extents):
            file.seek(offset)
            file.write(random_bytes(length, seed + number))


def pages_of(extents: Iterable[tuple[int, int]]) -> int:
    """How many pages the extents touch."""
    return len({page for at, length in extents for page in range(at // PAGE, (at + length - 1) // PAGE + 1)})


def same_bytes(left: Path, right: Path, length: int) -> bool:
    """Whether two files begin with the same `length` bytes."""
    with left.open("rb") as one, right.open("rb") as other:
        for at in range(0, length, 1 << 20):
            count = min(1 << 20, length - at)
            piece = one.read(count)
            if len(piece) != count or piece != other.read(count):
                return False
    return True
