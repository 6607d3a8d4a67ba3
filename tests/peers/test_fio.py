"""fio with its nbd engine: mixed sizes at depth, many connections, every block verified by its checksum."""

import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import Serve
from .running import Server, run

MIB = 1 << 20
VERIFIED = ("--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0", "--serialize_overlap=1")


def fio(directory: Path, uri: str, *options: str) -> list[Any]:
    """Run one fio job on an export; what it says of each of its processes, none of which had an error."""
    common = ["--name=job", "--ioengine=nbd", f"--uri={uri}", "--output-format=json", "--output=fio.json"]
    run("fio", *common, "--randseed=7", "--eta=never", *options, cwd=directory)
    jobs = json.loads((directory / "fio.json").read_text())["jobs"]
    assert [job["error"] for job in jobs] == [0] * len(jobs)
    return list(jobs)


def transferred(jobs: list[Any], direction: str) -> int:
    return sum(job[direction]["io_bytes"] for job in jobs)


MIXED = ("--rw=randwrite", "--bsrange=512-256k", "--iodepth=32", "--size=12M")


@pytest.mark.parametrize("alignment", [(), ("--bs_unaligned=1",)], ids=["sectors", "bytes"])
def test_four_jobs_at_depth_32_find_every_block_of_mixed_sizes(
    server: Server, tmp_path: Path, alignment: tuple[str, ...]
) -> None:
    jobs = fio(tmp_path, server.uri(), *MIXED, *alignment, *VERIFIED, "--numjobs=4", "--offset_increment=24M")
    assert len(jobs) == 4
    assert transferred(jobs, "read") >= transferred(jobs, "write") >= 4 * 11 * MIB


def test_the_same_over_tcp(serve: Serve, tmp_path: Path) -> None:
    server = serve("disk=128M", tcp=True)
    jobs = fio(tmp_path, server.tcp_uri(), *MIXED, *VERIFIED, "--numjobs=4", "--offset_increment=24M")
    assert transferred(jobs, "read") >= 4 * 11 * MIB


@pytest.mark.parametrize(("size", "depth"), [("512", 64), ("4k", 128), ("64k", 32), ("1m", 8), ("32m", 4)])
def test_blocks_of_one_size_are_verified(server: Server, tmp_path: Path, size: str, depth: int) -> None:
    total = {"512": "2M", "4k": "16M"}.get(size, "128M")
    jobs = fio(
        tmp_path, server.uri(), "--rw=randwrite", f"--bs={size}", f"--iodepth={depth}", f"--size={total}", *VERIFIED
    )
    assert transferred(jobs, "read") == transferred(jobs, "write") > 0


def test_reads_and_writes_mix_while_others_do_too(server: Server, tmp_path: Path) -> None:
    how = ("--rw=randrw", "--rwmixread=60", "--bsrange=4k-64k", "--iodepth=32", "--size=32M")
    jobs = fio(tmp_path, server.uri(), *how, *VERIFIED, "--numjobs=4", "--offset_increment=32M")
    assert transferred(jobs, "write") > 32 * MIB


def test_random_trims_of_every_block_give_all_memory_back(server: Server, tmp_path: Path) -> None:
    fio(tmp_path, server.uri(), "--rw=write", "--bs=1m", "--iodepth=4", "--size=64M")
    assert server.allocated_bytes() >= 64 * MIB
    jobs = fio(tmp_path, server.uri(), "--rw=randtrim", "--bs=64k", "--iodepth=32", "--size=64M")
    assert transferred(jobs, "trim") == 64 * MIB
    assert server.allocated_bytes() == 0


def test_blocks_trimmed_and_written_again_are_verified(server: Server, tmp_path: Path) -> None:
    how = ("--rw=trimwrite", "--bs=4k", "--iodepth=32", "--size=8M", "--numjobs=4", "--offset_increment=16M")
    jobs = fio(tmp_path, server.uri(), *how, *VERIFIED)
    assert transferred(jobs, "trim") == transferred(jobs, "write") == transferred(jobs, "read") == 32 * MIB


def test_verification_would_notice_a_wrong_byte(server: Server, tmp_path: Path) -> None:
    """The check of the checks: a byte that was changed behind fio's back fails the run."""
    fio(tmp_path, server.uri(), "--rw=write", "--bs=4k", "--size=1M", *VERIFIED)
    server.script("h.pwrite(b'!', 500003)")
    common = ("--name=job", "--ioengine=nbd", f"--uri={server.uri()}", "--rw=read", "--bs=4k", "--size=1M")
    run("fio", *common, "--randseed=7", "--verify=crc32c", "--verify_fatal=1", cwd=tmp_path, code=1)
