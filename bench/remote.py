"""Cold data in RAM, on disk and in a Redis cluster on loopback: faults, demotion, and what a lost master costs.

Three masters and three replicas, the server and fio share the cores of this machine: with the cluster elsewhere the
server has them for itself, and the network comes on top.
"""

import asyncio
import itertools
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import uvloop

from bench import fio, proc, report
from bench.fio import Job, Outcome
from bench.options import Found, Options
from bench.servers import DEFAULT_EXPORT, Server, socket_in
from nbdram.errors import NbdramError
from nbdram.memory.budget import Budget
from nbdram.memory.packer import Packers
from nbdram.memory.reclaim import Reclaimer, anonymous_bytes
from nbdram.memory.tiers.remote import Remote
from nbdram.observe.control import ask
from nbdram.server.exports import Exports
from tests.memory.tiers.redis_cluster import HASTY_MS, Cluster, cluster, is_master

_MIB: Final = 1 << 20
_CLUSTER: Final = 64 << 10
_DATA: Final = 512  # MiB
_DEMOTED: Final = 832  # MiB
_LEFT: Final = 320  # MiB that stay in RAM: so much that two processes compress
_DEPTHS: Final = (1, 16)
_SERVED: Final = 64  # MiB that a client reads while the others are demoted
_COLD: Final = 512  # MiB that are written meanwhile, over and over; half can be compressed away
_WRITTEN: Final = (16, 64)  # MiB/s
_RAMP_S: Final = 1
_RESIDENT_JOBS: Final = (
    Job("4K randread QD64", "randread", "4k", 64, span=f"{_SERVED}m"),
    Job("4K randread QD1", "randread", "4k", 1, span=f"{_SERVED}m"),
    Job("256K read QD16", "read", "256k", 16, span=f"{_SERVED}m"),
)


@dataclass(frozen=True)
class Faults:
    """4K reads of cold data at one depth; times in microseconds."""

    tier: str
    depth: int
    per_s: float
    p50_us: float
    p99_us: float
    cold_share: float  # of the reads that had to ask the tier


def run(options: Options) -> Found:
    parts: Mapping[str, Callable[[Path, Options], Found]] = {
        "tiers": tiers,
        "demotion": demotion,
        "resident": resident,
        "failover": failover,
    }
    found = {}
    with tempfile.TemporaryDirectory(prefix="nbdram-bench-") as directory:
        for name, part in parts.items():
            if re.search(options.only, name, re.IGNORECASE):
                print(f"running {name}", file=sys.stderr)
                found[name] = part(Path(directory) / name, options)
    return found


# -- faults, tier by tier ----------------------------------------------------------------------------


def tiers(directory: Path, options: Options) -> Found:
    """The same data, cold in each tier in turn; half of it is compressed away."""
    directory.mkdir()
    rows, found = [], []
    with cluster(directory / "redis", 3, 3) as servers:
        url = f"redis://{','.join(node.address for node in servers.nodes)}"
        swaps = {"compressed": ("400M",), "disk": ("96M", f"disk:{directory / 'swap'}"), "remote": ("96M", url)}
        for tier, (memory, *swap) in swaps.items():
            with _nbdram(memory, swap) as server:
                fio.fill(server.uri(), f"{_DATA}m")
                ram = _ram_per_gib(_stats(server), tier)
                for depth in _DEPTHS:
                    faults = _faults(server, tier, depth, options.seconds)
                    found.append(asdict(faults) | {"ram_bytes_per_gib": ram})
                    rows.append(
                        [
                            *(tier, str(depth), f"{faults.per_s:.0f}", report.microseconds(faults.p50_us)),
                            *(report.microseconds(faults.p99_us), f"{100 * faults.cold_share:.0f} %"),
                            report.size(ram),
                        ]
                    )
    head = ["tier", "depth", "4K reads/s", "p50 us", "p99 us", "cold", "RAM per GiB"]
    print(report.table("Reads of cold data (the latency of the request, as fio saw it)", head, rows))
    return {"faults": found}


def _nbdram(memory: str, swap: list[str], *exports: str) -> Server:
    def argv(directory: Path) -> list[str]:
        command = [sys.executable, "-m", "nbdram", "serve", "--memory", memory]
        command += [word for one in (f"{DEFAULT_EXPORT}=4G", *exports) for word in ("--export", one)]
        command += ["--listen", f"unix:{socket_in(directory)}", "--control", str(directory / "control")]
        return command + [word for one in swap for word in ("--swap", one)] + ["--metrics", "off"]

    return Server("nbdram", argv, announces="nbd+unix://")


def _stats(server: Server) -> Any:
    return ask(server.directory / "control", "stats")


