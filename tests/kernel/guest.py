"""A real Linux kernel for tests and demonstrations: user-mode Linux (UML) in a network of its own.

The kernel is Debian's `linux.uml`: an ordinary process that boots in a second and needs no KVM. How it
is tied down, and why that way:

- The network namespace has no name. It belongs to a *holder* process that waits for the end of a pipe,
  so namespace, tap device and addresses are gone with the last process in it, even if the harness is
  killed. Any number of guests run at once, all with the same addresses.
- The kernel and all that it forks live in a PID namespace: one kill ends them together. Process 1 there
  is a shell, because a panic of UML ends in abort(), which process 1 would survive, spinning.
- All of it runs on one CPU, the last that no other guest has: kernel and program are two processes that wait for each
  other, and waking one on another CPU takes longer than what it does there. Measured on two vCPUs: a page fault 80 us,
  not 260; a system call 15, not 48; the start of Python 0.16 s, not 0.45.
- Every child dies with its parent (PDEATHSIG: with the *thread* that started it, so start servers and
  guests from one that stays), and has a session of its own: Ctrl-C reaches the harness alone, and
  clean-up keeps its order.
- The guest's root is the host's `/`, read-only, through hostfs: it has the host's tools. `$SHARE` is a
  directory of the host that it can write to. `/dev` and `/run` are the guest's own: what the host has
  there is hidden.
- Script output and kernel console are two channels. The exit status comes last in the output, behind a
  token that the script doesn't know: without the token there is no status, and that is a failure.
"""

import compileall
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Final, Self

SERVER_ADDRESS: Final = "10.99.0.1"  # the host's side of the tap device
GUEST_ADDRESS: Final = "10.99.0.2"
NBD_PORT: Final = 10809

CHECKOUT: Final = Path(__file__).resolve().parents[2]

HARNESS_TOOLS: Final = {
    "linux.uml": "user-mode-linux",
    "insmod": "kmod",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "taskset": "util-linux",
    "unshare": "util-linux",
}

_HOLDER: Final = f"""
set -e
ip link set lo up
ip tuntap add tap0 mode tap
ip addr add {SERVER_ADDRESS}/24 dev tap0
ip link set tap0 up
echo ready
exec cat
"""

# All of it on the kernel's command line: the share may be in a directory that the guest can't see.
_MOUNT_SHARE: Final = "mount -t tmpfs none /run && mkdir /run/share && mount -t hostfs -o {share} none /run/share"

# The script is a child of process 1: whatever it does, its status is reported.
_INIT: Final = f"""
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
export HOME=/run TMPDIR=/run/tmp SHARE=/run/share MNT=/run/mnt SERVER={SERVER_ADDRESS} PORT={NBD_PORT}
exec </dev/null >/dev/tty1 2>&1
stty -opost </dev/tty1
(
    set -e
    mount -t proc none /proc
    mount -t sysfs none /sys
    mkdir "$TMPDIR" "$MNT"
    ip link set lo up
    ip addr add {GUEST_ADDRESS}/24 dev vec0
    ip link set vec0 up
    insmod /usr/lib/uml/modules/"$(uname -r)"/kernel/drivers/block/nbd.ko
    cd /run
    if [ -e "$SHARE/coverage.ini" ]; then export COVERAGE_PROCESS_START="$SHARE/coverage.ini"; fi
    exec sh "$SHARE/script"
)
status=$?
if [ -e "$SHARE/coverage.ini" ]; then # what is still there is told to end, because it tells what it did then
    kill -TERM -1
    for _ in $(seq 50); do
        cat /proc/[0-9]*/cmdline 2>/dev/null | grep -q '[n]bdram' || break # not the one that looks
        sleep 0.1
    done
    cp /run/.coverage.* "$SHARE" 2>/dev/null
fi
sync & # which waits for ever where a device's server is gone
for _ in $(seq 100); do kill -0 $! 2>/dev/null || break; sleep 0.1; done
printf '\\n%s %s\\n' "$1" "$status"
echo o >/proc/sysrq-trigger
sleep 60
"""


# Where coverage is measured, it is in the guest too: on a tmpfs, because the data of each process is a database.
_COVERAGE: Final = """
[run]
source_pkgs = nbdram
branch = true
parallel = true
sigterm = true
patch =
    subprocess
    fork
data_file = /run/.coverage
"""

# For scripts that something outside is to look at while they wait: `pause NAME`; see `pauses`.
PAUSE: Final = """
pause() {
    echo "@pause $1"
    until [ -e "$SHARE/pause.$1" ]; do sleep 0.05; done
}
"""


class GuestError(Exception):
    """The harness can't run here, or what it started did not get ready, or ended without a status."""


@dataclass(frozen=True)
class Result:
    """What a script in the guest left: exit status, output (stdout and stderr), kernel messages."""

    status: int
    output: str
    console: str


