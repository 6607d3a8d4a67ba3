"""Real clients on a server that is short of memory: clusters go cold and come back under their hands."""

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Serve
from .running import Server, run
from .test_fio import VERIFIED, fio
from .test_nbdinfo import extents_of

MIB = 1 << 20


Squeezed = Callable[..., Server]


@pytest.fixture
def squeezed(serve: Serve) -> Squeezed:
    """Starts a server that has so many MiB for what clients write, whatever the process itself takes."""
    overhead = serve("probe=1M").private_bytes()

    def start(mib: int, export: str, *options: str) -> Server:
        return serve(export, memory=str(overhead + mib * MIB), options=options)

    return start


def test_twice_as_much_as_memory_holds_is_kept_compressed(squeezed: Squeezed, tmp_path: Path) -> None:
    server = squeezed(32, "disk=64M")
    (tmp_path / "image").write_bytes(b"".join(b"%07d\n" % number * 64 for number in range(64 * MIB // 512)))
    run("nbdcopy", tmp_path / "image", server.uri())
    assert server.allocated_bytes() <= 32 * MIB
    assert 2 in {tier for _, _, tier in extents_of(server.uri(), "x-nbdram:tier")}
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", tmp_path / "image", server.uri())
    run("nbdcopy", server.uri(), tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "image").read_bytes()


@pytest.mark.parametrize(
    ("mib", "export", "swap"), [(26, "disk=64M", False), (26, "disk=64M,density", False), (16, "disk=64M", True)]
)
def test_no_write_is_lost_while_clusters_are_reclaimed(
    squeezed: Squeezed, tmp_path: Path, mib: int, export: str, swap: bool
) -> None:
    """Whole and partial overwrites and reads of clusters, a quarter of each incompressible, against a model."""
    server = squeezed(mib, export, *(("--swap", f"disk:{tmp_path}") if swap else ()))
    server.script("""
        import time
        chance, model, number, until = random.Random(5), {}, 0, time.monotonic() + 2
        raw = [noise(16384, seed) for seed in range(16)]
        busy = chance.sample(range(1024), 64)
        peers = [connect() for _ in range(4)]
        while time.monotonic() < until:
            clusters = {chance.choice(busy) if chance.random() < 0.7 else chance.randrange(1024) for _ in range(32)}
            expected = []
            for turn, cluster in enumerate(clusters):
                peer, at = peers[turn % 4], cluster * 65536
                old = model.get(cluster, bytes(65536))
                if chance.random() < 0.6:
                    number += 1
                    new = number.to_bytes(8, "big") + raw[number % 16][16:] + number.to_bytes(8, "big") * 6145
                    start, end = sorted(chance.sample(range(65537), 2)) if number % 2 else (0, 65536)
                    model[cluster] = old[:start] + new[start:end] + old[end:]
                    peer.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(new[start:end])), at + start)
                else:
                    buffer = nbd.Buffer(65536)
                    peer.aio_pread(buffer, at)
                    expected.append((cluster, buffer, old))
            for peer in peers:
                finish(peer, [])
            for cluster, buffer, content in expected:
                assert buffer.to_bytearray() == content, f"cluster {cluster} is not what was written"
        for cluster, content in model.items():
            assert h.pread(65536, cluster * 65536) == content, f"cluster {cluster} is not what was written"
    """)


def test_a_reply_that_waits_is_old_or_new_but_never_what_was_dropped(squeezed: Squeezed) -> None:
    """READs of cold clusters in one segment, by a client that takes no reply until they are overwritten.

    Three quarters of each cluster do not compress, so that they are sent out of the image as they are.
    """
    server = squeezed(48, "disk=256M")
    server.script("""
        import socket, struct
        h = connect("x-nbdram:tier")
        def old(cluster):
            return noise(49152, cluster) + bytes([1 + cluster % 255]) * 16384
        for cluster in range(128):
            h.pwrite(old(cluster), cluster * 65536)
        for at in range(16 * MIB, 160 * MIB, MIB):
            h.pwrite(b"filler" * (MIB // 6), at)
        cold = [at for at in range(128) if extents(h, 65536, at * 65536, "x-nbdram:tier") == [(65536, 2)]]
        assert len(cold) > 100
        slow = socket.socket(socket.AF_UNIX)
        slow.connect(uri.partition("socket=")[2])
        slow.sendall(struct.pack(">IQII", 3, 0x49484156454F5054, 1, 4) + b"disk")
        slow.recv(28, socket.MSG_WAITALL)
        slow.sendall(b"".join(struct.pack(">IHHQQI", 0x25609513, 0, 0, 0, at * 65536, 65536) for at in cold))
        h.pread(1, 200 * MIB)  # so that the server has seen them
        new = b"new!" * 16384
        for cluster in cold:
            h.pwrite(new, cluster * 65536)
        for cluster in cold:
            slow.recv(16, socket.MSG_WAITALL)
            content = slow.recv(65536, socket.MSG_WAITALL)
            assert content in (old(cluster), new), f"cluster {cluster} is neither old nor new"
    """)


def test_fio_verifies_more_than_memory_holds(squeezed: Squeezed, tmp_path: Path) -> None:
    server = squeezed(32, "disk=64M")
    how = ("--rw=randwrite", "--bsrange=4k-128k", "--iodepth=16", "--size=16M", "--numjobs=4", "--offset_increment=16M")
    jobs = fio(tmp_path, server.uri(), *how, *VERIFIED, "--verify_pattern=0x6e62647261", "--verify_interval=4096")
    assert len(jobs) == 4
    assert server.allocated_bytes() < 40 * MIB


def test_fio_verifies_random_data_four_times_as_large_as_memory_with_a_disk(squeezed: Squeezed, tmp_path: Path) -> None:
    server = squeezed(16, "disk=64M", "--swap", f"disk:{tmp_path}")
    how = ("--rw=randwrite", "--bsrange=4k-128k", "--iodepth=16", "--size=16M", "--numjobs=4", "--offset_increment=16M")
    jobs = fio(tmp_path, server.uri(), *how, *VERIFIED)
    assert len(jobs) == 4
    assert 3 in {tier for _, _, tier in extents_of(server.uri(), "x-nbdram:tier")}
    assert server.allocated_bytes() < 24 * MIB


def test_a_full_budget_is_enospc_and_trimming_makes_room(squeezed: Squeezed) -> None:
    server = squeezed(16, "disk=1G", "--write-wait", "3600")  # nobody waits where there is nothing to wait for
    server.script("""
        data = noise(MIB)
        for at in range(0, 8 * MIB, MIB):
            h.pwrite(data, at)
        for length in PAGE, MIB, 16 * MIB:
            refused(errno.ENOSPC, lambda: [h.pwrite(noise(length, n), 64 * MIB + n * length) for n in range(5000)])
        for at in range(0, 8 * MIB, MIB):
            assert h.pread(MIB, at) == data
        h.trim(512 * MIB, 64 * MIB)
        h.pwrite(data, 100 * MIB)
        assert h.pread(MIB, 100 * MIB) == data
    """)


def test_allocated_zeros_are_reclaimed_and_do_not_fill_memory(squeezed: Squeezed, tmp_path: Path) -> None:
    server = squeezed(32, "disk=128M")
    with (tmp_path / "zeros").open("wb") as file:
        file.truncate(128 * MIB)
    run("nbdcopy", "--allocated", tmp_path / "zeros", server.uri())
    assert server.allocated_bytes() <= 32 * MIB
