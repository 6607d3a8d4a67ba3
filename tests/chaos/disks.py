"""Faults of the disk that cold data is on: it fills up, and it can't be read."""

import asyncio
import errno
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from tests.helpers import MIB
from tests.memory.tiers.mounts import mounted
from tests.peers.running import tool

from .world import PATIENCE_S, Setting, World

_SMALL_DISK: Final = 40 * MIB
_DISK: Final = "256M"


# -- it is full -------------------------------------------------------------------------------------------


@contextmanager
def on_a_small_disk(directory: Path) -> Iterator[Setting]:
    with mounted(directory / "disk", "ext4", size_bytes=_SMALL_DISK) as point:
        yield Setting(point / "swap", allowed=frozenset({errno.ENOSPC}), options=("--write-wait", "2"))


async def filled(world: World, seconds: float) -> str:
    """Others fill the disk to its last block, and remove what they have written, three times."""
    filler = world.setting.swap.parent / "filler"
    rounds = 3
    for _ in range(rounds):
        await asyncio.to_thread(_fill, filler)
        await asyncio.sleep(seconds / 2 / rounds)
        filler.unlink()
        await world.everybody_gets_on(5)
        await asyncio.sleep(seconds / 2 / rounds)
    return f"a disk of {_SMALL_DISK // MIB} MiB was filled to its last block by others, {rounds} times"


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        for size in (MIB, 4096):
            with suppress(OSError):
                while True:
                    file.write(b"\xff" * size)
        os.fsync(file.fileno())


# -- it can't be read -------------------------------------------------------------------------------------


@contextmanager
def on_a_failing_disk(directory: Path) -> Iterator[Setting]:
    """ext4 on a loop device on nbdfuse on nbdkit, whose error filter fails all reads while a file is there."""
    socket, point, mount = directory / "kit.sock", directory / "fuse", directory / "mnt"
    point.mkdir()
    mount.mkdir()
    kit: list[str | Path] = [tool("nbdkit"), "-f", "-U", socket, "--filter=error", "memory", _DISK, "error=EIO"]
    kit += ["error-pread-rate=100%", f"error-file={directory / 'failing'}"]
    with ExitStack() as stack:
        stack.enter_context(_process(*kit, until=socket.exists))
        stack.enter_context(_process(tool("nbdfuse"), point / "disk", "--unix", socket, until=(point / "disk").exists))
        _run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-E", "nodiscard", point / "disk")
        _run("mount", "-o", "loop", point / "disk", mount)
        stack.callback(_run, "umount", mount)
        allowed = frozenset({errno.EIO, errno.ENOSPC})
        yield Setting(mount / "swap", allowed=allowed, options=("--write-wait", "2"))


async def unreadable(world: World, seconds: float) -> str:
    """Nothing can be read from the disk, for half of each second or two."""
    failing, failures = world.directory / "failing", 0
    until, turn = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        turn += 1
        await asyncio.to_thread(_forget_cached, world.pid, world.setting.swap)
        failing.touch()
        told = world.told.total()
        forgetting = time.monotonic() + 1.0
        while time.monotonic() < forgetting:
            await asyncio.to_thread(_forget_cached, world.pid, world.setting.swap)
            await asyncio.sleep(0.05)
        failures += world.told.total() > told
        failing.unlink()
        await world.everybody_gets_on(5)
    return f"all reads failed for 1 s, {turn} times, {failures} of them seen by clients"


def _forget_cached(pid: int, swap: Path) -> None:
    """Have the kernel drop what it has cached of the swap files, so that reads go to the disk."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            if not str(link.readlink()).startswith(str(swap)):
                continue
            fd = os.open(link, os.O_RDONLY)
            try:
                with suppress(OSError):
                    os.fdatasync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


@contextmanager
def _process(*command: str | Path, until: Callable[[], bool]) -> Iterator[None]:
    process = subprocess.Popen([str(word) for word in command], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + PATIENCE_S
        while not until():
            assert process.poll() is None, f"{command[0]} has ended"
            assert time.monotonic() < end
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait()


def _run(name: str, *arguments: str | Path) -> None:
    done = subprocess.run([name, *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, f"{name}: {done.stderr}"
