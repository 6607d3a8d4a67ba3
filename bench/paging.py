"""More data than RAM: nbdram without a disk against nbdkit on zram, both within the same budget, with targets.

The data are files of this machine, half as much again as the budget. Ours counts everything that it holds: anonymous
memory, resident pages, images, index. On the other side count zram's memory, its tables, and the page cache through
which nbdkit uses it: that gets what zram leaves of the budget. nbdkit is run in two ways, with the page cache and
with cache=none (when it keeps next to nothing), and each job is compared with the one that was faster.
"""

import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from bench import checks, corpus, density, pressure, proc, report, rounds, zram
from bench.cgroup import MemoryLimit
from bench.checks import Check
from bench.errors import NoMatch
from bench.fio import Job, Outcome
from bench.host import need_memory
from bench.options import Found, Options
from bench.paged_servers import LEAST_PAGE_CACHE, NbdkitOnZram, NbdkitZstd, Nbdram, Paged, Watch, copy_in
from bench.rounds import JobSamples, Results, Sample
from bench.servers import DEFAULT_EXPORT, floor, running
from bench.serving import FLOOR, MIXED, OURS, detail_table
from bench.zram import Zram

_CACHED, _UNCACHED, _ZSTD = "zram, page cache", "zram, cache=none", "nbdkit zstd"
_DATA_PER_BUDGET: Final = 1.5
_ZRAM_GROWTH: Final = 1.05  # room for zram's memory, which fragments as data are overwritten
_USUAL_PERCENT: Final = 43  # to be compressed away, where there is no zram to tell
_READING: Final = ("read", "randread")
_MIB: Final = 1 << 20
_GIB: Final = 1 << 30


@dataclass(frozen=True)
class Target:
    """Against nbdkit on zram: at least `speed` times as fast; and a lower p99.9 if `tail`."""

    speed: float
    tail: bool = False


@dataclass(frozen=True)
class Plan:
    """How much data in how much RAM, and what zram makes of it."""

    budget: int
    content: Path
    zram: zram.Usage | None  # None if there is no zram here
    limits_page_cache: bool

    @property
    def size(self) -> int:
        return self.content.stat().st_size

    @property
    def compressible_percent(self) -> int:
        """What to ask of fio, so that lz4 makes of its pages (of 4 KiB) what it makes of the content."""
        return round(101.5 - 100 * self.zram.compressed / self.zram.stored) if self.zram else _USUAL_PERCENT

    def ours(self) -> Nbdram:
        return Nbdram({DEFAULT_EXPORT: str(self.size)}, self.budget, OURS)

    def peers(self) -> list[Paged]:
        if not self.zram:
            return [NbdkitZstd(_ZSTD, self.size)]
        cost = self.zram.cost
        found: list[Paged] = [NbdkitOnZram(_UNCACHED, self.size, self.budget, cost, uses_page_cache=False)]
        if self.limits_page_cache:
            found.insert(0, NbdkitOnZram(_CACHED, self.size, self.budget, cost, uses_page_cache=True))
        return found


_NOTE: Final = """\
* the faster of the two, which the ratios and p99.9 are of. Its CPU is without what the kernel writes for it later.
A question mark: other processes took more than was tolerable of the machine."""

_FILL: Final = Job("fill, 256K write QD16", "write", "256k", 16)
_FILL_TARGET: Final = Target(1.0)
_FAULT: Final = "4K read QD1, cold"
_FAULT_LIMITS: Final = {"p50": 150.0, "p99": 1000.0}  # us


def jobs(plan: Plan) -> dict[Job, Target]:
    """All but the fill. Cold data first: what the later jobs touch becomes resident, or is written over."""
    span = str(plan.size)
    zipf = ("--random_distribution=zipf:1.1",)  # the same pages are hot in each round
    other = ("--randrepeat=0",)  # other pages in each round
    writes = ("--refill_buffers=1", f"--buffer_compress_percentage={plan.compressible_percent}")
    return {
        Job("256K read QD16, cold", "read", "256k", 16, span=span): Target(0.8),
        Job(_FAULT, "randread", "4k", 1, span=span, options=other): Target(0.8),
        Job("4K uniform read QD32", "randread", "4k", 32, span=span, options=other): Target(1.1, tail=True),
        Job("4K zipf 1.1 read QD32", "randread", "4k", 32, span=span, options=zipf): Target(1.5, tail=True),
        Job("4K zipf 1.1 70/30 QD32", "randrw", "4k", 32, span=span, options=(*zipf, *MIXED, *writes)): Target(
            1.1, tail=True
        ),
    }


