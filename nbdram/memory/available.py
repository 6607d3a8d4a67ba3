"""How much memory this process may use: what the kernel has, and what control groups allow."""

from itertools import product
from pathlib import Path

_NO_LIMIT = 1 << 60  # cgroup v1 writes "no limit" as a number about this large


def default_budget(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Half of the smallest of MemAvailable and the limits of all control groups above us, in bytes."""
    return min([_meminfo(proc, "MemAvailable"), *cgroup_limits(proc, cgroups)]) // 2


def most_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> tuple[int, str]:
    """The most that a budget can be, in bytes, and the words for what allows no more."""
    machine = _meminfo(proc, "MemTotal"), "this machine has"
    return min([machine, *((limit, "the control group allows") for limit in cgroup_limits(proc, cgroups))])


def cgroup_limits(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """The memory limits, in bytes, of this process's control group and its ancestors, v1 and v2.

    `memory.high` is one as well: who is above it is slowed down all the time.
    """
    limits = []
    for line in (proc / "self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            mounts, names = [cgroups, cgroups / "unified"], ["memory.max", "memory.high"]
        elif "memory" in controllers.split(","):
            mounts, names = [cgroups / "memory"], ["memory.limit_in_bytes"]
        else:
            continue
        relative = Path(group.lstrip("/"))
        for mount, ancestor, name in product(mounts, (relative, *relative.parents), names):
            limit = _number(mount / ancestor / name)
            if limit is not None and limit < _NO_LIMIT:
                limits.append(limit)
    return limits


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such level, or "max"
        return None


def _meminfo(proc: Path, name: str) -> int:
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/meminfo has no {name}")
