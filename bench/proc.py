"""CPU time and memory of a process, as /proc tells them."""

import os
import resource
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


def tree(root: int) -> list[int]:
    """`root` and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    pids = [root]
    for pid in pids:  # grows while we walk it
        pids += children.get(pid, [])
    return pids


def cpu_s(root: int) -> float:
    """User and system time of `root` and its descendants, in seconds.

    A process's times include its threads, those that have ended too; the times of children that
    were waited for stand with their parent.
    """
    ticks = 0
    for pid in tree(root):
        ticks += sum(int(field) for field in _stat(pid)[11:15])  # utime stime cutime cstime
    return ticks / _TICKS_PER_S


def machine_cpu_s() -> float:
    """CPU time that the whole machine has used, and that a hypervisor has withheld, since boot."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / _TICKS_PER_S


def ended_children_cpu_s() -> float:
    """CPU time of our own children that have ended; those that still run are not in it."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from `state` on; none if the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text[text.rindex(")") + 1 :].split()


@dataclass(frozen=True)
class Memory:
    """What a process holds, in bytes."""

    rss: int
    pss_anon: int
    rss_anon: int
    page_tables: int
    memfd: int  # blocks that its memfds have allocated, whether they are mapped or not

    @property
    def own(self) -> int:
        """All that is the process's own: anonymous memory, page tables, memfds."""
        return self.rss_anon + self.page_tables + self.memfd


def memory(pid: int, memfd_prefix: str) -> Memory:
    """Of one process; the memfds are those whose name starts with `memfd_prefix`."""
    rollup = _kib_fields(Path(f"/proc/{pid}/smaps_rollup"))
    status = _kib_fields(Path(f"/proc/{pid}/status"))
    return Memory(
        rss=rollup["Rss"],
        pss_anon=rollup["Pss_Anon"],
        rss_anon=status["RssAnon"],
        page_tables=status["VmPTE"],
        memfd=_memfd_bytes(pid, memfd_prefix),
    )


def held_bytes(pid: int, memfd_prefix: str) -> int:
    """`private_bytes` and memfds only: quick enough to be asked many times a second."""
    return private_bytes(pid) + _memfd_bytes(pid, memfd_prefix)


def private_bytes(pid: int) -> int:
    """RssAnon, that of children too.

    A child that has not begun its program yet (vfork) has the memory of its parent, all of it, with the command line
    in it: once is enough.
    """
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    program = Path(f"/proc/{pid}/cmdline").read_bytes()
    total = _kib_fields(Path(f"/proc/{pid}/status"))["RssAnon"]
    for child in children:
        with suppress(FileNotFoundError, ProcessLookupError):  # gone
            if Path(f"/proc/{child}/cmdline").read_bytes() != program:
                total += _kib_fields(Path(f"/proc/{child}/status")).get("RssAnon", 0)
    return total


def _kib_fields(path: Path) -> dict[str, int]:
    fields = {}
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            fields[name] = int(value.removesuffix(" kB")) * 1024
    return fields


def _memfd_bytes(pid: int, prefix: str) -> int:
    blocks = {}  # by inode: a memfd may be open under several numbers
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            if os.readlink(link).startswith(f"/memfd:{prefix}"):
                found = link.stat()
                blocks[found.st_ino] = found.st_blocks
    return sum(blocks.values()) * 512
