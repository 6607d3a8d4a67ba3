"""One soak from start to end."""

import asyncio
import time
from pathlib import Path
from typing import Final

from tests.helpers import MIB, Running, running
from tests.memory.tiers.redis_cluster import cluster

from . import clients, samples
from .clients import Soak
from .samples import Sample

_WRITERS: Final = 6
_REGION: Final = 24 * MIB
# The process itself takes about half of it; the six regions alone are three times the rest.
_MEMORY: Final = "88M"
_DISK: Final = "24M"
_MOST_SAMPLES: Final = 360
_GRACE_S: Final = 60.0  # for short runs on a slow machine


async def soak(directory: Path, seconds: float, pause_s: float, csv: Path | None = None) -> str:
    """Run it; the report. Raises if anything was wrong."""
    with cluster(directory / "redis", 3) as remote:
        nodes = ",".join(node.address for node in remote.masters)
        options = [
            "--memory",
            _MEMORY,
            "--swap",
            f"disk:{directory / 'swap'},max={_DISK}",
            "--swap",
            f"redis://{nodes}",
        ]
        names = [f"busy{number}=1T{',density' if number % 2 else ''}" for number in range(_WRITERS)]
        names += ["probe=64M", "tools=12M"]
        exports = [word for name in names for word in ("--export", name)]
        async with running(directory, *options, *exports, uris=len(names)) as server:
            try:
                return await _soak(Soak(server, pause_s), seconds, csv)
            except BaseException as failure:
                if server.process.returncode is None:
                    server.process.terminate()
                end = await server.ended()
                failure.add_note(f"the server ended with {end.code} and said:\n{end.errors[-5000:]}")
                raise


async def _soak(run: Soak, seconds: float, csv: Path | None) -> str:
    began = time.monotonic()
    quiet = samples.take(run.server, began, [])
    taken: list[Sample] = []
    async with asyncio.TaskGroup() as group:
        for number in range(_WRITERS):
            group.create_task(clients.write(run, number, _REGION))
        group.create_task(clients.probe(run))
        group.create_task(clients.use_tools(run, run.server.directory))
        group.create_task(clients.come_and_go(run))
        group.create_task(clients.make_and_remove(run))
        while (left := began + seconds - time.monotonic()) > 0 or not samples.all_tiers(taken):
            assert left > -_GRACE_S, "not all tiers are in use"
            await asyncio.sleep(max(0.5, seconds / _MOST_SAMPLES))
            taken.append(await asyncio.to_thread(samples.take, run.server, began, run.latencies))
            if csv:
                samples.save(taken, csv)
        run.ended.set()
    await _nobody_left(run.server, quiet)
    samples.check(taken)
    return _report(run, taken, seconds)


async def _nobody_left(server: Running, quiet: Sample) -> None:
    """With its clients gone, the server has what it began with; but it keeps connections to the remote open."""
    async with asyncio.timeout(60):
        while (now := samples.take(server, 0.0, [])).connections or now.tasks > quiet.tasks + 2:
            await asyncio.sleep(0.1)
    # To each of three masters one to read, one to write and one to drop, and one for each of two processes; and more.
    assert now.files <= quiet.files + 20, f"{now.files} files are open, not {quiet.files}"


def _report(run: Soak, taken: list[Sample], seconds: float) -> str:
    visits = ", ".join(f"{kind} {count}" for kind, count in sorted(run.visits.items()))
    lines = [
        f"{seconds / 60:g} minutes, {_WRITERS} writers of {_REGION // MIB} MiB each, --memory {_MEMORY}, disk {_DISK}.",
        f"{run.requests} requests checked one by one, {run.verified_bytes >> 20} MiB compared as a whole.",
        f"Visits: {visits}.",
        "",
        samples.table(taken),
        "",
        "| | second quarter (median) | last quarter (median) |",
        "|---|---:|---:|",
    ]
    lines += [f"| {name} | {early:.2f} | {late:.2f} |" for name, (early, late) in samples.drift(taken).items()]
    return "\n".join(lines)
