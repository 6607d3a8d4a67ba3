"""The last ten minutes, for curves: rates and sizes, taken every two seconds by a thread of its own."""

import threading
import time
from array import array
from typing import TYPE_CHECKING, Final

from nbdram.memory.layout import PAGE

if TYPE_CHECKING:
    from nbdram.server.exports import Export
    from nbdram.server.server import Server

INTERVAL_S: Final = 2.0
POINTS: Final = 300
SERIES: Final = ("read_bytes", "written_bytes", "requests", "faults", "resident", "compressed", "disk", "remote")
_RATES: Final = 4  # the first of them are per second, out of counters
# Exports that were never used have no curves, and of the others at most this many: each takes 8 KiB.
_MAX_EXPORTS: Final = 256
_EXPORTS_AT_ONCE: Final = 50
_REST_S: Final = 0.0001

Numbers = tuple[int, ...]  # of SERIES, the first as counters


class _Ring:
    """The latest POINTS values of every series."""

    def __init__(self, now: Numbers) -> None:
        self._before = now
        self.points = {name: array("f", bytes(4 * POINTS)) for name in SERIES}
        self.used = 0

    def add(self, now: Numbers, seconds: float) -> None:
        for number, name in enumerate(SERIES):
            value = max(0, now[number] - self._before[number]) / seconds if number < _RATES else now[number]
            points = self.points[name]
            points[:-1] = points[1:]
            points[-1] = value
        self._before = now
        self.used = min(POINTS, self.used + 1)

    def latest(self) -> dict[str, list[float]]:
        return {
            name: [round(value, 1) for value in points[POINTS - self.used :]] for name, points in self.points.items()
        }


class History:
    """Follows a server from `start` to `stop`."""

    def __init__(self, server: "Server") -> None:
        self._server = server
        self._total: _Ring | None = None
        self._exports: dict[str, _Ring] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nbdram-history", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def series(self, export: str | None = None) -> dict[str, list[float]]:
        """The curves of an export, or of all together, oldest point first; empty if there are none yet."""
        ring = self._total if export is None else self._exports.get(export)
        return ring.latest() if ring else {name: [] for name in SERIES}

    def _run(self) -> None:
        before = time.monotonic()
        self.take(INTERVAL_S)
        while not self._stopping.wait(INTERVAL_S):
            now = time.monotonic()
            self.take(now - before)
            before = now

    def take(self, seconds: float) -> None:
        """One point, `seconds` after the one before."""
        exports = list(self._server.exports)
        sums = [0] * len(SERIES)
        for number, export in enumerate(exports):
            now = _numbers(export)
            sums = [one + more for one, more in zip(sums, now, strict=True)]
            ring = self._exports.get(export.name)
            if ring:
                ring.add(now, seconds)
            elif export.counters.connections_opened and len(self._exports) < _MAX_EXPORTS:
                self._exports[export.name] = _Ring(now)
            if number % _EXPORTS_AT_ONCE == _EXPORTS_AT_ONCE - 1:
                time.sleep(_REST_S)
        names = {export.name for export in exports}
        for name in [name for name in self._exports if name not in names]:
            del self._exports[name]
        if self._total:
            self._total.add(tuple(sums), seconds)
        else:
            self._total = _Ring(tuple(sums))


def _numbers(export: "Export") -> Numbers:
    counters, device = export.counters, export.device
    return (
        counters.read_bytes,
        counters.written_bytes,
        sum(counters.operations.values()),
        device.ram_faults + device.disk_faults + device.remote_faults,
        device.resident_pages * PAGE,
        device.cold_pages * PAGE,
        device.disk_pages * PAGE,
        device.remote_pages * PAGE,
    )
