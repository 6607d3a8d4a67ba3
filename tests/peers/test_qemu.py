"""qemu-img and qemu-io: qemu's own block layer as a client, with images on exports and exports as images."""

import json
from pathlib import Path

import pytest

from .conftest import Serve
from .running import Extents, Server, output, pages_of, random_bytes, run, same_bytes, write_sparse

SIZE = 64 << 20
SCATTERED: Extents = [(0, 1), (65536, 70000), ((1 << 20) + 4096, 8 << 20), ((40 << 20) - 1, 2), (SIZE - 512, 512)]


@pytest.fixture
def disk(serve: Serve) -> Server:
    return serve("disk=64M")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    write_sparse(path, SIZE, SCATTERED)
    return path


def qemu_io(uri: str, *commands: str, options: tuple[str, ...] = ("-f", "raw")) -> str:
    said = output("qemu-io", *options, *(f"-c{command}" for command in commands), uri)
    assert "Pattern verification failed" not in said, said
    return said


def data_extents(uri: str) -> Extents:
    mapped = json.loads(output("qemu-img", "map", "--output=json", "-f", "raw", uri))
    assert all(extent["zero"] != extent["data"] for extent in mapped)
    return [(extent["start"], extent["length"]) for extent in mapped if extent["data"]]


# -- qemu-img ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [(), ("-W", "-m", "16"), ("--target-is-zero",), ("-S", "0")], ids=["plain", "16", "target-is-zero", "full"]
)
def test_a_converted_image_compares_and_comes_back(
    disk: Server, image: Path, tmp_path: Path, how: tuple[str, ...]
) -> None:
    run("qemu-img", "convert", "-n", *how, "-f", "raw", "-O", "raw", image, disk.uri())
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, disk.uri())
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", disk.uri(), tmp_path / "back")
    assert same_bytes(image, tmp_path / "back", SIZE)


def test_qemu_img_info_tells_size_and_protocol(disk: Server) -> None:
    told = json.loads(output("qemu-img", "info", "--output=json", disk.uri()))
    assert (told["virtual-size"], told["format"]) == (SIZE, "raw")


def test_the_map_agrees_with_what_was_written(disk: Server, image: Path) -> None:
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, disk.uri())
    mapped = data_extents(disk.uri())
    assert pages_of(mapped) == pages_of(SCATTERED) == pages_of(mapped + SCATTERED)
    assert disk.allocated_bytes() <= (pages_of(SCATTERED) + 2) * 4096  # two pages of the index


def test_compare_finds_one_changed_byte(disk: Server, image: Path) -> None:
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, disk.uri())
    qemu_io(disk.uri(), f"write -P 0xa5 {40 << 20} 1", f"write -P 0x5a {40 << 20} 1")
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, disk.uri(), code=1)


def test_a_qcow2_image_is_converted_onto_an_export_and_back(disk: Server, image: Path, tmp_path: Path) -> None:
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", image, tmp_path / "packed.qcow2")
    run("qemu-img", "convert", "-n", "-O", "raw", tmp_path / "packed.qcow2", disk.uri())
    run("qemu-img", "compare", "-F", "raw", tmp_path / "packed.qcow2", disk.uri())
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk.uri(), tmp_path / "back.qcow2")
    run("qemu-img", "compare", "-f", "raw", image, tmp_path / "back.qcow2")


def test_a_qcow2_image_lives_on_an_export(serve: Serve, image: Path) -> None:
    server = serve("disk=128M", tcp=True)
    run("qemu-img", "create", "-f", "qcow2", server.uri(), str(SIZE))
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", image, server.uri())
    run("qemu-img", "snapshot", "-c", "before", server.uri())
    qemu_io(server.uri(), "write -P 0x11 0 20M", "discard 1M 4M", "read -P 0x11 7M 13M", options=("-f", "qcow2"))
    run("qemu-img", "check", "-f", "qcow2", server.tcp_uri())
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", image, server.uri(), code=1)
    run("qemu-img", "snapshot", "-a", "before", server.tcp_uri())
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", image, server.uri())


def test_an_overlay_on_disk_has_an_export_as_its_backing_file(disk: Server, image: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.qcow2"
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, disk.uri())
    run("qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", disk.uri(), overlay)
    qemu_io(str(overlay), "write -P 0x77 12345 70001", options=("-f", "qcow2"))
    run("qemu-img", "commit", "-f", "qcow2", overlay)
    qemu_io(disk.uri(), "read -P 0x77 12345 70001")


