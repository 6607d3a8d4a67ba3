"""All faults, by name: how the server is set up, what is done to it, and for how long."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from . import clients, disks, machine, network
from .world import Inject, Result, Setting, campaign


@dataclass(frozen=True)
class Fault:
    name: str
    setting: Callable[[Path], AbstractContextManager[Setting]]
    inject: Inject
    seconds: float

    async def run(self, directory: Path, seconds: float | None = None) -> Result:
        """Raises if anything is wrong."""
        with self.setting(directory) as setting:
            return await campaign(directory, self.name, setting, self.inject, seconds or self.seconds)


_WALL_CLOCK: Final = partial(machine.with_a_clock_of_its_own, monotonic=False)
_ALL_CLOCKS: Final = partial(machine.with_a_clock_of_its_own, monotonic=True)

FAULTS: Final = {
    fault.name: fault
    for fault in (
        Fault("packets lost", network.across_a_wire, network.lossy, 20),
        Fault("network cut off", network.across_a_wire, network.cut_off, 40),
        Fault("disk full", disks.on_a_small_disk, disks.filled, 20),
        Fault("disk can't be read", disks.on_a_failing_disk, disks.unreadable, 20),
        Fault("server stopped", clients.nothing_special, machine.stopped, 30),
        Fault("wall clock jumps", _WALL_CLOCK, machine.clock_jumps, 10),
        Fault("all clocks jump ahead", _ALL_CLOCKS, machine.time_passes, 10),
        Fault("CPU starved", machine.in_a_cpu_group, machine.starved, 20),
        Fault("memory taken by a neighbour", machine.in_a_memory_group, machine.crowded, 20),
        Fault("too few open files", clients.with_few_files, clients.crowd_in, 10),
        Fault("clients die", clients.with_another_export, clients.die, 20),
    )
}
