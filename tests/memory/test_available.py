"""How much memory there is, as files like those of /proc and /sys/fs/cgroup tell it."""

from pathlib import Path

import pytest

from nbdram.memory.available import default_budget, most_memory
from tests.helpers import MIB


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, Path]:
    """/proc and /sys/fs/cgroup of a machine of 1 GiB, 600 MiB of it available, without limits."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (cgroups / "outer/inner").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: {1 << 20} kB\nMemFree: 1 kB\nMemAvailable: {600 << 10} kB\n")
    (proc / "self/cgroup").write_text("0::/outer/inner\n")
    (cgroups / "outer/inner/memory.max").write_text("max\n")
    return proc, cgroups


def test_without_limits_the_machine_is_the_limit(machine: tuple[Path, Path]) -> None:
    assert most_memory(*machine) == (1024 * MIB, "this machine has")
    assert default_budget(*machine) == 300 * MIB


@pytest.mark.parametrize("file", ["outer/memory.max", "outer/inner/memory.max", "outer/memory.high"])
def test_a_lower_limit_of_any_control_group_counts(machine: tuple[Path, Path], file: str) -> None:
    (machine[1] / file).write_text(f"{200 * MIB}\n")
    assert most_memory(*machine) == (200 * MIB, "the control group allows")
    assert default_budget(*machine) == 100 * MIB


def test_a_limit_above_what_the_machine_has_does_not_count(machine: tuple[Path, Path]) -> None:
    (machine[1] / "outer/memory.max").write_text(f"{4096 * MIB}\n")
    assert most_memory(*machine) == (1024 * MIB, "this machine has")


def test_limits_of_the_first_version_count_too(machine: tuple[Path, Path]) -> None:
    proc, cgroups = machine
    (proc / "self/cgroup").write_text("9:cpu,memory:/box\n1:name=systemd:/\n")
    (cgroups / "memory/box").mkdir(parents=True)
    (cgroups / "memory/memory.limit_in_bytes").write_text(f"{(1 << 63) - 4096}\n")
    assert most_memory(*machine) == (1024 * MIB, "this machine has")
    (cgroups / "memory/box/memory.limit_in_bytes").write_text(f"{64 * MIB}\n")
    assert most_memory(*machine) == (64 * MIB, "the control group allows")
