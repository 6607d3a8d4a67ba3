"""The budget that follows memory pressure, on files like the kernel's."""

from pathlib import Path

import pytest

from nbdram.config import MIN_MEMORY
from nbdram.memory.budget import Budget
from nbdram.memory.layout import PAGE
from nbdram.memory.pressure import AutoBudget, pressure_file, read_pressure
from nbdram.server import server as servers
from tests.helpers import eventually, served

MIB = 1 << 20


def write_pressure(path: Path, percent: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    some = f"some avg10={percent:.2f} avg60=3.00 avg300=1.00 total=5"
    path.write_text(some + "\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")


def test_the_last_ten_seconds_are_read(tmp_path: Path) -> None:
    write_pressure(tmp_path / "memory", 12.5)
    assert read_pressure(tmp_path / "memory") == 12.5


def test_the_own_control_group_comes_before_the_machine(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job\n")
    write_pressure(tmp_path / "proc/pressure/memory", 0)
    assert pressure_file(tmp_path / "proc", tmp_path / "cg") == tmp_path / "proc/pressure/memory"
    write_pressure(tmp_path / "cg/unified/job/memory.pressure", 0)
    assert pressure_file(tmp_path / "proc", tmp_path / "cg") == tmp_path / "cg/unified/job/memory.pressure"
    write_pressure(tmp_path / "cg/job/memory.pressure", 0)
    assert pressure_file(tmp_path / "proc", tmp_path / "cg") == tmp_path / "cg/job/memory.pressure"


def test_a_kernel_that_tells_no_pressure_has_no_file(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("5:memory:/job\n")
    assert pressure_file(tmp_path, tmp_path / "cg") is None


def test_pressure_lowers_the_budget_and_quiet_raises_it_again(tmp_path: Path) -> None:
    budget, path = Budget(100 * MIB), tmp_path / "memory"
    auto = AutoBudget(budget, path, 50 * MIB)
    write_pressure(path, 40)
    auto.step()
    assert budget.limit_pages * PAGE <= 90 * MIB
    for _ in range(20):
        auto.step()
    assert budget.limit_pages * PAGE == 50 * MIB
    write_pressure(path, 5)
    auto.step()
    assert budget.limit_pages * PAGE == 50 * MIB
    write_pressure(path, 0)
    for _ in range(30):
        auto.step()
    assert budget.limit_pages * PAGE == 100 * MIB


async def test_a_server_follows_the_pressure_until_it_is_not_told_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "memory"
    write_pressure(path, 40)
    monkeypatch.setattr(servers, "INTERVAL_S", 0.01)
    monkeypatch.setattr(servers, "pressure_file", lambda: path)
    async with served(tmp_path, "ram=1G", memory="64M", follow_pressure=True) as server:
        budget, whole = server.server.exports.budget, server.server.settings.memory // PAGE
        await eventually(lambda: budget.limit_pages * PAGE == MIN_MEMORY)
        write_pressure(path, 0)
        await eventually(lambda: budget.limit_pages == whole)
        path.write_text("")
        await eventually(lambda: "this kernel does not tell memory pressure" in caplog.text)
        assert budget.limit_pages == whole