class Guest:
    """A network in which kernels are booted, one after the other, and servers run.

    Servers listen on `SERVER_ADDRESS` and outlive each `run`, so one boot can look at what another left.
    `share` is the host's side of `$SHARE`.
    """

    def __init__(self, memory: str = "256M") -> None:
        self.memory = memory
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        require_host()
        compile_program()
        with ExitStack() as stack:
            self.directory = Path(stack.enter_context(TemporaryDirectory(prefix="nbdram-guest-")))
            self.share = self.directory / "share"
            self.share.mkdir()
            holder = stack.enter_context(_network())
            self._in_network = ["nsenter", f"--net=/proc/{holder.pid}/ns/net", "--"]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def spawn_host(self, argv: Sequence[str]) -> "subprocess.Popen[bytes]":
        """Start a program of the host in the guest's network; it ends with the guest at the latest."""
        return self._stack.enter_context(spawned([*self._in_network, *argv]))

    def serve(self, *arguments: str) -> "Server":
        """Start `nbdram serve` where the guest can connect to it, and wait until it is ready."""
        listen = ["--listen", f"tcp://{SERVER_ADDRESS}:{NBD_PORT}", "--allow-plaintext"]
        return self._stack.enter_context(Server([*listen, *arguments], self._in_network))

    def run(
        self, script: str, *, timeout_s: float, on_line: Callable[[str], None] | None = None, init: str = _INIT
    ) -> Result:
        """Boot, run a POSIX shell script, power off. `on_line` is given each line of output as it comes.

        `init` is what process 1 does: a script as well, which is given the token.

        Raises GuestError unless the kernel gets to the end of the script, and off, in time.
        """
        token = secrets.token_hex(16)
        for seen in self.share.glob("pause.*"):
            seen.unlink()
        (self.share / "init").write_text(init)
        (self.share / "script").write_text(script)
        if "COVERAGE_PROCESS_CONFIG" in os.environ:
            (self.share / "coverage.ini").write_text(_COVERAGE)
        console = self.directory / "console"
        output = _Output(token, on_line)
        with console.open("wb") as messages, _cpu() as cpu:
            boot = [*self._in_network, "taskset", "--cpu-list", str(cpu), *self._kernel(token)]
            # UML's memory is a file: it must be on a tmpfs, or each page fault is disk I/O.
            environment = {**os.environ, "TMPDIR": "/dev/shm", **self._preloaded()}
            with spawned(boot, stdout=subprocess.PIPE, stderr=messages, env=environment, grace_s=0) as uml:
                in_time = output.read(uml, time.monotonic() + timeout_s)
        for data in self.share.glob(".coverage.*"):
            shutil.move(data, CHECKOUT)
        said = console.read_text(errors="replace")
        if in_time and output.status is not None:
            return Result(output.status, output.text, said)
        how = "died before the script ended" if in_time else f"did not end within {timeout_s:g} s"
        raise GuestError(f"the guest {how}\n--- output:\n{output.text}\n--- console:\n{said}")

    def _preloaded(self) -> dict[str, str]:
        """What `wide_registers.c` is for: nothing, on most processors."""
        if " amx_tile " not in Path("/proc/cpuinfo").read_text():
            return {}
        require_tools({"cc": "gcc libc6-dev"})
        source, library = Path(__file__).with_name("wide_registers.c"), self.directory / "wide_registers.so"
        if not library.exists():
            subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        return {"LD_PRELOAD": str(library)}

    def _kernel(self, token: str) -> list[str]:
        share = _MOUNT_SHARE.format(share=self.share)
        return [
            *("unshare", "--pid", "--fork", "--kill-child=KILL", "--"),
            *("sh", "-c", 'linux.uml "$@"; exit $?', "sh"),
            *(f"mem={self.memory}", f"uml_dir={self.directory}", "quiet"),
            *("root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro"),
            *("con=null", "con0=null,fd:2", "con1=null,fd:1"),
            "vec0:transport=tap,ifname=tap0,depth=64,gro=1",
            *("init=/bin/sh", "--", "-c", f'"{share} && exec sh /run/share/init {token}"'),
        ]


class _Output:
    """A script's output as it is collected, and the status that follows the token at its end."""

    def __init__(self, token: str, on_line: Callable[[str], None] | None) -> None:
        self.status: int | None = None
        self._token = token
        self._on_line = on_line
        self._lines: list[str] = []
        self._rest = b""

    @property
    def text(self) -> str:
        return "\n".join(self._lines)

    def read(self, process: "subprocess.Popen[bytes]", deadline: float) -> bool:
        """Read until the process ends; False if it has not by the deadline (a monotonic time)."""
        assert process.stdout is not None
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        ended = False
        while not ended and (left := deadline - time.monotonic()) > 0 and poll.poll(left * 1000):
            data = os.read(process.stdout.fileno(), 1 << 16)
            ended = not data
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._take(line.decode(errors="replace"))
        if self._rest:
            self._take(self._rest.decode(errors="replace"))
        return ended

    def _take(self, line: str) -> None:
        if line.startswith(self._token):
            self.status = int(line.removeprefix(self._token))
        elif self.status is None:  # what a process left behind says after the end is not of the script
            self._lines.append(line)
            if self._on_line:
                self._on_line(line)


