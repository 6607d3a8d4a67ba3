"""nbdcopy: files to exports and back, many requests on many connections, holes kept as holes."""

import os
from pathlib import Path

import pytest

from .conftest import Serve
from .running import PAGE, Extents, Server, pages_of, random_bytes, run, same_bytes, write_sparse

SIZE = 64 << 20
# Sizes and places that fit no page, no cluster and no request.
SCATTERED: Extents = [
    (1, 511),
    (8191, 3),
    (65536, 65536),
    ((1 << 20) - 1, (3 << 20) + 12345),
    ((32 << 20) - 5, 20 << 20),
    ((60 << 20) + 4096, 4096),
    (SIZE - 4097, 4097),
]


@pytest.fixture
def server(serve: Serve) -> Server:
    return serve("disk=64M")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    write_sparse(path, SIZE, SCATTERED)
    return path


@pytest.mark.parametrize(
    "how",
    [
        ("--connections=4", "--requests=64", "--flush"),
        ("--connections=1", "--synchronous"),
        ("--request-size=4096", "--requests=256"),
        ("--request-size=33554432", "--requests=8", "--queue-size=268435456"),
        ("--no-extents", "--sparse=0"),
    ],
    ids=["multi-conn", "synchronous", "4K", "32M", "no-holes"],
)
def test_a_copied_file_comes_back_the_same(server: Server, image: Path, tmp_path: Path, how: tuple[str, ...]) -> None:
    run("nbdcopy", *how, image, server.uri())
    run("nbdcopy", *how, server.uri(), tmp_path / "back")
    assert same_bytes(image, tmp_path / "back", SIZE)


def test_holes_of_a_file_cost_no_memory(server: Server, image: Path) -> None:
    run("nbdcopy", "--destination-is-zero", image, server.uri())
    index = pages_of((offset >> 13, max(1, length >> 13)) for offset, length in SCATTERED)
    assert server.allocated_bytes() == (pages_of(SCATTERED) + index) * PAGE


def test_holes_of_an_export_are_holes_of_the_file(server: Server, image: Path, tmp_path: Path) -> None:
    run("nbdcopy", image, server.uri())
    run("nbdcopy", server.uri(), tmp_path / "back")
    assert os.stat(tmp_path / "back").st_blocks * 512 < 2 * pages_of(SCATTERED) * PAGE


def test_copying_holes_over_data_gives_the_memory_back(server: Server, image: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    write_sparse(full, SIZE, [(0, 48 << 20)])
    run("nbdcopy", full, server.uri())
    run("nbdcopy", image, server.uri())
    run("nbdcopy", server.uri(), tmp_path / "back")
    assert same_bytes(image, tmp_path / "back", SIZE)
    assert server.allocated_bytes() <= (pages_of(SCATTERED) + 8) * PAGE


def test_allocated_keeps_zeros_in_memory(serve: Serve, tmp_path: Path) -> None:
    server = serve("disk=8M")
    write_sparse(tmp_path / "image", 8 << 20, [(100, 100)])
    run("nbdcopy", "--allocated", tmp_path / "image", server.uri())
    # The zeros in the WRITE that has the data in it were not asked to stay allocated.
    assert server.allocated_bytes() >= (8 << 20) - (128 << 10)
    run("nbdcopy", server.uri(), tmp_path / "back")
    assert same_bytes(tmp_path / "image", tmp_path / "back", 8 << 20)


def test_a_file_of_odd_length_fits_into_a_larger_export(server: Server, tmp_path: Path) -> None:
    length = (5 << 20) + 77
    (tmp_path / "odd").write_bytes(random_bytes(length))
    run("nbdcopy", tmp_path / "odd", server.uri())
    run("nbdcopy", server.uri(), tmp_path / "back")
    assert same_bytes(tmp_path / "odd", tmp_path / "back", length)
    assert server.allocated_bytes() == -(-length // PAGE) * PAGE + PAGE


def test_a_copy_between_exports_is_the_same_and_as_sparse(serve: Serve, image: Path, tmp_path: Path) -> None:
    server = serve("disk=64M", "copy=64M", tcp=True)
    run("nbdcopy", image, server.uri())
    before = server.allocated_bytes()
    run("nbdcopy", server.uri(), server.tcp_uri("copy"))
    assert server.allocated_bytes() == 2 * before
    run("nbdcopy", server.tcp_uri("copy"), tmp_path / "back")
    assert same_bytes(image, tmp_path / "back", SIZE)


def test_a_copy_between_servers_is_the_same(serve: Serve, image: Path, tmp_path: Path) -> None:
    one, other = serve("disk=64M"), serve("disk=64M")
    run("nbdcopy", image, one.uri())
    run("nbdcopy", one.uri(), other.uri())
    assert other.allocated_bytes() == one.allocated_bytes()
    run("nbdcopy", other.uri(), tmp_path / "back")
    assert same_bytes(image, tmp_path / "back", SIZE)


def test_a_stream_goes_in_and_out_of_an_export(serve: Serve) -> None:
    server = serve("disk=4M")
    data = random_bytes(4 << 20)
    run("nbdcopy", "--", "-", server.uri(), stdin=data)
    assert run("nbdcopy", "--", server.uri(), "-").stdout == data


def test_nbdcopy_can_not_write_to_a_read_only_export(serve: Serve, tmp_path: Path) -> None:
    server = serve("rom=1M,ro")
    (tmp_path / "image").write_bytes(random_bytes(1 << 20))
    run("nbdcopy", tmp_path / "image", server.uri("rom"), code=1)
    assert server.allocated_bytes() == 0
