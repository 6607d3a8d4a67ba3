"""What a report has to say about the machine and the programs that it was made with."""

import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from bench.errors import BenchError

_VERSION_COMMANDS: Final = {
    "nbdram": [sys.executable, "-m", "nbdram", "--version"],
    "nbdkit": ["nbdkit", "--version"],
    "qemu-nbd": ["qemu-nbd", "--version"],
    "fio": ["fio", "--version"],
}

_CLOCK_OF_TICKS: Final = 6  # CLOCK_MONOTONIC_COARSE: who waits for a core may have to wait for the next tick

# What decides how dear new pages, and a virtual machine's idle CPUs, are: where there is such a thing.
_SETTINGS: Final = {
    "guest_halt_poll_ns": "/sys/module/haltpoll/parameters/guest_halt_poll_ns",
    "page_reporting_order": "/sys/module/page_reporting/parameters/page_reporting_order",
    "64kB folios": "/sys/kernel/mm/transparent_hugepage/hugepages-64kB/shmem_enabled",
}


def facts(programs: Iterable[str]) -> dict[str, str]:
    """The head of a report: machine, date, versions of `programs`."""
    found = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "CPU": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "kernel": os.uname().release,
        "python": f"{platform.python_version()}, uvloop {_package_version('uvloop')}",
    }
    chosen = [f"{name} {_choice(path)}" for name, path in _SETTINGS.items() if os.path.exists(path)]
    found["settings"] = ", ".join([f"tick {time.clock_getres(_CLOCK_OF_TICKS) * 1000:g} ms", *chosen])
    for program in (*programs, "fio"):
        found[program] = _program_version(program)
    return found


def _choice(path: str) -> str:
    """What a setting of the kernel's is; of several words, the one in brackets is chosen."""
    text = Path(path).read_text().strip()
    chosen = re.search(r"\[(.*)\]", text)
    return chosen[1] if chosen else text


def _cpu_model() -> str:
    match = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1] if match else platform.machine()


def _package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _program_version(program: str) -> str:
    try:
        command = _VERSION_COMMANDS[program]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        raise BenchError(f"{program} can't be run: {error}") from None
    if done.returncode or not done.stdout:
        raise BenchError(f"{program} can't be run: {done.stderr.strip()[-1000:]}")
    return done.stdout.splitlines()[0].removeprefix(program).strip(" -")


def raise_file_limit() -> None:
    """As many open files as we may have: a thousand connections need them, at both ends."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def need_memory(gibibytes: int) -> None:
    """Refuse to start what would make the machine swap, or get us killed."""
    text = Path("/proc/meminfo").read_text()
    match = re.search(r"^MemAvailable:\s*(\d+) kB$", text, re.MULTILINE)
    if match and int(match[1]) < gibibytes << 20:
        available = int(match[1]) / (1 << 20)
        raise BenchError(f"this needs {gibibytes} GiB of free RAM, there are {available:.1f}")
