"""What executions of `serving` share: devices, which are empty again after each, and one swap area.

A new device for every execution would cost more than most executions do.
"""

import asyncio
import atexit
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from nbdram.access import Rules
from nbdram.memory.backing import allocated_bytes
from nbdram.memory.budget import Budget
from nbdram.memory.reclaim import Reclaimer
from nbdram.memory.tiers.disk import DiskTier, SwapArea
from nbdram.server.exports import Exports
from nbdram.server.pace import Pace
from nbdram.server.service import Service
from tests.helpers import CLUSTER, PAGE, hot_pages, index_pages

from .program import SIZE, Program

TIGHT: Final = 48 * PAGE
ROOMY: Final = 8 * SIZE
_IDENTITY: Final = UUID(int=1)


class _Failures(logging.Handler):
    """What the server reports of itself."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(self.format(record))


class _AtOnce:
    """An executor without threads: the same program always does the same."""

    def submit(self, work: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        done: Future[Any] = Future()
        done.set_running_or_notify_cancel()
        try:
            done.set_result(work(*arguments))
        except OSError as error:
            done.set_exception(error)
        return done

    def shutdown(self) -> None:
        pass


class _Caps(Pace):
    """Caps whose time passes with each look at the clock; who must wait does so until the loop's next round, and by
    then all of the time has passed: a debt that took hundreds of rounds would take most of the machine's time."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(Rules(iops=50, bandwidth=2_000_000), self._time)

    def _time(self) -> float:
        self._now += 0.01
        return self._now

    def delay_s(self) -> float:
        delay = super().delay_s()
        self._now += delay
        return min(delay, 1e-9)


failures: Final = _Failures()
logging.getLogger("nbdram").addHandler(failures)
logging.getLogger("nbdram").propagate = False
logging.getLogger("nbdram").setLevel(logging.ERROR)
loop: Final = asyncio.new_event_loop()
loop.set_exception_handler(lambda _, context: failures.seen.append(str(context)))
_at_once: Final = _AtOnce()
_directory: Path | None = None
_area: SwapArea | None = None
_kept: dict[tuple[bool, bool, bool], "Stand"] = {}


def area() -> SwapArea:
    """The swap area, in RAM."""
    global _area, _directory
    if _area is None:
        _directory = Path(f"/dev/shm/nbdram-fuzz-{os.getpid()}")
        _area = SwapArea(_directory, 0)
    return _area


@atexit.register
def _clean_up() -> None:
    """Not under libFuzzer, which leaves without saying so: there the launcher removes what is left."""
    if _directory:
        shutil.rmtree(_directory, ignore_errors=True)


class Stand:
    """A device, and what serves it; `ready` sets it up, `restore` brings it back to where it was."""

    def __init__(self, program: Program) -> None:
        self.budget = Budget(ROOMY)
        self.exports = Exports(self.budget)
        self.export = self.exports.create("ram", SIZE, read_only=program.read_only, dense=program.dense)
        self.device = self.export.device
        if program.has_disk:
            self.device.disk = DiskTier([area()], _at_once, _IDENTITY, kept=False)  # type: ignore[arg-type]
        self.budget.attach(lambda: None)
        self.reclaimer = Reclaimer(self.budget, self.exports.devices)
        self.service = Service(self.exports)
        self.service.fetcher._readers = _at_once  # type: ignore[assignment]

    def ready(self, program: Program) -> None:
        self.export.pace = _Caps() if program.is_paced else None
        self.budget.hope()
        self.budget.set_limit(self.budget.overhead_pages * PAGE + (TIGHT if program.is_tight else ROOMY))
        self.service.batches = self.service.served_since = 0
        self.service.last_served = None

    def shrink(self, limit_bytes: int) -> None:
        self.budget.set_limit(self.budget.overhead_pages * PAGE + limit_bytes)

    def check_accounts(self) -> None:
        """Every page that is there is accounted for, and no other."""
        device, budget = self.device, self.budget
        assert hot_pages(device) == device.resident_pages, "resident pages"
        assert device.ram.allocated_bytes() == device.cold_pages * PAGE, "images in RAM"
        assert index_pages(device) == device.index_pages, "index pages"
        taken = device.resident_pages + device.cold_pages + device.index_pages + budget.overhead_pages
        assert budget.used_pages == taken, "the budget"
        if device.disk:
            assert area().used_bytes == sum(map(allocated_bytes, device.disk.files)), "swap"

    def restore(self) -> None:
        """The device as new. All memory must come back, and nobody may still look at it."""
        device = self.device
        for _ in device.trim(0, SIZE):
            pass
        assert not any(device.references[: SIZE // CLUSTER]), "a cluster is left when all was trimmed"
        self.check_accounts()
        assert device.resident_pages == device.cold_pages == 0, "memory is kept"
        assert not self.budget.waiting, "somebody still waits for memory"
        assert not device.senders, "somebody is still sending"
        assert not device.incoming, "somebody is still receiving"
        assert not device.reclaiming, "a cluster is still being reclaimed"
        device.hot_view.release()
        device.hot.resize(len(device.hot))  # refused, with BufferError, while there are views
        device.hot_view = memoryview(device.hot)

    def close(self) -> None:
        self.exports.close()
        self.reclaimer._workers.shutdown()


def stand_for(program: Program) -> Stand:
    """A stand that nobody else has; `give_back` it if all went well."""
    kind = program.has_disk, program.dense, program.read_only
    stand = _kept.pop(kind, None) or Stand(program)
    stand.ready(program)
    return stand


def give_back(program: Program, stand: Stand) -> None:
    _kept[program.has_disk, program.dense, program.read_only] = stand
