"""What reclaim at full speed does to others: how long reads of resident data take, and how much RAM is held."""

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any, Final

from bench import fio, report
from bench.checks import Check
from bench.fio import Job
from bench.options import Found, Options
from bench.paged_servers import Nbdram, Watch
from bench.servers import DEFAULT_EXPORT, running
from bench.watched import EVERY_NS, Beats, Stall

_OTHER: Final = "other"  # the export that is read
_OTHER_SIZE: Final = "4m"
_LEAD_S: Final = 1.0  # what goes on before the reads count; the writer starts in the middle of it
_READS: Final = Job(
    "4K randread QD1",
    "randread",
    "4k",
    1,
    span=_OTHER_SIZE,
    options=("--randrepeat=0", f"--ramp_time={_LEAD_S * 1000:.0f}ms"),
)
_ALONE, _BESIDE, _RECLAIM = "nothing else", "writes, no reclaim", "writes, reclaim"
_DATA_PER_BUDGET: Final = 1.4  # of which half can be compressed away
_HALF: Final = "--buffer_compress_percentage=50"
_PROMISE_S: Final = 5.0  # of random writes, at least
_PROMISE: Final = 1.05
_NOTE: Final = """\
own: the longest stall without the time that others had the server's core: clients, processes that compress, whatever
else runs. Those who share the host count as own: the floors are how long loops that do nothing but look at the clock,
one for each core and nothing else, stood still."""


@dataclass(frozen=True)
class Reading:
    """One run of reads of resident data, beside what another client made the server do."""

    outcome: fio.Outcome
    reclaimed_per_s: float  # bytes of clusters that were compressed meanwhile
    written_per_s: float
    fault_share: float  # of the reads: these were not of resident data
    stall: Stall  # the longest that the server's event loop did not come round


def stalls(options: Options) -> tuple[Found, list[Check]]:
    """4K reads at depth 1 on one export, alone and while another one is being written."""
    size = _size(options.budget)
    found: dict[str, list[Reading]] = {_ALONE: [], _BESIDE: [], _RECLAIM: []}
    exports = {DEFAULT_EXPORT: str(size), _OTHER: _OTHER_SIZE}
    tight = Nbdram(exports, options.budget, "nbdram, tight", is_watched=True)
    roomy = Nbdram(exports, 2 * size, "nbdram, roomy", is_watched=True)
    writes = Job("256K write QD16", "write", "256k", 16, span=str(size), options=(_HALF,))
    print("running reads beside reclaim", file=sys.stderr)
    nothing: list[Stall] = []
    with running([tight, roomy]):
        for server in (tight, roomy):
            fio.fill(server.uri(), str(size))
        for _ in range(options.rounds):
            nothing.append(_stall_of_nothing(options.seconds))
            found[_ALONE].append(_read(roomy, None, options.seconds))
            found[_BESIDE].append(_read(roomy, writes, options.seconds))
            found[_RECLAIM].append(_read(tight, writes, options.seconds))
    rows = []
    for name, readings in found.items():
        figures = ("operations_per_s", "p50_us", "p99_us", "p999_us")
        middle = [statistics.median(getattr(reading.outcome, figure) for reading in readings) for figure in figures]
        cells = [f"{middle[0] / 1000:.1f}", *map(report.microseconds, middle[1:])]
        cells.append(report.microseconds(max(reading.outcome.max_us for reading in readings)))
        cells.append(report.microseconds(max(reading.stall.whole_s for reading in readings) * 1e6))
        cells.append(report.microseconds(max(reading.stall.own_s for reading in readings) * 1e6))
        cells.append(f"{statistics.median(reading.written_per_s for reading in readings) / 1e6:.0f}")
        cells.append(f"{statistics.median(reading.reclaimed_per_s for reading in readings) / 1e6:.0f}")
        cells.append(f"{statistics.median(reading.fault_share for reading in readings):.0%}")
        rows.append([name, *cells])
    head = ["beside", "kIOPS", "p50 us", "p99 us", "p99.9 us", "max us", "stall us", "own us"]
    head += ["written MB/s", "reclaimed MB/s", "faults"]
    title = f"nbdram: {_READS.name} of resident data; max, and stall of the event loop, are of all rounds"
    print(report.table(title, head, rows), end="\n\n")
    print(_NOTE, end="\n\n")
    p99_ms = statistics.median(reading.outcome.p99_us for reading in found[_RECLAIM]) / 1000
    beside, what = [reading.stall for reading in found[_RECLAIM]], "event loop stalled beside reclaim"
    checks = [
        Check("resident 4K read beside reclaim, p99", p99_ms, 1.0, "ms", strictly=True),
        _stall_check(f"{what}, median round's longest", statistics.median, "whole_s", beside, nothing),
        _stall_check("likewise, its own", statistics.median, "own_s", beside, nothing),
        _stall_check("likewise, longest of all rounds", max, "own_s", beside, nothing),
    ]
    runs = {name: [asdict(reading) for reading in readings] for name, readings in found.items()}
    return {**runs, "stalls of nothing": [stall._asdict() for stall in nothing]}, checks