def test_qemu_img_bench_writes_at_depth_64(disk: Server) -> None:
    how = ("-c", "3000", "-d", "64", "-s", "4096", "-w", "--pattern=0x3c", "--flush-interval=500")
    run("qemu-img", "bench", "-f", "raw", *how, disk.uri())
    qemu_io(disk.uri(), f"read -P 0x3c 0 {3000 * 4096}", f"read -P 0 {3000 * 4096} 1M")


# -- qemu-io -------------------------------------------------------------------------------------------


def test_unaligned_patterns_read_back(disk: Server) -> None:
    places = [(1, 1), (4095, 2), (65535, 4097), (1048575, 511), (2000001, 3000007), (SIZE - 4097, 4097)]
    qemu_io(disk.uri(), *(f"write -P {number + 1} {at} {length}" for number, (at, length) in enumerate(places)))
    qemu_io(disk.uri(), *(f"read -P {number + 1} {at} {length}" for number, (at, length) in enumerate(places)))
    qemu_io(disk.uri(), "read -P 0 0 1", "read -P 0 2 4093", "read -P 0 4097 61438", "read -P 0 5000008 1M")


def test_requests_of_32_mib_and_vectors_read_back(disk: Server) -> None:
    qemu_io(disk.uri(), "write -P 1 1 32M", "writev -P 2 40M 1000 5000 100001 2", "flush")
    qemu_io(disk.uri(), "read -P 1 1 32M", "readv -P 2 40M 106003", "read -P 0 0 1", "read -P 0 33554433 1M")


def test_write_z_keeps_memory_and_write_z_u_gives_it_back(disk: Server) -> None:
    unmap = ("-f", "raw", "-d", "unmap")
    qemu_io(disk.uri(), "write -P 9 0 8M", "write -z 0 4M", "read -P 0 0 4M", "read -P 9 4M 4M", options=unmap)
    assert disk.allocated_bytes() == (8 << 20) + 4096
    qemu_io(disk.uri(), "write -z -u 100 4M", "read -P 0 0 4194404", "read -P 9 4194404 1M", options=unmap)
    assert disk.allocated_bytes() == (4 << 20) + 2 * 4096  # the first page keeps its first 100 zeros
    qemu_io(disk.uri(), "write -z -u -n 0 64M", "read -P 0 0 64M", options=unmap)
    assert disk.allocated_bytes() == 0


def test_discard_gives_back_whole_pages_only(disk: Server) -> None:
    unmap = ("-f", "raw", "-d", "unmap")
    qemu_io(disk.uri(), "write -P 9 0 8M", "discard 1000 4M", "read -P 9 0 1000", options=unmap)
    assert data_extents(disk.uri()) == [(0, 4096), (4 << 20, 4 << 20)]
    qemu_io(disk.uri(), "discard 0 64M", "read -P 0 0 64M", options=unmap)
    assert disk.allocated_bytes() == 0


def test_batches_of_asynchronous_requests_read_back(disk: Server) -> None:
    lanes = [(number * 500003, 1 + number * 7919 % 300000) for number in range(60)]
    writes = [f"aio_write -q -P {number + 1} {at} {length}" for number, (at, length) in enumerate(lanes)]
    reads = [f"aio_read -q -P {number + 1} {at} {length}" for number, (at, length) in enumerate(lanes)]
    qemu_io(disk.uri(), *writes, "aio_flush", *reads, "aio_flush", "aio_write -q -z -u 0 30M", "aio_flush")
    qemu_io(disk.uri(), "read -P 0 0 30M", options=("-f", "raw", "-t", "none"))


def test_fua_writes_and_flushes_are_answered(disk: Server) -> None:
    qemu_io(disk.uri(), "write -f -P 3 777 70000", "flush", "write -z -f 800 10", "read -P 0 800 10", "read -P 3 810 9")
    qemu_io(disk.uri(), "write -P 4 0 512", "read -P 4 0 512", options=("-f", "raw", "-t", "writethrough"))


def test_a_read_only_export_opens_read_only(serve: Serve) -> None:
    server = serve("rom=1M,ro")
    run("qemu-io", "-f", "raw", "-c", "write 0 512", server.uri("rom"), code=1)
    qemu_io(server.uri("rom"), "read -P 0 0 1M", options=("-r", "-f", "raw"))


def test_a_raw_file_of_odd_length_is_written_where_it_belongs(disk: Server, tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(random_bytes(3_000_001))
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", tmp_path / "odd", disk.uri())
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", disk.uri(), tmp_path / "back")
    assert same_bytes(tmp_path / "odd", tmp_path / "back", 3_000_001)
