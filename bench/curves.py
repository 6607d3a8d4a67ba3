"""Speed and latency as something grows: queue depth, connections, the share of the data that is cold."""

import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import corpus, fio, report, rounds
from bench.errors import NoMatch
from bench.fio import Job
from bench.host import need_memory
from bench.options import Found, Options
from bench.paged_servers import Nbdram, copy_in
from bench.rounds import Figure, Results
from bench.servers import DEFAULT_EXPORT, PEERS, Server, floor, nbdram, running

_DEPTHS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
_CONNECTIONS: Final = (1, 2, 4, 8, 16)
_BUDGET_SHARES: Final = (1.15, 0.95, 0.85, 0.75, 0.65, 0.6)  # of the data
_DATA_BYTES: Final = 256 << 20
_LEAST_BUDGET: Final = 64 << 20  # what the process takes, and room to move


@dataclass(frozen=True)
class Curve:
    """Medians of the rounds, by server; `x` is what grows."""

    name: str
    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    y: Mapping[str, Sequence[float]]
    is_logarithmic: bool = True

    def table(self) -> str:
        rows = [[f"{x:g}", *(f"{values[n]:.1f}" for values in self.y.values())] for n, x in enumerate(self.x)]
        return report.table(f"{self.title} ({self.y_label})", [self.x_label, *self.y], rows)


def run(options: Options) -> Found:
    """Print the curves as tables."""
    found = curves(options)
    for curve in found:
        print(curve.table(), end="\n\n")
    return {curve.name: {"x": list(curve.x), **{name: list(y) for name, y in curve.y.items()}} for curve in found}


def curves(options: Options) -> list[Curve]:
    """Measure those whose names match."""
    parts: dict[str, Callable[[Options], list[Curve]]] = {
        "depth": _by_depth,
        "connections": _by_connections,
        "cold": _by_cold_share,
    }
    chosen = [part for name, part in parts.items() if re.search(options.only, name, re.IGNORECASE)]
    if not chosen:
        raise NoMatch(f"no curve matches {options.only!r}: {', '.join(parts)}")
    return [curve for part in chosen for curve in part(options)]


def _kiops(sample: rounds.Sample) -> float:
    return rounds.speed(sample) / 1000


def _p50(sample: rounds.Sample) -> float:
    return sample.outcome.p50_us


def _p99(sample: rounds.Sample) -> float:
    return sample.outcome.p99_us


def _medians(jobs: Sequence[Job], results: Results, names: Sequence[str], figure: Figure) -> dict[str, list[float]]:
    return {name: [statistics.median(map(figure, results[job.name][name])) for job in jobs] for name in names}


def _measured(jobs: Sequence[Job], servers: Sequence[Server], options: Options) -> Results:
    need_memory(len(servers) + 1)
    with running(servers):
        for server in servers:
            fio.fill(server.uri())
        return rounds.measure(jobs, servers, options)


def _by_depth(options: Options) -> list[Curve]:
    servers = [nbdram({DEFAULT_EXPORT: "1G"}), *(PEERS[peer]("1G") for peer in options.peers), floor("1G")]
    names = [server.name for server in servers]
    found = []
    jobs = {rw: [Job(f"4K {rw} QD{n}", rw, "4k", n) for n in _DEPTHS] for rw in ("randread", "randwrite")}
    results = _measured([job for some in jobs.values() for job in some], servers, options)
    for rw, some in jobs.items():
        speeds = _medians(some, results, names, _kiops)
        found.append(Curve(f"depth-{rw}", f"4K {rw}", "queue depth", "kIOPS", _DEPTHS, speeds))
    latencies = {
        f"{name}, {label}": values
        for label, figure in {"p50": _p50, "p99": _p99}.items()
        for name, values in _medians(jobs["randread"], results, names, figure).items()
    }
    found.append(Curve("depth-latency", "4K randread, latency", "queue depth", "us", _DEPTHS, latencies))
    return found


def _by_connections(options: Options) -> list[Curve]:
    servers = [nbdram({DEFAULT_EXPORT: "1G"}), *(PEERS[peer]("1G") for peer in options.peers)]
    jobs = [Job(f"4K randread {n} x QD8", "randread", "4k", 8, connections=n) for n in _CONNECTIONS]
    results = _measured(jobs, servers, options)
    speeds = _medians(jobs, results, [server.name for server in servers], _kiops)
    return [Curve("connections", "4K randread, QD 8 each", "connections", "kIOPS", _CONNECTIONS, speeds)]


def _by_cold_share(options: Options) -> list[Curve]:
    """Uniform reads of real files, of which a part has been pushed out of `hot` by a smaller and smaller budget."""
    speeds: list[float] = []
    shares: list[float] = []
    job = Job("4K uniform read QD32", "randread", "4k", 32, span=str(_DATA_BYTES), options=("--randrepeat=0",))
    with tempfile.TemporaryDirectory(prefix="nbdram-bench-") as directory:
        content = corpus.tar(Path(directory) / "tar", _DATA_BYTES)
        for share in _BUDGET_SHARES:
            budget = _LEAST_BUDGET + int(_DATA_BYTES * share)
            print(f"running {job.name}, RAM for {share:.0%} of the data", file=sys.stderr)
            with Nbdram({DEFAULT_EXPORT: str(_DATA_BYTES)}, budget) as server:
                copy_in(content, server.uri())
                results = rounds.measure([job], [server], options)
                stats = server.export_stats()
                shares.append(round(100 * (1 - min(1, stats["resident"] / _DATA_BYTES)), 1))
                speeds.append(statistics.median(map(_kiops, results[job.name][server.name])))
    order = sorted(range(len(shares)), key=lambda n: shares[n])
    x, y = [shares[n] for n in order], [speeds[n] for n in order]
    title = "4K uniform reads, QD 32, as memory gets short"
    return [Curve("cold", title, "% of the data not resident", "kIOPS", x, {"nbdram": y}, is_logarithmic=False)]