def _faults(server: Server, tier: str, depth: int, seconds: float) -> Faults:
    key = {"compressed": "ram"}.get(tier, tier)
    before = _stats(server)
    job = Job(f"4K read QD{depth}", "randread", "4k", depth, span=f"{_DATA}m", options=("--randrepeat=0",))
    outcome = fio.run(job, server.uri(), seconds)
    after = _stats(server)
    asked = after["faults"][key] - before["faults"][key]
    share = min(1.0, asked / outcome.operations)
    return Faults(tier, depth, outcome.operations_per_s, outcome.p50_us, outcome.p99_us, share)


def _ram_per_gib(stats: Any, tier: str) -> float:
    """What a GiB of data that is cold in a tier takes of RAM: its words, its references, and what the tier keeps."""
    index = 8 + 1 + (16 if tier == "remote" else 0)
    images = 0.0
    if tier == "compressed":
        export = stats["exports"][0]
        images = export["compressed"] / export["compressed_from"]
    return (1 << 30) * (images + index / _CLUSTER)


# -- demotion ----------------------------------------------------------------------------------------


def demotion(directory: Path, options: Options) -> Found:
    """Reclaim's whole way: victims, images, seals, the network, pages given back."""
    rows, found = [], {}
    for replicas in (0, 3):
        with cluster(directory / str(replicas), 3, replicas) as servers:
            for name, incompressible in (("incompressible", 1.0), ("half of it compresses", 0.5)):
                rounds = []
                for _ in range(options.rounds):
                    rounds.append(uvloop.run(_demote(servers, incompressible)))
                    servers.empty()
                found[f"{name}, {replicas} replicas"] = rounds
                stored = sorted(one["stored_per_s"] / 1e6 for one in rounds)
                content, cores = (statistics.median(one[key] for one in rounds) for key in ("content_per_s", "cores"))
                cells = [
                    f"{statistics.median(stored):.0f}",
                    f"{stored[0]:.0f}-{stored[-1]:.0f}",
                    f"{content / 1e6:.0f}",
                ]
                rows.append([f"{name}, {replicas} replicas", *cells, f"{cores:.2f}"])
    head = ["data", "stored MB/s", "range", "content MB/s", "cores of the server"]
    print(report.table("Demotion to three masters on loopback, medians of the rounds", head, rows))
    return found


