"""`nbdram list`, `info`, `map` and `stats`: a look at a running server."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import pytest

from nbdram.cli import main
from nbdram.cli.map_extents import draw
from nbdram.cli.stats import render
from tests.helpers import CLUSTER, GIB, MIB, PAGE, TIB, Running, command_line, run, running

EXPORTS = ("--export", "one=1T,description=the first, and largest", "--export", "two=64M,ro", "--memory", "64M")


@asynccontextmanager
async def two_exports(directory: Path, *more: str) -> AsyncIterator[Running]:
    async with running(directory, *EXPORTS, *more, uris=2) as here:
        yield here


# -- our own server ----------------------------------------------------------------------------------


async def test_list_names_the_exports_in_order(tmp_path: Path) -> None:
    async with two_exports(tmp_path) as here:
        ended = await run("list", here.uris[0])
        assert (ended.code, ended.output, ended.errors) == (0, "one\tthe first, and largest\ntwo\n", "")
        told = json.loads((await run("list", "--json", here.uris[0])).output)
        assert told == [
            {"name": "one", "description": "the first, and largest"},
            {"name": "two", "description": ""},
        ]


async def test_info_tells_all_that_a_client_may_want_to_know(tmp_path: Path) -> None:
    async with two_exports(tmp_path) as here:
        told = dict(line.split(maxsplit=1) for line in (await run("info", here.uris[1])).output.splitlines())
        assert told["name"] == "two"
        assert told["size"] == f"{64 * MIB} (64 MiB)"
        assert "read_only" in told["flags"].split()
        assert told["block"] == f"size   minimum 1, preferred 4096, maximum {32 * MIB}"
        assert {"base:allocation", "x-nbdram:tier"} <= set(told["contexts"].split())
        assert told["replies"] == "extended"
        assert "description" not in told


async def test_info_as_json_has_the_same(tmp_path: Path) -> None:
    async with two_exports(tmp_path) as here:
        told = json.loads((await run("info", "--json", here.uris[0])).output)
        assert told["size"] == TIB
        assert told["description"] == "the first, and largest"
        assert told["block_size"] == {"minimum": 1, "preferred": 4096, "maximum": 32 * MIB}
        assert "can_multi_conn" in told["flags"]
        assert "read_only" not in told["flags"]


async def test_no_name_is_the_first_export(tmp_path: Path) -> None:
    async with two_exports(tmp_path) as here:
        told = json.loads((await run("info", "--json", f"nbd+unix:///?socket={here.path}")).output)
        assert told["name"] == "one"


async def test_map_shows_what_is_allocated(tmp_path: Path) -> None:
    async with two_exports(tmp_path) as here, await here.entered("one") as client:
        await client.write(5 * PAGE + 7, b"x")
        await client.write(700 * GIB, bytes(range(256)) * 1024)
        ended = await run("map", here.uris[0])
        rows = [line.split() for line in ended.output.splitlines()]
        assert rows[1:] == [
            [str(5 * PAGE), str(PAGE)],
            [str(700 * GIB), str(256 * 1024)],
            ["260", "KiB", "allocated", "of", "1", "TiB"],
        ]
        told = json.loads((await run("map", "--json", here.uris[0])).output)
        assert told[:2] == [
            {"offset": 0, "length": 5 * PAGE, "hole": True},
            {"offset": 5 * PAGE, "length": PAGE, "hole": False},
        ]
        assert sum(extent["length"] for extent in told) == TIB


async def test_map_by_tiers_tells_what_is_compressed(tmp_path: Path) -> None:
    async with two_exports(tmp_path) as here, await here.entered("one") as client:
        for number in range(64):  # as much as memory holds: some of it is compressed
            await client.write(number * MIB, (b"%06d:" % number * (MIB // 7 + 1))[:MIB])
        told = json.loads((await run("map", "--tiers", "--json", here.uris[0])).output)
        tiers = {extent["tier"] for extent in told}
        assert {"hole", "ram"} <= tiers <= {"hole", "ram", "resident"}
        drawn = (await run("map", "--tiers", here.uris[0])).output
        assert "+" in drawn
        assert "nothing is stored behind 64 MiB of 1 TiB" in drawn
        assert [line.split()[:2] for line in drawn.splitlines()[-4:]] == [
            [".", "hole"],
            ["#", "resident"],
            ["+", "ram"],
            ["=", "disk"],
        ]


async def test_stats_tell_where_the_memory_is(tmp_path: Path) -> None:
    control = str(tmp_path / "control")
    async with two_exports(tmp_path) as here, await here.entered("one") as client:
        await client.write(0, b"x" * (3 * CLUSTER))
        screen = (await run("stats", "--control", control)).output
        assert "of 64 MiB used" in screen
        rows = {line.split()[0]: line.split() for line in screen.splitlines() if line}
        assert rows["one"] == ["one", "1", "TiB", "192", "KiB", *["0", "bytes"] * 3]
        assert rows["connections"] == ["connections", "1"]
        told = json.loads((await run("stats", "--json", "--control", control)).output)
        assert [export["resident"] for export in told["exports"]] == [3 * CLUSTER, 0]


async def test_a_look_at_a_server_allocates_nothing(tmp_path: Path) -> None:
    async with two_exports(tmp_path) as here:
        for command in (["list"], ["info"], ["map"], ["map", "--tiers"]):
            assert (await run(*command, here.uris[0])).code == 0
        told = json.loads((await run("stats", "--json", "--control", str(tmp_path / "control"))).output)
        assert [export["resident"] for export in told["exports"]] == [0, 0]
        assert told["connections"] == 0


# -- mistakes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["list"], ["info"], ["map"], ["map", "--tiers"]])
@pytest.mark.parametrize(
    ("uri", "code", "told"),
    [
        ("ram", 2, "'ram' is not an NBD URI: write nbd://HOST/NAME or nbd+unix:///NAME?socket=PATH"),
        ("nbd://127.0.0.1:99999/ram", 2, "the port is 0 to 65535"),
        ("nbd+unix:///ram", 2, "names no socket"),
        (
            "nbd+unix:///ram?socket=/nowhere",
            1,
            "can't reach unix:/nowhere: No such file or directory; is a server there?",
        ),
        ("nbd://127.0.0.1:1/ram", 1, "can't reach tcp://127.0.0.1:1: Connection refused; is a server there?"),
    ],
)
def test_a_mistake_gets_one_sentence(
    capsys: pytest.CaptureFixture[str], command: list[str], uri: str, code: int, told: str
) -> None:
    assert main([*command, uri]) == code
    output, errors = capsys.readouterr()
    assert output == ""
    (line,) = errors.splitlines()
    assert told in line


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("b 5G", "nbdram: write it in one word, as in b=5G\n"),
        ("b=foo", "nbdram: 'b=foo': 'foo' is not a size: write a whole number and K, M, G or T, as in 16G\n"),
        ("b", "nbdram: 'b': write NAME=MAXSIZE, as in scratch=16G\n"),
    ],
)
def test_what_is_to_be_created_is_blamed_as_it_was_typed(
    capsys: pytest.CaptureFixture[str], typed: str, told: str
) -> None:
    assert main(["create", *typed.split()]) == 2
    assert capsys.readouterr().err == told


def test_create_takes_one_thing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["create"])
    assert "the following arguments are required: NAME=MAXSIZE[,OPTION]...;" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["info", "map"])
async def test_an_export_that_is_not_there_is_told_so(tmp_path: Path, command: str) -> None:
    async with two_exports(tmp_path) as here:
        ended = await run(command, f"nbd+unix:///nobody?socket={here.path}")
        assert ended.code == 1
        assert ended.errors == (
            "nbdram: the server refused: there is no export of this name; "
            "`nbdram list`, with the same URI, shows those that are there\n"
        )


async def test_stats_of_nobody_say_how_to_find_a_server(tmp_path: Path) -> None:
    ended = await run("stats", "--control", str(tmp_path / "control"))
    assert ended.code == 1
    (line,) = ended.errors.splitlines()
    assert line.startswith(
        f"nbdram: no server answers at {tmp_path}/control (No such file or directory): is it running"
    )


@pytest.mark.parametrize("command", [["map", "--json"], ["list"]])
async def test_a_reader_that_has_seen_enough_is_no_error_of_ours(tmp_path: Path, command: Sequence[str]) -> None:
    async with two_exports(tmp_path) as here:
        reader, writer = os.pipe()
        os.close(reader)
        process = await asyncio.create_subprocess_exec(
            *command_line(*command, here.uris[0]), stdout=writer, stderr=asyncio.subprocess.PIPE
        )
        os.close(writer)
        _, errors = await process.communicate()
        assert (process.returncode, errors) == (1, b"")


# -- servers of others -------------------------------------------------------------------------------


@asynccontextmanager
async def other_server(directory: Path, *command: str) -> AsyncIterator[str]:
    """A server that listens on DIRECTORY/other.sock; its socket as part of a URI."""
    path = directory / "other.sock"
    process = await asyncio.create_subprocess_exec(*command)
    try:
        async with asyncio.timeout(20):
            while not path.exists():
                assert process.returncode is None, f"{command[0]} has ended"
                await asyncio.sleep(0.01)
        yield f"?socket={quote(str(path))}"
    finally:
        process.terminate()
        await process.wait()


async def test_nbdkit_is_looked_at_too(tmp_path: Path) -> None:
    command = ("nbdkit", "--foreground", "--unix", str(tmp_path / "other.sock"), "data", "@65536 1 2 3", "size=1M")
    async with other_server(tmp_path, *command) as where:
        assert (await run("list", f"nbd+unix:///{where}")).code == 0
        told = json.loads((await run("info", "--json", f"nbd+unix:///any{where}")).output)
        assert told["size"] == MIB
        assert told["replies"] == "structured"
        assert "base:allocation" in told["contexts"]
        mapped = json.loads((await run("map", "--json", f"nbd+unix:///{where}")).output)
        assert [(extent["offset"], extent["hole"]) for extent in mapped][:2] == [
            (0, True),
            (65536 // 32768 * 32768, False),
        ]
        ended = await run("map", "--tiers", f"nbd+unix:///{where}")
        assert ended.code == 1
        assert "it has no x-nbdram:tier" in ended.errors


async def test_qemu_nbd_is_looked_at_too(tmp_path: Path) -> None:
    image = tmp_path / "image.raw"
    image.write_bytes(b"x" * (64 * 1024))
    os.truncate(image, MIB)
    where = ("--socket", str(tmp_path / "other.sock"), "--export-name", "köln", "--description", "a file")
    command = ("qemu-nbd", "--persistent", "--format", "raw", *where, str(image))
    async with other_server(tmp_path, *command) as socket:
        assert (await run("list", f"nbd+unix:///{socket}")).output == "köln\ta file\n"
        told = json.loads((await run("info", "--json", f"nbd+unix:///{quote('köln')}{socket}")).output)
        assert (told["name"], told["size"]) == ("köln", MIB)
        mapped = json.loads((await run("map", "--json", f"nbd+unix:///{quote('köln')}{socket}")).output)
        assert mapped == [
            {"offset": 0, "length": 65536, "hole": False},
            {"offset": 65536, "length": MIB - 65536, "hole": True},
        ]
        assert (await run("info", f"nbd+unix:///nobody{socket}")).code == 1


# -- pictures ----------------------------------------------------------------------------------------


def test_the_picture_shows_what_each_cell_holds_most_of() -> None:
    extents = [(0, 2 * PAGE, 1), (2 * PAGE, PAGE, 0), (3 * PAGE, 5 * PAGE, 2), (8 * PAGE, 100 * PAGE, 0)]
    assert draw(extents, 108 * PAGE) == [
        "##.+++++",
        "each mark is 4 KiB; nothing is stored behind 32 KiB of 432 KiB",
    ]
    assert draw([(0, GIB, 3)], GIB) == [*["=" * 64] * 16, "each mark is 1 MiB"]
    assert draw([(0, MIB - PAGE, 2), (MIB - PAGE, GIB, 1)], GIB)[0][:2] == "+#"


def test_the_picture_of_nothing_says_so() -> None:
    assert draw([(0, TIB, 0)], TIB) == ["nothing is stored in all of 1 TiB"]


def test_rates_and_ratios_are_of_what_was_measured() -> None:
    export = {"name": "x" * 40, "maximum": GIB, "resident": 0, "compressed": MIB, "compressed_from": 4 * MIB}
    export |= {"remote": 3 * MIB, "remote_from": 6 * MIB}
    export |= {"disk": MIB, "disk_from": 2 * MIB, "index": PAGE, "integrity_errors": 1}
    times = {"p50": 5e-6, "p99": 17e-6}
    reclaim = dict.fromkeys(("compressed", "dropped_clean", "zeros", "demoted", "thrown_away"), 0)
    now = {
        "budget": {"used": MIB, "limit": 4 * MIB, "overhead": PAGE},
        "exports": [export],
        "faults": {
            "ram": 7,
            "ram_seconds": times,
            "disk": 0,
            "disk_seconds": dict.fromkeys(times),
            "remote": 9,
            "remote_seconds": times,
            "refaulted_pages": 0,
        },
        "reclaim": reclaim | {"compressed": 300},
        "swap": [{}],
        "remote": {"failing": True},
        **dict.fromkeys(("write_waits", "errors", "connections"), 0),
    }
    rows = {line[:20].strip(): line[20:] for line in render({**now, "reclaim": reclaim}, now, 2.0).splitlines()}
    assert rows["budget"] == "1 MiB of 4 MiB used (25 %)"
    assert rows["compressed"] == "1 MiB for 4 MiB (0.25)"
    assert rows["on disk"] == "1 MiB for 2 MiB (0.50)"
    assert rows["faults from RAM"] == "7 (p50 5 us, p99 17 us)"
    assert rows["faults from disk"] == "0"
    assert rows["remote"] == "3 MiB for 6 MiB (0.50); a node takes nothing for now"
    assert rows["faults from remote"] == "9 (p50 5 us, p99 17 us)"
    assert rows["reclaim"] == "150 clusters/s; 300 in all, 0 thrown away"
    assert rows["errors"] == "0, damaged images 1"

    many = [export | {"name": f"number {number}", "disk": number * MIB} for number in range(1000)]
    screen = render(now, now | {"exports": many}, 1.0).splitlines()
    assert len(screen) < 40
    assert [line.split()[1] for line in screen[-21:-1]] == [str(number) for number in range(980, 1000)]
    assert screen[-1] == "... and 980 more, which hold less: `nbdram exports` and `--json` have all"