class Server:
    """`nbdram serve` as a process of its own, seen from outside. A context manager.

    `through` is a command to start it with, such as one that enters a network namespace.
    """

    def __init__(self, arguments: Sequence[str], through: Sequence[str] = ()) -> None:
        self._argv = [*through, sys.executable, "-m", "nbdram", "serve", *arguments]
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._said = stack.enter_context(TemporaryFile())
            self._log = stack.enter_context(TemporaryFile())
            self._process = stack.enter_context(spawned(self._argv, stdout=self._said, stderr=self._log))
            self._wait_until_ready(time.monotonic() + 15)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _wait_until_ready(self, deadline: float) -> None:
        while "nbd" not in _text_of(self._said):
            if self._process.poll() is not None:
                raise GuestError(f"nbdram serve ended with status {self._process.returncode}: {self.log()}")
            if time.monotonic() > deadline:
                raise GuestError(f"nbdram serve is not ready after 15 s: {self.log()}")
            time.sleep(0.02)

    def log(self) -> str:
        """What it has written to stderr so far."""
        return _text_of(self._log).strip()

    def is_running(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        return end(self._process, grace_s=10)

    def allocated_bytes(self, export: str) -> int:
        """RAM that a device holds by the host kernel's own account: the blocks of its memory files."""
        blocks = {}  # by inode: a map of a file keeps a duplicate of its descriptor
        for descriptor in Path(f"/proc/{self._process.pid}/fd").iterdir():
            if os.readlink(descriptor).startswith(f"/memfd:nbdram:{export}:"):
                status = descriptor.stat()
                blocks[status.st_ino] = status.st_blocks
        return sum(blocks.values()) * 512


def pauses(share: Path, look: Callable[[str], None]) -> Callable[[str], None]:
    """An `on_line` for a script that starts with `PAUSE`: calls `look(NAME)` at each `pause NAME`, then goes on."""

    def on_line(line: str) -> None:
        if line.startswith("@pause "):
            name = line.removeprefix("@pause ")
            look(name)
            (share / f"pause.{name}").touch()

    return on_line


@cache
def compile_program() -> None:
    """What an installed program has and a checkout may lack. A guest, where it would take longest, can't write it."""
    compileall.compile_dir(CHECKOUT / "nbdram", quiet=2)


def require_tools(tools: Mapping[str, str]) -> None:
    """Raise GuestError, naming the Debian packages, unless all these programs are installed."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    missing = [tool for tool in tools if not shutil.which(tool, path=path)]
    if missing:
        packages = sorted({tools[tool] for tool in missing})
        raise GuestError(f"{', '.join(missing)} not found: apt-get install {' '.join(packages)}")


def require_host() -> None:
    """Raise GuestError, with what to do about it, where no guest can be started."""
    if os.geteuid() != 0:
        raise GuestError("a guest kernel needs root, for its network namespace and tap device")
    require_tools(HARNESS_TOOLS)
    if not Path("/dev/net/tun").exists():
        raise GuestError("/dev/net/tun is missing: load the kernel module tun")


@contextmanager
def spawned(
    argv: Sequence[str],
    *,
    stdin: int = subprocess.DEVNULL,
    stdout: int | IO[bytes] = subprocess.DEVNULL,
    stderr: int | IO[bytes] | None = None,
    env: Mapping[str, str] | None = None,
    grace_s: float = 5,
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a program for as long as the block lasts, then `end` it."""
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "--", *argv],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env=env,
        cwd=CHECKOUT,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            end(process, grace_s)


def end(process: "subprocess.Popen[bytes]", grace_s: float) -> int:
    """SIGTERM to its process group, then SIGKILL after `grace_s` (0: at once). Returns the exit status."""
    try:
        if process.poll() is None and grace_s > 0:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(grace_s)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _text_of(file: IO[bytes]) -> str:
    """All of a file that another process may be writing: reading must not move the offset they share."""
    return os.pread(file.fileno(), 1 << 20, 0).decode(errors="replace")


@contextmanager
def _cpu() -> Iterator[int]:
    """A CPU that no other guest has, as far as there are enough."""
    cpus = sorted(os.sched_getaffinity(0), reverse=True)
    with ExitStack() as stack:
        for cpu in cpus:
            taken = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            with suppress(OSError):
                taken.bind(f"\0nbdram-guest-on-cpu-{cpu}")  # a name that goes with its socket
                break
        else:
            cpu = cpus[0]
        yield cpu


@contextmanager
def _network() -> Iterator["subprocess.Popen[bytes]"]:
    """The process that holds a new network namespace with a tap device, once that is up."""
    argv = ["unshare", "--net", "--", "sh", "-c", _HOLDER]
    with spawned(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as holder:
        assert holder.stdout is not None
        said = holder.stdout.readline()
        if said != b"ready\n":
            raise GuestError(f"no network for the guest: {(said + holder.stdout.read()).decode().strip()}")
        yield holder