_PARTS: Final[Mapping[str, Callable[[Options], tuple[Found, list[Check]]]]] = {
    "density": density.run,
    "stalls": pressure.stalls,
    "promise": pressure.promise,
}


def run(options: Options) -> Found:
    """Run the jobs and parts whose name matches."""
    with tempfile.TemporaryDirectory(prefix="nbdram-bench-") as directory:
        names = [_FILL.name, *(job.name for job in jobs(Plan(0, Path(), None, False))), *_PARTS]
        chosen = [name for name in names if re.search(options.only, name, re.IGNORECASE)]
        if not chosen:
            raise NoMatch(f"no job matches {options.only!r}: {'; '.join(names)}")
        found: dict[str, object] = {}
        limits: list[Check] = []
        if set(chosen) - set(_PARTS):
            plan = _plan(options.budget, Path(directory) / "content")
            found["plan"] = {**asdict(plan), "content": plan.size}
            found["jobs"] = _compare(plan, chosen, options, limits)
        for name in chosen:
            if part := _PARTS.get(name):
                found[name], more = part(options)
                limits += more
        if limits:
            print(checks.table("Limits", limits))
            found["limits"] = [asdict(check) for check in limits]
        return found


def _plan(budget: int, path: Path) -> Plan:
    """Make the content; raise the budget if zram needs more for it."""
    print("making a tar of real files", file=sys.stderr)
    size = int(budget * _DATA_PER_BUDGET) // _MIB * _MIB
    need_memory((4 * budget + 2 * size) // _GIB + 1)
    content = corpus.tar(path, size)
    usage = zram.cost_of(content) if Zram.available() else None
    limited = MemoryLimit.available()
    if usage:
        least = int(usage.cost * _ZRAM_GROWTH) + LEAST_PAGE_CACHE
        share = usage.cost / size
        print(f"budget {report.size(budget)}, data {report.size(size)}, which take {share:.3f} of that in zram")
        if least > budget:
            print(f"that is too much for zram: both get {report.size(least)}")
            budget = least
        if limited:
            print(f"nbdkit on zram: with {report.size(budget - usage.cost)} of page cache; and with cache=none")
        else:
            print("nbdkit on zram: with cache=none, as a control group for the page cache can't be made")
    else:
        print("no zram here (or not root): nbdkit has its memory plugin with zstd instead, which knows no budget")
    print(flush=True)
    return Plan(budget, content, usage, limited)


def _compare(plan: Plan, chosen: Sequence[str], options: Options, limits: list[Check]) -> Found:
    """The jobs with a ratio, side by side."""
    table = {job: target for job, target in jobs(plan).items() if job.name in chosen}
    names = [OURS, *(peer.name for peer in plan.peers())]
    results: Results = {}
    held: dict[str, int] = {}
    if _FILL.name in chosen:
        results[_FILL.name] = _fill(plan, options)
    if table:
        servers: list[Paged] = [plan.ours(), *plan.peers()]
        ceiling = floor(str(plan.size))  # all of it in plain memory
        with running([*servers, ceiling]):
            for server in servers:
                copy_in(plan.content, server.uri())
                server.settle()
            with Watch(servers) as watch:
                for job in table:
                    _warm_up(job, servers, options)
                    for server in servers:
                        server.rebalance()
                    # The kernel's threads that write for a peer pass as others' work: no second try for that.
                    patience = options.patience / len(table) if job.rw in _READING else 0.0
                    results |= rounds.measure([job], [*servers, ceiling], replace(options, patience=patience))
            held = watch.most
    if not results:
        return {}
    targets = ({_FILL: _FILL_TARGET} if _FILL.name in results else {}) | table
    print(_speed_table(targets, results, names), end="\n\n")
    if table:
        print(detail_table(list(table), results, [*names, FLOOR]), end="\n\n")
        shares = ", ".join(f"{name} {most / plan.budget:.3f}" for name, most in held.items())
        print(f"most RAM held during these jobs / budget: {shares}", end="\n\n")
    if _FAULT in results:
        ours = results[_FAULT][OURS]
        for name, figure in {"p50": _p50, "p99": _p99}.items():
            limit = _FAULT_LIMITS[name]
            limits.append(Check(f"4K fault from RAM, {name}", rounds.median(ours, figure), limit, "us", strictly=True))
    return {**rounds.as_json(results), "held": held}


def _p50(sample: Sample) -> float:
    return sample.outcome.p50_us


def _p99(sample: Sample) -> float:
    return sample.outcome.p99_us


def _p999(sample: Sample) -> float:
    return sample.outcome.p999_us


def _warm_up(job: Job, servers: Sequence[Paged], options: Options) -> None:
    """One round that does not count, where there is something hot to be found out."""
    if any("zipf" in option for option in job.options):
        rounds.measure([job], servers, replace(options, rounds=1, patience=0.0))


def _fill(plan: Plan, options: Options) -> JobSamples:
    """Copy the content to servers that have just been started; the peers' last flush is part of it."""
    print(f"running {_FILL.name}", file=sys.stderr)
    servers: list[Paged] = [plan.ours(), *plan.peers()]
    samples: JobSamples = {server.name: [] for server in servers}
    for number in range(options.rounds):
        first = number % len(servers)
        for server in (*servers[first:], *servers[:first]):
            with server:
                samples[server.name].append(_one_fill(server, plan.content))
    return samples


def _one_fill(server: Paged, content: Path) -> Sample:
    def now() -> tuple[float, float, float, float]:
        return time.monotonic(), proc.machine_cpu_s(), server.cpu_s(), proc.ended_children_cpu_s()

    before = now()
    copy_in(content, server.uri())
    elapsed, machine, own, client = (b - a for a, b in zip(before, now(), strict=True))
    size = content.stat().st_size
    operations = -(-size // (256 << 10))
    # A copy tells no latencies.
    outcome = Outcome(operations, operations / elapsed, size / elapsed, 0.0, 0.0, 0.0, 0.0, client / elapsed)
    return Sample(outcome, own * 1e6 / operations, max(0.0, machine - own - client) / elapsed)


def _speed_table(targets: Mapping[Job, Target], results: Results, names: Sequence[str]) -> str:
    """One row for each job; ratios are ours to the faster peer's, the median of the rounds' own ratios."""
    peers = names[1:]
    head = ["job", "", *names, "ratio", "range", "ratio CPU", "target", "met", "p99.9 us", "peer's", "met", "floor's"]
    rows = []
    for job, target in targets.items():
        samples = results[job.name]
        peer = max(peers, key=lambda name: rounds.median(samples[name], rounds.speed))
        speeds = rounds.ratios(samples[OURS], samples[peer], rounds.speed)
        ratio = statistics.median(speeds)
        cpu = statistics.median(rounds.ratios(samples[OURS], samples[peer], rounds.cpu))
        cells = [f"{_speed(job, samples[name])}{'*' if name == peer and len(peers) > 1 else ''}" for name in names]
        cells += [f"{ratio:.2f}", report.span(speeds), f"{cpu:.2f}"]
        # The kernel's threads that write for a peer would pass as somebody else.
        doubt = (
            "?" if rounds.disturbed(samples[OURS] + (samples[peer] if job.rw in ("read", "randread") else [])) else ""
        )
        cells += [f">={target.speed:.2f}", ("yes" if ratio >= target.speed else "no") + doubt]
        ours, theirs = rounds.median(samples[OURS], _p999), rounds.median(samples[peer], _p999)
        if job is _FILL:
            cells += ["-", "-", "-", "-"]
        else:
            verdict = "-" if not target.tail else ("yes" if ours < theirs else "no") + doubt
            fastest = statistics.median(rounds.ratios(samples[FLOOR], samples[peer], rounds.speed))
            cells += [report.microseconds(ours), report.microseconds(theirs), verdict, f"{fastest:.2f}"]
        rows.append([job.name, "MB/s" if job.is_bulk else "kIOPS", *cells])
    text = report.table("More data than RAM, medians of the rounds", head, rows, left=2)
    return (
        f"{text}\n\n* the faster one, that the ratio and p99.9 are of. What zram's own threads write is not in its CPU."
    )


def _speed(job: Job, samples: Sequence[Sample]) -> str:
    if job.is_bulk:
        return f"{rounds.median(samples, lambda s: s.outcome.bytes_per_s) / 1e6:.0f}"
    return f"{rounds.median(samples, rounds.speed) / 1000:.1f}"
