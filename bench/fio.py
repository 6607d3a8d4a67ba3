"""One fio job against one server, through fio's nbd engine; what came out of it."""

import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.errors import BenchError

_GRACE_S: Final = 60.0  # on top of a job's own time, until fio counts as hung
_FILL_TIMEOUT_S: Final = 300.0
_LEAST_BYTES_PER_S: Final = 20e6


@dataclass(frozen=True)
class Job:
    """What fio is to do. `rw`, `block` and `span` are in its words; `span` starts at offset 0."""

    name: str
    rw: str
    block: str
    depth: int
    connections: int = 1  # each with its own `depth`
    span: str = "1g"
    options: tuple[str, ...] = ()

    @property
    def is_bulk(self) -> bool:
        """Whether MB/s say more about it than operations per second."""
        return self.block != "4k"


@dataclass(frozen=True)
class Outcome:
    """What fio saw. Latencies are from submission to completion, reads and writes together."""

    operations: int
    operations_per_s: float
    bytes_per_s: float
    p50_us: float
    p99_us: float
    p999_us: float
    max_us: float
    client_cores: float  # CPU time of fio per second of the job: 1.0 is one core full


def run(job: Job, uri: str, seconds: float, home: str = "") -> Outcome:
    """Run `job` for that long. libnbd looks in `home`, if there is one, for its certificates."""
    arguments = [
        f"--rw={job.rw}",
        f"--bs={job.block}",
        f"--iodepth={job.depth}",
        f"--numjobs={job.connections}",
        "--group_reporting=1",
        f"--size={job.span}",
        "--norandommap=1",  # no bitmap of blocks seen: fio has enough to do
        "--time_based",
        f"--runtime={seconds * 1000:.0f}ms",
        *job.options,
    ]
    return _outcome(job, _fio(job.name, uri, arguments, seconds + _GRACE_S, home))


def fill(uri: str, span: str = "1g") -> None:
    """Write the first `span` once, with data of which about half can be compressed away.

    fio's random seeds are fixed: each server gets the same bytes.
    """
    arguments = [
        "--rw=write",
        "--bs=1m",
        "--iodepth=16",
        f"--size={span}",
        "--refill_buffers=1",
        "--buffer_compress_percentage=50",
    ]
    _fio("fill", uri, arguments, _FILL_TIMEOUT_S)


def fill_or_verify(uri: str, size: int, *, verify: bool) -> None:
    """Write the first `size` bytes with checksums in them, half of it compressible; or read and verify all of it."""
    arguments = [
        "--rw=" + ("read" if verify else "write"),
        "--bs=64k",  # so that half of each cluster can be compressed away: fio fills the first half of a block
        "--iodepth=32",
        f"--size={size}",
        "--verify=crc32c",
        f"--do_verify={verify:d}",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--refill_buffers=1",
        "--buffer_compress_percentage=50",
    ]
    _fio("verify" if verify else "fill", uri, arguments, _GRACE_S + size / _LEAST_BYTES_PER_S)


def write_on(uri: str, span: str, rate_mib: int, seconds: float) -> None:
    """Write here and there in the first `span`, so many MiB/s, data of which about half can be compressed away."""
    arguments = [
        *("--rw=randwrite", "--bs=64k", "--iodepth=4", f"--size={span}", f"--rate={rate_mib}m", "--randrepeat=0"),
        *("--time_based", f"--runtime={seconds * 1000:.0f}ms"),
        *("--refill_buffers=1", "--buffer_compress_percentage=50"),
    ]
    _fio("write on", uri, arguments, seconds + _GRACE_S)


def _fio(name: str, uri: str, arguments: list[str], limit_s: float, home: str = "") -> dict[str, Any]:
    """The JSON of fio's only job, or group of jobs."""
    if not shutil.which("fio"):
        raise BenchError("fio is not installed")
    with tempfile.TemporaryDirectory(prefix="nbdram-bench-") as directory:
        report = Path(directory) / "report"
        command = [
            "fio",
            f"--name={name}",
            "--ioengine=nbd",
            f"--uri={uri}",
            "--thread",  # one process: nothing is left behind if it has to be killed
            "--unified_rw_reporting=mixed",
            "--lat_percentiles=1",
            "--clat_percentiles=0",
            "--percentile_list=50:99:99.9",
            "--eta=never",
            "--output-format=json",
            f"--output={report}",
            *arguments,
        ]
        try:
            environment = {**os.environ, "HOME": home} if home else None
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=environment)
        except subprocess.TimeoutExpired:
            raise BenchError(f"fio did not finish {name!r} within {limit_s:.0f} s") from None
        text = report.read_text() if report.exists() else ""
    # The nbd engine greets in the report ("fio: connected to NBD server"), before the JSON.
    brace = text.find("{")
    if done.returncode or brace < 0:
        said = (done.stderr.strip() or text.strip())[:1000]
        raise BenchError(f"fio failed at {name!r} (code {done.returncode}): {said}")
    found: dict[str, Any] = json.loads(text[brace:])["jobs"][0]
    if found["error"]:
        raise BenchError(f"fio failed at {name!r}: error {found['error']}")
    return found


def _outcome(job: Job, found: dict[str, Any]) -> Outcome:
    total = found["mixed"]
    percentile = total["lat_ns"]["percentile"]
    return Outcome(
        operations=total["total_ios"],
        operations_per_s=total["iops"],
        bytes_per_s=total["bw_bytes"],
        p50_us=percentile["50.000000"] / 1000,
        p99_us=percentile["99.000000"] / 1000,
        p999_us=percentile["99.900000"] / 1000,
        max_us=total["lat_ns"]["max"] / 1000,
        client_cores=(found["usr_cpu"] + found["sys_cpu"]) / 100 * job.connections,
    )
