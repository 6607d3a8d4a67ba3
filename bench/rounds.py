"""Interleaved rounds: every job is run on every server in turn, several times, and medians count.

What a machine does meanwhile (other tenants, clock frequency, heat) then hits all servers alike,
and a ratio is taken within a round before the median over the rounds is taken.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from bench import fio, proc
from bench.errors import BenchError
from bench.fio import Job
from bench.options import Options
from bench.servers import Server

DISTURBED_CORES: Final = 0.15  # others' work, from which on a sample is taken again
_GLANCE_S: Final = 0.5


@dataclass(frozen=True)
class Sample:
    """One job on one server in one round."""

    outcome: fio.Outcome
    cpu_us: float  # of the server, per operation
    others: float  # cores that were busy with something else than the server and fio


Figure = Callable[[Sample], float]
JobSamples = dict[str, list[Sample]]  # by server name, one for each round
Results = dict[str, JobSamples]  # by job name


def speed(sample: Sample) -> float:
    return sample.outcome.operations_per_s


def cpu(sample: Sample) -> float:
    return sample.cpu_us


def measure(jobs: Sequence[Job], servers: Sequence[Server], options: Options) -> Results:
    """All jobs on all servers; the server that goes first changes from round to round.

    A sample that others' work has spoiled is taken again when the machine is quiet, for as long as
    the options' patience lasts.
    """
    patience = _Patience(options.patience)
    results: Results = {}
    for job in jobs:
        print(f"running {job.name}", file=sys.stderr)
        samples: JobSamples = {server.name: [] for server in servers}
        for number in range(options.rounds):
            first = number % len(servers)
            for server in (*servers[first:], *servers[:first]):
                sample = _sample(job, server, options.seconds)
                while sample.others > DISTURBED_CORES and patience.wait_for_quiet():
                    again = _sample(job, server, options.seconds)
                    sample = min(sample, again, key=lambda s: s.others)
                samples[server.name].append(sample)
                server.settle()
        results[job.name] = samples
    return results


class _Patience:
    """A number of seconds that a run may spend on waiting for others to finish their work."""

    def __init__(self, seconds: float) -> None:
        self._left_s = seconds

    def wait_for_quiet(self) -> bool:
        """True once the machine is quiet; False when patience has run out."""
        while self._left_s > 0:
            before = proc.machine_cpu_s()
            time.sleep(_GLANCE_S)
            self._left_s -= _GLANCE_S
            if (proc.machine_cpu_s() - before) / _GLANCE_S <= DISTURBED_CORES:
                return True
        return False


def _sample(job: Job, server: Server, seconds: float) -> Sample:
    watch = _Watch(server)
    try:
        outcome = fio.run(job, server.uri(), seconds)
    except BenchError as error:
        server.check_alive()
        raise BenchError(f"{server.name}: {error}; the server said: {server.log_tail()}") from None
    server_s, others = watch.read()
    return Sample(outcome, server_s * 1e6 / outcome.operations, others)


class _Watch:
    """CPU time that is used from its creation on."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._before = self._now()

    def _now(self) -> tuple[float, float, float, float]:
        machine, fio_s = proc.machine_cpu_s(), proc.ended_children_cpu_s()
        return time.monotonic(), machine, self._server.cpu_s(), fio_s

    def read(self) -> tuple[float, float]:
        """CPU seconds of the server, and cores that others kept busy on average."""
        now = self._now()
        elapsed, machine, server, fio_s = (b - a for a, b in zip(self._before, now, strict=True))
        return server, max(0.0, machine - server - fio_s) / elapsed


def disturbed(samples: Sequence[Sample]) -> bool:
    return any(sample.others > DISTURBED_CORES for sample in samples)


def median(samples: Sequence[Sample], figure: Figure) -> float:
    return statistics.median(figure(sample) for sample in samples)


def ratios(ours: Sequence[Sample], theirs: Sequence[Sample], figure: Figure) -> list[float]:
    """Round by round, in rising order."""
    return sorted(figure(a) / figure(b) for a, b in zip(ours, theirs, strict=True))


def as_json(results: Results) -> dict[str, dict[str, list[dict[str, object]]]]:
    """Every sample of every round."""
    return {
        job: {server: [asdict(sample) for sample in samples] for server, samples in found.items()}
        for job, found in results.items()
    }
