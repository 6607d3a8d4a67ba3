"""`--memory auto`: the budget follows memory pressure (PSI), down in steps and up again when it is quiet.

Pressure is the share of the last ten seconds in which some task waited for memory, as the kernel says it for our
control group, or for the machine.
"""

from pathlib import Path
from typing import Final

from nbdram.memory.budget import Budget
from nbdram.memory.layout import PAGE

INTERVAL_S: Final = 2.0
_HIGH: Final = 10.0  # percent of the time
_QUIET: Final = 1.0
_DOWN: Final = 0.9
_UP: Final = 1.05


def pressure_file(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Path | None:
    """Where the kernel tells our memory pressure; None if it does not."""
    for line in (proc / "self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        for mount in (cgroups, cgroups / "unified"):
            own = mount / group.lstrip("/") / "memory.pressure"
            if controllers == "" and own.exists():
                return own
    whole = proc / "pressure/memory"
    return whole if whole.exists() else None


def read_pressure(path: Path) -> float:
    """The percentage of the last ten seconds in which some task waited for memory. OSError if it is not told."""
    for line in path.read_text().splitlines():
        if line.startswith("some "):
            fields = dict(field.split("=") for field in line.split()[1:])
            return float(fields["avg10"])
    raise OSError(f"{path} is not a pressure file")


class AutoBudget:
    """Moves a budget's limit between a floor and what it was at the start."""

    def __init__(self, budget: Budget, path: Path, floor_bytes: int) -> None:
        self._budget = budget
        self._path = path
        self._floor = floor_bytes
        self._ceiling = budget.limit_pages * PAGE
        self.events = 0

    def step(self) -> None:
        """Look at the pressure once, and move the limit a step if it asks for it."""
        pressure = read_pressure(self._path)
        limit = self._budget.limit_pages * PAGE
        if pressure >= _HIGH and limit > self._floor:
            self.events += 1
            self._budget.set_limit(max(self._floor, int(limit * _DOWN)))
        elif pressure <= _QUIET and limit < self._ceiling:
            self._budget.set_limit(min(self._ceiling, int(limit * _UP)))