def _stall_check(
    what: str, of: Callable[[Iterable[float]], float], kind: str, stalls: Sequence[Stall], nothing: Sequence[Stall]
) -> Check:
    value, floor = (of(getattr(stall, kind) for stall in some) * 1000 for some in (stalls, nothing))
    return Check(what, value, 5.0, "ms", strictly=True, floor=floor)


def _stall_of_nothing(seconds: float) -> Stall:
    """The longest time for which the machine lets a process stand that needs a core, when all cores are needed."""
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores) as pool:
        return reduce(Stall.or_longer, pool.map(_stand_still, [seconds] * cores))


def _stand_still(seconds: float) -> Stall:
    """The longest time between two beats of a loop that does nothing else, as often as the server's."""
    beats, longest, end = Beats(), Stall(0.0, 0.0), time.monotonic() + seconds
    while (now := time.monotonic()) < end:
        while time.monotonic() < now + EVERY_NS / 1e9:
            pass
        longest = longest.or_longer(beats.beat())
    return longest


def _read(server: Nbdram, writes: Job | None, seconds: float) -> Reading:
    fio.fill(server.uri(_OTHER), _OTHER_SIZE)  # all of it is resident again
    with ThreadPoolExecutor(2) as pool:
        reader = pool.submit(fio.run, _READS, server.uri(_OTHER), seconds)
        time.sleep(_LEAD_S / 2)  # what is being read stays resident
        writer = pool.submit(fio.run, writes, server.uri(), _LEAD_S / 2 + seconds + _LEAD_S) if writes else None
        time.sleep(_LEAD_S / 2)
        before, begun = server.stats(), time.monotonic()
        server.longest_stall()
        outcome = reader.result()
        stall = server.longest_stall()
        after, elapsed = server.stats(), time.monotonic() - begun
        if writer:
            writer.result()
    clusters = sum(after["reclaim"][kind] - before["reclaim"][kind] for kind in ("compressed", "dropped_clean"))
    written = after["written_bytes"] - before["written_bytes"]
    reads = after["operations"]["read"] - before["operations"]["read"]
    faults = (_faults(after) - _faults(before)) / reads
    return Reading(outcome, (clusters << 16) / elapsed, written / elapsed, faults, stall)


def _faults(stats: dict[str, Any]) -> int:
    return sum(int(export["ram_faults"]) for export in stats["exports"] if export["name"] == _OTHER)


def promise(options: Options) -> tuple[Found, list[Check]]:
    """The most RAM that is held while a device is filled, and while it is written all over."""
    span = str(_size(options.budget))
    random = ("--randrepeat=0", "--refill_buffers=1", _HALF)
    job = Job("4K randwrite QD32", "randwrite", "4k", 32, span=span, options=random)
    print("running random writes, watching RAM", file=sys.stderr)
    server = Nbdram({DEFAULT_EXPORT: span}, options.budget)
    shares = {}
    with server:
        with Watch([server]) as watch:
            fio.fill(server.uri(), span)
        shares["fill"] = watch.most[server.name] / options.budget
        with Watch([server]) as watch:
            fio.run(job, server.uri(), max(_PROMISE_S, options.rounds * options.seconds))
        shares["random 4K writes"] = watch.most[server.name] / options.budget
    checks = [Check(f"most RAM held / budget, {name}", share, _PROMISE) for name, share in shares.items()]
    return dict(shares), checks


def _size(budget: int) -> int:
    return int(budget * _DATA_PER_BUDGET) >> 20 << 20
