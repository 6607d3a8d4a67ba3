"""Eight times more data than RAM: a device is written once, and then all of it is read and verified.

Half of the data can be compressed away, so that about three quarters of what is stored end up on the disk. Counted
are what the server holds (sampled from outside), and what the host swaps meanwhile, which should be nothing.
"""

import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from bench import checks, fio, host, report
from bench.checks import Check
from bench.errors import BenchError
from bench.options import Found, Options
from bench.paged_servers import Nbdram, Watch
from bench.servers import DEFAULT_EXPORT

_DATA_PER_BUDGET: Final = 8
_PROMISE: Final = 1.05
_MIB: Final = 1 << 20


@dataclass(frozen=True)
class Pass:
    """The whole device once. MB are 10^6 bytes."""

    name: str
    seconds: float
    mb_per_s: float
    cpu_s_per_gib: float


def run(options: Options) -> Found:
    """Write, then verify; BenchError if a byte is wrong or a request fails."""
    size = options.budget * _DATA_PER_BUDGET
    host.need_memory((options.budget >> 30) + 1)
    with tempfile.TemporaryDirectory(prefix="nbdram-bench-") as directory:
        free = shutil.disk_usage(directory).free
        if free < size:
            raise BenchError(f"this needs {report.size(size)} in {directory}, there are {report.size(free)} free")
        swap = Path(directory) / "swap"
        server = Nbdram({DEFAULT_EXPORT: str(size)}, options.budget, more=("--swap", f"disk:{swap}"))
        swapped = _swapped_pages()
        with server:
            with Watch([server]) as watch:
                passes = [_pass(server, size, "write"), _pass(server, size, "verify")]
            stats = server.export_stats()
        swapped = _swapped_pages() - swapped
    head = ["the whole device", "s", "MB/s", "CPU s/GiB"]
    rows = [[p.name, f"{p.seconds:.0f}", f"{p.mb_per_s:.0f}", f"{p.cpu_s_per_gib:.2f}"] for p in passes]
    title = f"{report.size(size)} with --memory {report.size(options.budget)} and a disk, 64K at queue depth 32"
    print(report.table(title, head, rows), end="\n\n")
    tiers = {name: stats[name] for name in ("resident", "compressed", "compressed_from", "disk", "disk_from")}
    print("at the end: " + ", ".join(f"{name} {number / _MIB:.0f} MiB" for name, number in tiers.items()), end="\n\n")
    limits = [
        Check("most RAM held / budget", watch.most[server.name] / options.budget, _PROMISE),
        Check("pages that the host has swapped", swapped, 0),
        Check("damaged images", stats["integrity_errors"], 0),
    ]
    print(checks.table("Limits", limits))
    return {
        "passes": [asdict(one) for one in passes],
        "tiers": tiers,
        "limits": [asdict(limit) for limit in limits],
    }


def _pass(server: Nbdram, size: int, name: str) -> Pass:
    print(f"running {name}", file=sys.stderr)
    begun, cpu = time.monotonic(), server.cpu_s()
    fio.fill_or_verify(server.uri(), size, verify=name == "verify")
    seconds = time.monotonic() - begun
    return Pass(name, seconds, size / seconds / 1e6, (server.cpu_s() - cpu) / (size / (1 << 30)))


def _swapped_pages() -> int:
    counters = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(counters["pswpin"]) + int(counters["pswpout"])
