"""`make demo`: a 1 TiB device in RAM, under a real Linux kernel and a real ext4.

The kernel is the host's, where that has nbd and a device to spare, else a guest's (user-mode Linux). The same shell
steps run in either. They stop where they say `pause`, so that this process can read from outside how much RAM the
device holds at that moment.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from tests.kernel.guest import PAUSE, Guest, GuestError, Server, pauses, require_tools, spawned

EXPORT: Final = "demo"
SIZE_BYTES: Final = 1 << 40
TIMEOUT_S: Final = 300
TOOLS: Final = {
    "nbd-client": "nbd-client",
    "mkfs.ext4": "e2fsprogs",
    "fstrim": "util-linux",
    "setpriv": "util-linux",
}

# Real files, as Debian systems have them: trees are taken from the front until there is enough.
TREES: Final = ("/usr/lib/python3", "/usr/lib/python3.*", "/usr/share/doc", "/usr/share/perl", "/usr/share/i18n")
ENOUGH_BYTES: Final = 50 << 20
TOO_MANY_BYTES: Final = 200 << 20

# No journal, and no inode tables written in advance: a file system for data that lives as long as the device.
STEPS: Final = (
    PAUSE
    + r"""
set -eu
say() { echo "@say $*"; }
mount_it() {
    mount -t ext4 -o noinit_itable "$DEVICE" "$MNT"
    grep -q "^$DEVICE $MNT ext4 " /proc/mounts
}
check_sums() { (cd "$MNT" && sha256sum --quiet --check "$TMPDIR/$1"); }

say "Linux $(uname -r) attaches the device as $DEVICE"
nbd-client $SERVER "$DEVICE" -N "$EXPORT"
[ "$(blockdev --getsize64 "$DEVICE")" = "$SIZE" ] || { echo "$DEVICE has another size than the export"; exit 1; }

say "making a file system"
mkfs.ext4 -q -O '^has_journal,^resize_inode' -m 0 -T largefile -E lazy_itable_init=1,discard "$DEVICE"
mount_it
sync
pause empty