async def _demote(servers: Cluster, incompressible: float) -> dict[str, float]:
    remote = Remote(servers.settings)
    budget = Budget(2 * _DEMOTED * _MIB + 256 * _MIB)
    exports = Exports(budget, remote=remote)
    device = exports.create(DEFAULT_EXPORT, 4 << 30).device
    noise = os.urandom(_CLUSTER)
    kept = int(_CLUSTER * incompressible)
    for at in range(_DEMOTED * _MIB // _CLUSTER):
        mark = b"%016d" % at
        device.write(at * _CLUSTER, mark + noise[16:kept] + mark * ((_CLUSTER - kept) // 16))
    packers = Packers()
    reclaimer = Reclaimer(budget, exports.devices, packers)
    reclaimer.start()
    for packer in packers:
        packer.start()
    while not all(packer.is_ready and remote.writes.is_connected(packer) for packer in packers):
        await asyncio.sleep(0.01)

    def cpu_s() -> float:
        return time.process_time() + sum(proc.cpu_s(packer.pid) for packer in packers if packer.pid)

    begun, cpu = time.perf_counter(), cpu_s()
    budget.set_limit(anonymous_bytes() + _LEFT * _MIB)
    while budget.free_pages < budget.stop_above:
        budget.take(0)  # as every write does: it wakes reclaim
        await asyncio.sleep(0.005)
    seconds, cpu = time.perf_counter() - begun, cpu_s() - cpu
    figures = {
        "stored_per_s": remote.stored_bytes / seconds,
        "content_per_s": remote.stored_images * _CLUSTER / seconds,
        "cores": cpu / seconds,
    }
    await reclaimer.stop()
    exports.close()
    remote.close()
    return figures


# -- serving what is resident, meanwhile --------------------------------------------------------------


def resident(directory: Path, options: Options) -> Found:
    """What a client gets of resident data while another one writes, with memory for that and without: then as much is
    demoted as is written."""
    directory.mkdir()
    rows, found = [], []
    with cluster(directory / "redis", 3, 0) as servers:
        url = f"redis://{','.join(node.address for node in servers.nodes)}"
        with _nbdram("6G", [], "cold=4G") as roomy, _nbdram("256M", [url], "cold=4G") as tight:
            for server in (roomy, tight):
                fio.fill(server.uri("cold"), f"{_COLD}m")
            for job, rate in itertools.product(_RESIDENT_JOBS, _WRITTEN):
                rounds = [_one_round(roomy, tight, job, rate, options.seconds) for _ in range(options.rounds)]
                found.append({"job": job.name, "written_per_s": rate * _MIB, "rounds": rounds})
                middle = sorted(rounds, key=lambda one: one["share"])[len(rounds) // 2]
                cells = [f"{middle[key]:.0f}" for key in ("quiet_per_s", "busy_per_s")] + [f"{middle['share']:.2f}"]
                p99s = [report.microseconds(middle[key]) for key in ("quiet_p99_us", "busy_p99_us")]
                rows.append([job.name, str(rate), *cells, *p99s, f"{middle['demoted_per_s'] / 1e6:.0f}"])
    head = ["job", "written MB/s", "quiet/s", "demoting/s", "share", "p99 us", "p99 us demoting", "demoted MB/s"]
    print(report.table("Serving resident data while other data is demoted (median by share)", head, rows))
    return {"resident": found}


def _one_round(roomy: Server, tight: Server, job: Job, rate: int, seconds: float) -> dict[str, float]:
    quiet, _ = _beside_a_writer(roomy, job, rate, seconds)
    busy, demoted = _beside_a_writer(tight, job, rate, seconds)
    return {
        "quiet_per_s": quiet.operations_per_s,
        "busy_per_s": busy.operations_per_s,
        "share": busy.operations_per_s / quiet.operations_per_s,
        "quiet_p99_us": quiet.p99_us,
        "busy_p99_us": busy.p99_us,
        "demoted_per_s": demoted,
    }


def _beside_a_writer(server: Server, job: Job, rate: int, seconds: float) -> tuple[Outcome, float]:
    """The job on data that is resident, and how many bytes a second were demoted meanwhile.

    fio begins before what it measures: what is read all the time is not demoted.
    """
    fio.fill(server.uri(), f"{_SERVED}m")
    seconds_in_all = seconds + _RAMP_S
    writing = threading.Thread(target=fio.write_on, args=(server.uri("cold"), f"{_COLD}m", rate, seconds_in_all))
    before, begun = _stats(server), time.perf_counter()
    writing.start()
    outcome = fio.run(replace(job, options=(f"--ramp_time={_RAMP_S}s",)), server.uri(), seconds)
    after, took = _stats(server), time.perf_counter() - begun
    writing.join()
    faults = sum(after["faults"][tier] - before["faults"][tier] for tier in ("ram", "disk", "remote"))
    print(f"    {faults} faults in {outcome.operations} operations and those before", file=sys.stderr)
    return outcome, (after["reclaim"]["demoted"] - before["reclaim"]["demoted"]) * _CLUSTER / took


# -- a master is killed ------------------------------------------------------------------------------


def failover(directory: Path, options: Options) -> Found:
    """How long after a master was killed its images can be read again, and when the cluster had a new one."""
    rows, found = [], []
    for number in range(min(3, options.rounds)):
        with cluster(directory / str(number), 3, 3, failover_ms=HASTY_MS) as servers:
            figures = _fail_over(servers)
        found.append(figures)
        rows.append([f"{figures[key]:.2f}" for key in ("cluster_s", "resumed_s")] + [f"{figures['lost']:.0f}"])
    head = ["cluster failed over, s", "reads resumed, s", "acknowledged images lost"]
    print(report.table(f"A master is killed (node timeout {HASTY_MS} ms, replicas=1)", head, rows, left=0))
    return {"failover": found}


def _fail_over(servers: Cluster) -> dict[str, float]:
    remote = Remote(replace(servers.settings, replicas=1, wait_s=60))
    exports = Exports(Budget(256 * _MIB), remote=remote)
    tier = exports.create(DEFAULT_EXPORT, 4 << 30).device.remote
    assert tier
    ending = threading.Event()
    stored: dict[int, bytes] = {}

    def store_on() -> None:
        at = 0
        while not ending.is_set():
            image = os.urandom(32 << 10)
            try:
                tier.store(at, 0, image)
            except OSError:
                continue
            stored[at] = image
            at += 1

    storing = threading.Thread(target=store_on, daemon=True)
    storing.start()
    time.sleep(1)
    victim = servers.masters[0]
    mine = next(at for at in list(stored) if servers.owner(tier.key(at, 0)) is victim)
    victim.kill()
    begun = time.perf_counter()
    failed_over = threading.Event()
    took = [0.0]

    def watch() -> None:
        while not is_master(servers.replicas[0]):
            time.sleep(0.005)
        took[0] = time.perf_counter() - begun
        failed_over.set()

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    tier.fetch(mine, 0, len(stored[mine])).result()
    resumed = time.perf_counter() - begun
    failed_over.wait(60)
    time.sleep(0.5)
    ending.set()
    storing.join()
    lost = sum(not _is_there(tier, at, image) for at, image in stored.items())
    exports.close()
    remote.close()
    return {"cluster_s": took[0], "resumed_s": resumed, "lost": lost, "stored": len(stored)}


def _is_there(tier: Any, at: int, image: bytes) -> bool:
    try:
        return bool(tier.load(at, 0, len(image)) == image)
    except (OSError, NbdramError):
        return False
