"""What is left of a good client's speed while others mean ill: half-open handshakes, readers that never read, storms.

The good client and the others speak to one TCP port on loopback, in plaintext, or with TLS required. Each round has the
job without and under the abuse, and a ratio is taken within a round. What the abusers' own process takes of the machine
is missing to server and client, too: from another machine, they would do less harm.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from bench import fio, proc, report
from bench.errors import BenchError, NoMatch
from bench.fio import Job
from bench.host import need_memory
from bench.options import Found, Options
from bench.servers import DEFAULT_EXPORT, Server, free_port, nbdram
from tests.certificates import Certificates

TARGET: Final = 0.8
_SIZE: Final = "1G"
_JOBS: Final = (
    Job("4K randread QD64", "randread", "4k", 64),
    Job("4K randwrite QD64", "randwrite", "4k", 64),
)
_READY_S: Final = 120.0
_NEWCOMERS: Final = 3  # good ones, whose way in is timed


@dataclass(frozen=True)
class Abuse:
    name: str
    kind: str  # as bench.abusers has it
    clients: int = 0


_ABUSES: Final = (
    Abuse("10,000 half-open handshakes", "half-open", 10_000),
    Abuse("1,000 readers that never read", "deaf", 1_000),
    Abuse("connecting, leaving at once", "storm"),
)


@dataclass(frozen=True)
class Sample:
    """One job without and under an abuse."""

    before: fio.Outcome
    under: fio.Outcome
    abusers_cores: float
    entry_s: float  # a newcomer's way in, under the abuse: the longest of some
    dials_per_s: float  # of the abusers
    tcp_bytes: int  # the kernel's memory for sockets, beyond what it was before

    @property
    def ratio(self) -> float:
        return self.under.operations_per_s / self.before.operations_per_s


class _Door:
    """A server's TCP port, and how a good client comes in there."""

    def __init__(self, home: Path, *, tls: bool) -> None:
        self.port = free_port()
        self.name = "TLS" if tls else "plain"
        certificates = Certificates(home / ".config/pki/libnbd") if tls else None  # where libnbd looks for them
        self.ca = str(certificates.ca) if certificates else ""
        self.home = str(home)
        self.uri = f"{'nbds' if tls else 'nbd'}://127.0.0.1:{self.port}/{DEFAULT_EXPORT}"
        options = ["--listen", f"tcp://127.0.0.1:{self.port}", *(certificates.options() if certificates else [])]
        self.server: Server = nbdram({DEFAULT_EXPORT: _SIZE}, options=options)

    def entry_s(self) -> float:
        """How long a newcomer takes to come in, trying again if need be: the longest of some."""
        longest = 0.0
        for _ in range(_NEWCOMERS):
            begun = time.monotonic()
            while not self._enters():
                if time.monotonic() - begun > _READY_S:
                    raise BenchError("a good client is kept out")
                time.sleep(0.2)
            longest = max(longest, time.monotonic() - begun)
            time.sleep(1.1)  # while addresses share what is left, two a second are sure to be let in
        return longest

    def _enters(self) -> bool:
        command = ["nbdinfo", "--size", self.uri]
        return not subprocess.run(command, capture_output=True, env={**os.environ, "HOME": self.home}).returncode


def run(options: Options) -> Found:
    """Run the abuses whose name matches, or whose client's does."""
    need_memory(4)
    found: dict[str, list[Sample]] = {}
    for tls in (False, True):
        chosen = [
            (title, abuse, job)
            for abuse in _ABUSES
            for job in _JOBS
            if re.search(options.only, title := _title(abuse, job, tls=tls), re.IGNORECASE)
        ]
        if chosen:
            with _opened(tls=tls) as door:
                for title, abuse, job in chosen:
                    print(f"running {title}", file=sys.stderr)
                    found[title] = [_sample(abuse, door, job, options.seconds) for _ in range(options.rounds)]
    if not found:
        raise NoMatch(f"no abuse matches {options.only!r}: {', '.join(abuse.name for abuse in _ABUSES)}")
    print(_table(found))
    return {title: [asdict(sample) for sample in samples] for title, samples in found.items()}


def _title(abuse: Abuse, job: Job, *, tls: bool) -> str:
    return f"{abuse.name}{' (TLS)' if tls else ''}; {job.name}"


@contextmanager
def _opened(*, tls: bool) -> Iterator[_Door]:
    with tempfile.TemporaryDirectory(prefix="nbdram-bench-") as home:
        door = _Door(Path(home), tls=tls)
        with door.server:
            fio.fill(door.server.uri())
            yield door


def _sample(abuse: Abuse, door: _Door, job: Job, seconds: float) -> Sample:
    before = fio.run(job, door.uri, seconds, door.home)
    tcp_before = _tcp_bytes()
    with _Abusers(abuse, door) as abusers:
        entry_s = door.entry_s()
        abusers_s, begun = abusers.cpu_s(), time.monotonic()
        under = fio.run(job, door.uri, seconds, door.home)
        abusers_cores = (abusers.cpu_s() - abusers_s) / (time.monotonic() - begun)
        tcp_bytes = _tcp_bytes() - tcp_before
    door.server.check_alive()
    return Sample(before, under, abusers_cores, entry_s, abusers.dials_per_s, tcp_bytes)


class _Abusers:
    """The process of bench.abusers, at work until the block ends."""

    def __init__(self, abuse: Abuse, door: _Door) -> None:
        self._command = [sys.executable, "-m", "bench.abusers", abuse.kind, str(door.port), str(abuse.clients), door.ca]
        self.dials_per_s = 0.0

    def __enter__(self) -> "_Abusers":
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        if self._process.stdout.readline() != "ready\n":
            self._end()
            raise BenchError("the abusers did not begin")
        return self

    def cpu_s(self) -> float:
        return proc.cpu_s(self._process.pid)

    def __exit__(self, *_: object) -> None:
        try:
            said, _unused = self._process.communicate("", timeout=_READY_S)
            self.dials_per_s = float(said or 0)
        finally:
            self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()


def _tcp_bytes() -> int:
    match = re.search(r"^TCP:.* mem (\d+)$", Path("/proc/net/sockstat").read_text(), re.MULTILINE)
    assert match
    return int(match[1]) * os.sysconf("SC_PAGE_SIZE")


def _table(found: dict[str, list[Sample]]) -> str:
    rows = []
    for title, samples in found.items():
        ratios = sorted(sample.ratio for sample in samples)
        kept = statistics.median(ratios)
        row = [title, f"{statistics.median(sample.before.operations_per_s for sample in samples) / 1000:.1f}"]
        row += [f"{kept:.2f}", report.span(ratios), "yes" if kept >= TARGET else "no"]
        row.append(report.microseconds(statistics.median(sample.before.p99_us for sample in samples)))
        row.append(report.microseconds(statistics.median(sample.under.p99_us for sample in samples)))
        row += [f"{statistics.median(sample.abusers_cores for sample in samples):.2f}"]
        row.append(f"{max(sample.entry_s for sample in samples) * 1000:.0f}")
        row.append(f"{statistics.median(sample.dials_per_s for sample in samples):.0f}")
        row.append(report.size(max(0, *(sample.tcp_bytes for sample in samples))))
        rows.append(row)
    head = ["abuse; good client", "kIOPS", "kept", "range", f">={TARGET}", "p99 us", "under"]
    head += ["abusers", "entry ms", "dials/s", "TCP"]
    note = """\
abusers: cores that they took themselves. entry: the longest that a good newcomer
took to come in. dials: connections that the abusers tried. TCP: memory of the kernel for sockets."""
    return report.table("A good client under abuse", head, rows) + "\n\n" + note
