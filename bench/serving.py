"""Serving from RAM: the same jobs on nbdram and on its peers, over Unix sockets, with targets."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bench import fio, report, rounds
from bench.errors import NoMatch
from bench.fio import Job
from bench.host import need_memory
from bench.options import Found, Options
from bench.rounds import JobSamples, Results, Sample
from bench.servers import PEERS, floor, nbdram, running

OURS: Final = "nbdram"
YARDSTICK: Final = "nbdkit"
FLOOR: Final = "floor"
_SIZE: Final = "1G"


@dataclass(frozen=True)
class Target:
    """Against nbdkit: at least `speed` times its operations, at most `cpu` times its CPU per op."""

    speed: float
    cpu: float | None = None

    def __str__(self) -> str:
        wanted = f">={self.speed:.2f}"
        return f"{wanted}, CPU <={self.cpu:.2f}" if self.cpu else wanted

    def is_met(self, speed: float, cpu: float) -> bool:
        return speed >= self.speed and (self.cpu is None or cpu <= self.cpu)


_FLOOR_NOTE: Final = """\
floor: a C server of one thread that does no work (bench/floor.c), with everything in plain memory; its ratio is
to the same server as ours. It is what the client and the socket allow, more or less.
"""
_DETAIL_NOTE: Final = """\
fio: cores that fio kept busy. Near 1.00 it is fio that limits the speed: the server could do more.
others: cores that other processes took at worst. Far above 0, the figures are not to be trusted,
and there is a question mark behind "met"."""

MIXED: Final = ("--rwmixread=70",)

# name, what fio does, its block size, depth, further options of fio; and what we want to reach
TARGETS: Final[dict[Job, Target]] = {
    Job("4K randread QD64", "randread", "4k", 64): Target(1.8, cpu=0.55),
    Job("4K randwrite QD64", "randwrite", "4k", 64): Target(1.4, cpu=0.7),
    Job("4K mixed 70/30 QD32", "randrw", "4k", 32, options=MIXED): Target(1.4),
    Job("256K read QD16", "read", "256k", 16): Target(1.4),
    Job("256K write QD16", "write", "256k", 16): Target(1.4),
    Job("1M read QD16", "read", "1m", 16): Target(1.4),
    Job("1M write QD16", "write", "1m", 16): Target(1.4),
    Job("4K randread QD1", "randread", "4k", 1): Target(0.95),
    Job("4K randwrite QD1", "randwrite", "4k", 1): Target(0.95),
}


def run(options: Options) -> Found:
    """Measure, print, and return what was measured."""
    chosen = [job for job in TARGETS if re.search(options.only, job.name, re.IGNORECASE)]
    if not chosen:
        known = ", ".join(job.name for job in TARGETS)
        raise NoMatch(f"no job matches {options.only!r}: {known}")
    servers = [nbdram({"ram": _SIZE}), *(PEERS[peer](_SIZE) for peer in options.peers), floor(_SIZE)]
    names = [server.name for server in servers]
    need_memory(len(names) + 1)
    with running(servers):
        for server in servers:
            fio.fill(server.uri())
        results = rounds.measure(chosen, servers, options)
    title = "Serving from RAM, medians of the rounds"
    print(speed_table(chosen, results, names, title), end="\n\n")
    print(detail_table(chosen, results, names))
    return rounds.as_json(results)


def speed_table(jobs: Sequence[Job], results: Results, names: Sequence[str], title: str) -> str:
    """One row for each job; ratios are to nbdkit's, the median of the rounds' own ratios."""
    head = ["job", "", *names, "ratio", "range", "ratio CPU", "target", "met", "floor's"]
    rows = []
    for job in jobs:
        samples = results[job.name]
        speeds = [_speed(job, samples[name]) for name in names]
        unit = "MB/s" if job.is_bulk else "kIOPS"
        rows.append([job.name, unit, *speeds, *_verdict(job, samples)])
    return report.table(title, head, rows, left=2)


def _speed(job: Job, samples: Sequence[Sample]) -> str:
    if job.is_bulk:
        return f"{rounds.median(samples, lambda s: s.outcome.bytes_per_s) / 1e6:.0f}"
    return f"{rounds.median(samples, rounds.speed) / 1000:.1f}"


def _verdict(job: Job, samples: JobSamples) -> list[str]:
    if YARDSTICK not in samples:
        return ["-"] * 6
    speeds = rounds.ratios(samples[OURS], samples[YARDSTICK], rounds.speed)
    cpus = rounds.ratios(samples[OURS], samples[YARDSTICK], rounds.cpu)
    speed, cpu = statistics.median(speeds), statistics.median(cpus)
    target = TARGETS.get(job)
    met = "-" if target is None else "yes" if target.is_met(speed, cpu) else "no"
    if rounds.disturbed([*samples[OURS], *samples[YARDSTICK]]):
        met += "?"
    cells = [f"{speed:.2f}", report.span(speeds), f"{cpu:.2f}", str(target or "-"), met]
    if FLOOR not in samples:
        return [*cells, "-"]
    return [*cells, f"{statistics.median(rounds.ratios(samples[FLOOR], samples[YARDSTICK], rounds.speed)):.2f}"]


def detail_table(jobs: Sequence[Job], results: Results, names: Sequence[str]) -> str:
    """One row for each job and server: what an operation costs, and how long it takes."""
    figures: list[rounds.Figure] = [
        rounds.cpu,
        lambda s: s.outcome.p50_us,
        lambda s: s.outcome.p99_us,
        lambda s: s.outcome.p999_us,
    ]
    head = ["job", "server", "CPU us/op", "p50 us", "p99 us", "p99.9 us", "fio", "others"]
    rows = []
    for job in jobs:
        for name in names:
            samples = results[job.name][name]
            cells = [report.microseconds(rounds.median(samples, figure)) for figure in figures]
            fio_cores = rounds.median(samples, lambda s: s.outcome.client_cores)
            others = max(sample.others for sample in samples)
            rows.append([job.name, name, *cells, f"{fio_cores:.2f}", f"{others:.2f}"])
    text = report.table("CPU time of the server per operation, and latency", head, rows, left=2)
    return f"{text}\n\n{_FLOOR_NOTE if FLOOR in names else ''}{_DETAIL_NOTE}"
