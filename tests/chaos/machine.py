"""Faults of the machine: it stops, its clock jumps, its CPU is busy, its memory is taken by a neighbour."""

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.request import urlopen

from bench.cgroup import MemoryLimit
from nbdram.observe.control import ask
from tests.helpers import MIB

from .world import PATIENCE_S, Setting, World

_CPU_PERIOD_US: Final = 100_000
_CPU_SHARE: Final = 0.04
_GROUP_BYTES: Final = 160 * MIB
# Takes memory until there is none, keeps using it, and is the first to be killed for it.
_NEIGHBOUR: Final = """
import sys, time
open("/proc/self/oom_score_adj", "w").write("1000")
open(sys.argv[1] + "/cgroup.procs", "w").write("0")
held = []
while True:
    held.append(bytearray(b"x") * (4 << 20))
    print(4 * len(held), flush=True)
    time.sleep(0.05)
"""


# -- it stops ---------------------------------------------------------------------------------------------


async def stopped(world: World, seconds: float) -> str:
    os.kill(world.pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        os.kill(world.pid, signal.SIGCONT)
    return f"SIGSTOP for {seconds:g} s"


# -- its clock jumps --------------------------------------------------------------------------------------


@contextmanager
def with_a_clock_of_its_own(directory: Path, *, monotonic: bool) -> Iterator[Setting]:
    """The server's clock is what the file `clock` says; with `monotonic`, also the one that never jumps."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    assert library, "libfaketime is not installed: apt-get install faketime"
    clock = directory / "clock"
    clock.write_text("+0\n")
    environment = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "0" if monotonic else "1",
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    yield ClockSetting(
        directory / "swap", environment=environment, options=("--metrics", f"127.0.0.1:{port}"), port=port
    )


@dataclass
class ClockSetting(Setting):
    port: int = 0  # where the server tells what time it is, and for how long it has been up

    def told(self) -> tuple[float, float]:
        with urlopen(f"http://127.0.0.1:{self.port}/api/status", timeout=PATIENCE_S) as answer:
            status = json.load(answer)
        return float(status["time"]), float(status["uptime_s"])


async def clock_jumps(world: World, seconds: float) -> str:
    jumps = {"+1h": 3600, "-1h": -3600, "+3650d": 3650 * 86400, "-3650d": -3650 * 86400, "+0": 0}
    for jump, ahead in jumps.items():
        assert isinstance(world.setting, ClockSetting)
        _set_clock(world, jump)
        told, _ = await asyncio.to_thread(world.setting.told)
        assert abs(told - time.time() - ahead) < PATIENCE_S, "the server's clock did not jump"
        await world.everybody_gets_on(10)
        await asyncio.sleep(seconds / len(jumps))
    return f"the wall clock jumped by {', '.join(jumps)}"


async def time_passes(world: World, seconds: float) -> str:
    """As it seems to whoever was suspended, or moved to another host, all clocks being ahead afterwards."""
    ahead = 0
    for jump in (10, 60, 3600):
        assert isinstance(world.setting, ClockSetting)
        ahead += jump
        _set_clock(world, f"+{ahead}")
        _, up = await asyncio.to_thread(world.setting.told)
        assert up >= ahead, "the server's clock did not jump"
        await world.everybody_gets_on(10)
        await asyncio.sleep(seconds / 3)
    return "all clocks jumped ahead by 10 s, 1 minute, 1 hour"


def _set_clock(world: World, to: str) -> None:
    new = world.directory / "clock.new"
    new.write_text(to + "\n")
    new.replace(world.directory / "clock")


# -- its CPU is busy --------------------------------------------------------------------------------------


@contextmanager
def _cpu_group() -> Iterator[Path]:
    """A control group for the processor's time, of v1 or v2."""
    parent = (
        Path("/sys/fs/cgroup/cpu") if Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").exists() else Path("/sys/fs/cgroup")
    )
    if parent.name != "cpu":
        with suppress(OSError):
            (parent / "cgroup.subtree_control").write_text("+cpu")
    group = parent / f"nbdram-chaos-{os.getpid()}"
    group.mkdir()
    try:
        yield group
    finally:
        for _ in range(100):
            with suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.05)


def _allow_cpu(group: Path, share: float) -> None:
    quota = str(int(share * _CPU_PERIOD_US))
    if (group / "cpu.max").exists():
        (group / "cpu.max").write_text(f"{quota} {_CPU_PERIOD_US}")
    else:
        (group / "cpu.cfs_period_us").write_text(str(_CPU_PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(quota)


@contextmanager
def in_a_cpu_group(directory: Path) -> Iterator[Setting]:
    with _cpu_group() as group:
        yield Setting(directory / "swap", prefix=_inside(group))


async def starved(world: World, seconds: float) -> str:
    group = Path(world.setting.prefix[-1])
    before = world.acknowledged
    _allow_cpu(group, _CPU_SHARE)
    await asyncio.sleep(seconds)
    _allow_cpu(group, 1.0)
    share = f"{_CPU_SHARE:.0%} of a CPU for {seconds:g} s"
    return f"{share}, in which {world.acknowledged - before} requests were answered"


def _inside(group: Path) -> tuple[str, ...]:
    return ("sh", "-c", 'echo $$ >"$0/cgroup.procs"; exec "$@"', str(group))


# -- its memory is taken ----------------------------------------------------------------------------------


@contextmanager
def in_a_memory_group(directory: Path) -> Iterator[Setting]:
    """A server that is told nothing of memory: it has to find out how much there is, and to heed the pressure."""
    with MemoryLimit(_GROUP_BYTES) as limit:
        yield Setting(directory / "swap", memory=(), prefix=_inside(limit.directory))


async def crowded(world: World, seconds: float) -> str:
    """A neighbour in the same group takes memory until the kernel kills it; then the next one comes."""
    group = world.setting.prefix[-1]
    budget = ask(world.directory / "control", "stats")["budget"]["limit"]
    assert budget <= _GROUP_BYTES // 2, "the server does not know of its group's limit"
    until, most, killed = time.monotonic() + seconds, 0, 0
    while time.monotonic() < until:
        neighbour = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _NEIGHBOUR, group, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        assert neighbour.stdout
        try:
            async with asyncio.timeout(max(0.1, until - time.monotonic())):
                while line := await neighbour.stdout.readline():
                    most = max(most, int(line))
                killed += 1
        except TimeoutError:
            pass
        finally:
            with suppress(ProcessLookupError):
                neighbour.kill()
            await neighbour.communicate()
    assert world.server.process.returncode is None, "the server was killed"
    did = f"a group of {_GROUP_BYTES // MIB} MiB, of which the server took {budget // MIB} for its budget"
    return f"{did}; neighbours took up to {most} MiB, {killed} were killed for it"
