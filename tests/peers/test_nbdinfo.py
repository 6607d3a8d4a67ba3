"""nbdinfo: what a server says about itself, its exports and their extents."""

import json
from typing import Any
from uuid import UUID

import pytest

from .conftest import Serve
from .running import Server, output, run

NO = 2  # nbdinfo --can and --is: 0 is yes


def extents_of(uri: str, context: str = "base:allocation") -> list[tuple[int, int, int]]:
    """(offset, length, status) as nbdinfo tells them."""
    listed = json.loads(output("nbdinfo", f"--map={context}", "--json", uri))
    return [(extent["offset"], extent["length"], extent["type"]) for extent in listed]


def export_of(uri: str) -> Any:
    (export,) = json.loads(output("nbdinfo", "--json", uri))["exports"]
    return export


def test_nbdinfo_tells_the_size(server: Server) -> None:
    assert output("nbdinfo", "--size", server.uri()) == f"{128 << 20}\n"


def test_nbdinfo_finds_every_ability(server: Server) -> None:
    for ability in ("cache", "df", "fast-zero", "flush", "fua", "multi-conn", "trim", "write", "zero"):
        run("nbdinfo", "--can", ability, server.uri())
    run("nbdinfo", "--can", "structured-reply", server.uri())
    for property_ in ("read-only", "rotational", "tls"):
        run("nbdinfo", "--is", property_, server.uri(), code=NO)


def test_nbdinfo_sees_a_read_only_export(serve: Serve) -> None:
    server = serve("rom=1M,ro")
    run("nbdinfo", "--is", "read-only", server.uri("rom"))
    run("nbdinfo", "--can", "write", server.uri("rom"), code=NO)


def test_nbdinfo_tells_description_block_sizes_and_contexts(serve: Serve) -> None:
    export = export_of(serve("disk=1M,description=for builds, and tests").uri())
    assert export["description"] == "for builds, and tests"
    *contexts, identity = export["contexts"]
    assert contexts == ["base:allocation", "x-nbdram:tier"]
    assert UUID(identity.removeprefix("x-nbdram:id="))
    sizes = [export[f"block_size_{which}"] for which in ("minimum", "preferred", "maximum")]
    assert sizes == [1, 4096, 32 << 20]


def test_nbdinfo_lists_all_exports_in_order(serve: Serve) -> None:
    server = serve("first=1M,description=one", "Größe 2=2M,ro", "third=1T")
    listed = json.loads(output("nbdinfo", "--list", "--json", server.uri("")))["exports"]
    names = [(export["export-name"], export["export-size"], export["is_read_only"]) for export in listed]
    assert names == [("first", 1 << 20, False), ("Größe 2", 2 << 20, True), ("third", 1 << 40, False)]


def test_no_name_means_the_first_export(serve: Serve) -> None:
    assert output("nbdinfo", "--size", serve("first=1M", "second=2M").uri("")) == f"{1 << 20}\n"


def test_an_unknown_name_is_refused_and_others_are_served(server: Server) -> None:
    for name in ("nobody", "x" * 4096, "disk "):
        run("nbdinfo", server.uri(name), code=1)
    run("nbdinfo", server.uri())


def test_tcp_and_unix_serve_the_same_export(serve: Serve) -> None:
    server = serve("disk=1M", tcp=True)
    run("qemu-io", "-f", "raw", "-c", "write -P 7 0 4096", server.tcp_uri())
    assert extents_of(server.tcp_uri()) == extents_of(server.uri()) == [(0, 4096, 0), (4096, (1 << 20) - 4096, 3)]


@pytest.mark.parametrize(("context", "hole", "data"), [("base:allocation", 3, 0), ("x-nbdram:tier", 0, 1)])
def test_the_map_shows_the_pages_that_were_written(server: Server, context: str, hole: int, data: int) -> None:
    writes = ["write 4096 4096", "write 65535 2", "write 1M 3M", f"write {(128 << 20) - 1} 1"]
    run("qemu-io", "-f", "raw", *(f"-c{write}" for write in writes), server.uri())
    assert extents_of(server.uri(), context) == [
        (0, 4096, hole),
        (4096, 4096, data),
        (8192, 61440 - 8192, hole),
        (61440, 8192, data),
        (69632, (1 << 20) - 69632, hole),
        (1 << 20, 3 << 20, data),
        (4 << 20, (124 << 20) - 4096, hole),
        ((128 << 20) - 4096, 4096, data),
    ]


def test_the_map_of_a_16_tib_export_is_told_by_its_holes(serve: Serve) -> None:
    server = serve("huge=16T")
    end = 16 << 40
    run("qemu-io", "-f", "raw", "-c", f"write {end - 4096} 4096", server.uri("huge"))
    assert extents_of(server.uri("huge")) == [(0, end - 4096, 3), (end - 4096, 4096, 0)]
    assert server.allocated_bytes() == 2 * 4096  # one page of data, one of the index


def test_asking_for_the_map_allocates_nothing(server: Server) -> None:
    extents_of(server.uri())
    extents_of(server.uri(), "x-nbdram:tier")
    assert server.allocated_bytes() == 0