say "copying files into it"
cd /
cp --archive --parents $TREES "$MNT"
umount "$MNT"
pause full
echo "@written $(awk '{ printf "%.0f", $7 * 512 }' "/sys/block/${DEVICE#/dev/}/stat")"

say "mounting it again, comparing every checksum with the original's"
mount_it
find $TREES -type f -print0 | sort -z >"$TMPDIR/files"
xargs -0 sha256sum <"$TMPDIR/files" >"$TMPDIR/sums"
check_sums sums

say "deleting every second file, trimming"
sed -z -n 'p;n' "$TMPDIR/files" | (cd "$MNT" && xargs -0 rm)
sync
fstrim "$MNT"
pause trimmed

say "comparing the checksums of the other half"
sed -n 'n;p' "$TMPDIR/sums" >"$TMPDIR/kept"
check_sums kept
umount "$MNT"
nbd-client -d "$DEVICE"
"""
)

OnLine = Callable[[str], None]


class DemoError(Exception):
    """A step failed; the message says which, and why."""


@dataclass
class Kernel:
    """Where the steps run, and the server that it connects to."""

    server: Server
    share: Path
    run: Callable[[str, OnLine], int]  # (steps, what to do with each line of output) -> exit status


@dataclass
class Journal:
    """What the steps have said: progress is shown, figures and the rest are kept."""

    started: float = field(default_factory=time.monotonic)
    step: str = "starting"
    remarks: list[str] = field(default_factory=list)  # what the tools of this step printed
    written_bytes: int = 0

    def say(self, step: str) -> None:
        self.step = step
        self.remarks = []
        print(f"{time.monotonic() - self.started:5.1f} s  {step}", flush=True)

    def take(self, line: str) -> None:
        kind, _, rest = line.partition(" ")
        if kind == "@say":
            self.say(rest)
        elif kind == "@written":
            self.written_bytes = int(rest)
        elif kind != "@pause" and line.strip():
            self.remarks.append(line.strip())


@dataclass(frozen=True)
class Files:
    """The trees to copy, with what they hold."""

    trees: list[Path]
    count: int
    total_bytes: int


def main() -> int:
    """Run the demonstration; 0 if every step succeeded, 1 if not, 130 if interrupted."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        demonstrate()
    except (DemoError, GuestError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; nothing is left behind", file=sys.stderr)
        return 130
    return 0


def _interrupt(*_: object) -> None:
    """Once: a second Ctrl-C must not cut the clean-up short."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def demonstrate() -> None:
    if os.geteuid() != 0:
        raise DemoError("attaching and mounting a device needs root: run it as root, or with sudo")
    require_tools(TOOLS)
    files = choose_files()
    journal = Journal()
    ram: dict[str, int] = {}
    with ExitStack() as stack:
        device = stack.enter_context(free_host_device())
        if device:
            kernel = stack.enter_context(host_kernel(device))
        else:
            journal.say("the host's kernel has no nbd device to spare: booting one in user-mode Linux")
            kernel = stack.enter_context(guest_kernel())

        def look(name: str) -> None:
            ram[name] = kernel.server.allocated_bytes(EXPORT)

        paused = pauses(kernel.share, look)

        def on_line(line: str) -> None:
            journal.take(line)
            paused(line)

        settings = {"EXPORT": EXPORT, "SIZE": SIZE_BYTES, "TREES": " ".join(str(t)[1:] for t in files.trees)}
        if kernel.run(exports(settings) + STEPS, on_line) != 0:
            why = "" if kernel.server.is_running() else f"the server has ended; {kernel.server.log()}"
            raise DemoError(f"{journal.step}: {why or '; '.join(journal.remarks)}")
        journal.say("detached; all checksums were right")
    show(files, journal.written_bytes, ram)
    if not ram["trimmed"] < ram["full"]:
        raise DemoError("deleting and trimming half of the files gave no memory back")


def show(files: Files, written_bytes: int, ram: dict[str, int]) -> None:
    """The table at the end."""
    rows = [
        ("maximum size", SIZE_BYTES, ""),
        ("files copied", files.total_bytes, f"{files.count} files"),
        ("written to the device", written_bytes, "by the kernel, in all"),
        ("RAM in use, empty file system", ram["empty"], ""),
        ("RAM in use, with the files", ram["full"], ""),
        ("RAM in use, half deleted, trimmed", ram["trimmed"], ""),
    ]
    print()
    for name, size, remark in rows:
        unit, shift = ("TiB", 40) if size >= 1 << 40 else ("MiB", 20)
        print(f"  {name:34}{size / (1 << shift):8,.1f} {unit}  {remark}".rstrip())


def choose_files() -> Files:
    """Real trees of this machine, some 50 to 200 MB together."""
    trees: list[Path] = []
    count = total_bytes = 0
    for tree in (path for pattern in TREES for path in sorted(Path("/").glob(pattern[1:]))):
        sizes = [(Path(at) / name).lstat().st_size for at, _, names in os.walk(tree) for name in names]
        if total_bytes < ENOUGH_BYTES and total_bytes + sum(sizes) <= TOO_MANY_BYTES:
            trees.append(tree)
            count += len(sizes)
            total_bytes += sum(sizes)
    if not count:
        raise DemoError(f"there are no files to copy in {', '.join(TREES)}")
    return Files(trees, count, total_bytes)


def exports(variables: dict[str, object]) -> str:
    """Shell text that sets environment variables."""
    return "".join(f"export {name}={shlex.quote(str(value))}\n" for name, value in variables.items())


@contextmanager
def guest_kernel() -> Iterator[Kernel]:
    """A kernel that is booted for this."""
    require_tools({"linux.uml": "user-mode-linux"})
    with Guest() as guest:
        server = guest.serve("--export", f"{EXPORT}={SIZE_BYTES}")
        # SERVER and PORT are set in the guest; nbd-client wants them as two words.
        device = 'export DEVICE=/dev/nbd0 SERVER="$SERVER $PORT"\n'

        def run(steps: str, on_line: OnLine) -> int:
            return guest.run(device + steps, timeout_s=TIMEOUT_S, on_line=on_line).status

        yield Kernel(server, guest.share, run)


@contextmanager
def host_kernel(device: Path) -> Iterator[Kernel]:
    """The kernel of the host: mounted and attached is only `device`, and only for as long as this lasts."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="nbdram-demo-")))
        mount_point = directory / "mnt"
        mount_point.mkdir()
        socket = directory / "nbd.sock"
        server = stack.enter_context(Server(["--export", f"{EXPORT}={SIZE_BYTES}", "--listen", f"unix:{socket}"]))
        stack.callback(release, device, mount_point)
        places = {"DEVICE": device, "SERVER": f"-unix {socket}", "MNT": mount_point}

        def run(steps: str, on_line: OnLine) -> int:
            text = exports({**places, "SHARE": directory, "TMPDIR": directory}) + steps
            argv = ["sh", "-c", text]
            with spawned(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, grace_s=30) as shell:
                assert shell.stdout
                for line in shell.stdout:
                    on_line(line.decode(errors="replace").rstrip("\n"))
                return shell.wait()

        yield Kernel(server, directory, run)


def release(device: Path, mount_point: Path) -> None:
    """Undo what the steps had done when they were cut short."""
    if mount_point.is_mount():
        subprocess.run(["umount", mount_point], check=False)
    if attached(device):
        subprocess.run(["nbd-client", "-d", device], check=False, stdout=subprocess.DEVNULL)


@contextmanager
def free_host_device() -> Iterator[Path | None]:
    """A /dev/nbdX that nobody uses, if there is one. A module loaded for it is unloaded afterwards."""
    loaded = False
    if not Path("/sys/block/nbd0").exists() and shutil.which("modprobe"):
        loaded = subprocess.run(["modprobe", "--quiet", "nbd"], check=False).returncode == 0
    try:
        devices = (Path("/dev") / f"nbd{number}" for number in range(1024))
        yield next((device for device in devices if device.is_block_device() and not attached(device)), None)
    finally:
        if loaded:
            subprocess.run(["modprobe", "--quiet", "--remove", "nbd"], check=False)


def attached(device: Path) -> bool:
    """Whether a device is in use by anyone, going by everything that the kernel and nbd-client tell."""
    system = Path("/sys/block") / device.name
    if not system.exists() or (system / "pid").exists() or (system / "size").read_text().strip() != "0":
        return True
    return subprocess.run(["nbd-client", "-c", device], check=False, stdout=subprocess.DEVNULL).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
