"""Exports that are made, resized and removed while the server runs, through its control socket."""

import asyncio
import http.client
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdram.client.session import read_identity
from nbdram.config import Endpoint
from nbdram.errors import NbdramError, UsageError
from nbdram.observe.control import ask
from nbdram.protocol.wire import Command
from tests.helpers import CLUSTER, GIB, MIB, PAGE, Running, run, running
from tests.memory.machine import content


@asynccontextmanager
async def started(shm: Path, *options: str, uris: int = 1) -> AsyncIterator[Running]:
    arguments = ("--control", str(shm / "control"), "--metrics", "off", "--memory", "256M", *options)
    async with running(shm, *arguments, uris=uris) as server:
        yield server


def stored(shm: Path) -> tuple[str, str]:
    return "--state-dir", str(shm / "state")


async def control(shm: Path, what: str, method: str = "GET", body: dict[str, Any] | None = None) -> dict[str, Any]:
    return await asyncio.to_thread(ask, shm / "control", what, method, body)


async def names(shm: Path) -> list[str]:
    return [export["name"] for export in (await control(shm, "exports"))["exports"]]


async def test_an_export_is_made_used_and_removed(shm: Path) -> None:
    async with started(shm, "--export", "first=1G") as server:
        made = await control(shm, "exports", "POST", {"name": "new/one", "size": "64M", "description": "for now"})
        assert (made["size"], made["description"], made["connections"]) == (64 * MIB, "for now", 0)
        async with await server.entered("new/one") as client:
            await client.write(0, b"data" * 1000)
            assert client.size == 64 * MIB
        while (await control(shm, "exports"))["exports"][1]["connections"]:
            await asyncio.sleep(0.01)
        used = (await control(shm, "stats"))["budget"]["used"]
        await control(shm, "exports/new%2Fone", "DELETE")
        assert await names(shm) == ["first"]
        budget = (await control(shm, "stats"))["budget"]
        assert budget["used"] - budget["overhead"] < used - PAGE


async def test_a_read_only_export_can_be_made_and_is_one(shm: Path) -> None:
    async with started(shm) as server:
        await control(shm, "exports", "POST", {"name": "ro", "size": MIB, "read_only": True, "density": True})
        async with await server.entered("ro") as client:
            assert (await client.call(Command.WRITE, 0, payload=b"no")).error == 1


async def test_an_export_in_use_is_removed_only_by_force(shm: Path) -> None:
    async with started(shm) as server, await server.entered("ram") as client:
        await client.write(0, b"in use")
        with pytest.raises(NbdramError, match="has 1 connections"):
            await control(shm, "exports/ram", "DELETE")
        assert await client.read(0, 6) == b"in use"
        assert await control(shm, "exports/ram?force", "DELETE") == {"removed": "ram"}
        assert await client.rest() == b""
        assert await names(shm) == []


async def test_an_export_is_removed_while_it_is_being_paged_out(shm: Path, tmp_path: Path) -> None:
    swap = ("--swap", f"disk:{tmp_path / 'swap'}")
    async with started(shm, "--export", "disk=1G", "--memory", "48M", *swap) as server:
        await control(shm, "exports", "POST", {"name": "other", "size": GIB})
        async with await server.entered("disk") as client:
            for at in range(0, 40 * MIB, MIB):
                await client.write(at, content(20 + at // MIB, MIB))
            await control(shm, "exports/disk?force", "DELETE")
        async with await server.entered("other") as client:
            await client.write(0, b"x" * (8 * MIB))
            assert await client.read(0, 8 * MIB) == b"x" * (8 * MIB)
        (swapped,) = (await control(shm, "stats"))["swap"]
        assert swapped["used"] == 0


@pytest.mark.parametrize(
    ("method", "what", "body", "status", "message"),
    [
        ("POST", "exports", {"name": "ram", "size": "1G"}, 409, "already"),
        ("POST", "exports", {"name": "x"}, 400, "'size' is missing"),
        ("POST", "exports", {"name": "x", "size": 100}, 400, "multiple of 4096"),
        ("POST", "exports", {"name": "x", "size": "big"}, 400, "not a size"),
        ("POST", "exports", {"name": "x", "size": True}, 400, "wrong type"),
        ("POST", "exports", {"name": "", "size": "1G"}, 400, "needs a name"),
        ("POST", "exports", {"name": "x", "size": "65T"}, 400, "at most 64 TiB"),
        ("POST", "exports", {"name": "x", "size": "1G", "color": "red"}, 400, "no field 'color'"),
        ("POST", "exports", [1], 400, "object in JSON"),
        ("DELETE", "exports/nobody", None, 404, "no export called 'nobody'"),
        ("POST", "exports/nobody/resize", {"size": "1G"}, 404, "no export called 'nobody'"),
        ("POST", "exports/ram/resize", {"size": "1G"}, 400, "add --shrink"),
        ("POST", "exports/ram/paint", {}, 404, "there is no POST"),
        ("GET", "nothing", None, 404, "there is no GET"),
    ],
)
async def test_a_mistake_gets_a_sentence_and_its_status(
    shm: Path, method: str, what: str, body: Any, status: int, message: str
) -> None:
    def say() -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(shm / "control"))
        connection.request(method, f"/v1/{what}", json.dumps(body))
        response = connection.getresponse()
        answer = response.status, json.loads(response.read())
        connection.close()
        return answer

    async with started(shm):
        found, answer = await asyncio.to_thread(say)
        assert found == status
        assert message in answer["error"]
        assert await names(shm) == ["ram"]


# -- resize ------------------------------------------------------------------------------------------


async def test_open_connections_use_what_their_export_has_grown_by(shm: Path) -> None:
    async with started(shm, "--export", "ram=16M") as server, await server.entered("ram") as client:
        await client.write(0, b"before")
        assert (await client.call(Command.WRITE, 16 * MIB, payload=b"too far")).error == 28
        assert (await control(shm, "exports/ram/resize", "POST", {"size": "1T"}))["size"] == 1 << 40
        await client.write((1 << 40) - PAGE, b"after")
        assert await client.read((1 << 40) - PAGE, 5) + await client.read(0, 6) == b"afterbefore"
        async with await server.entered("ram") as newcomer:
            assert newcomer.size == 1 << 40


async def test_an_export_shrinks_above_its_data_and_not_into_it(shm: Path) -> None:
    async with started(shm, "--export", "ram=1G") as server, await server.entered("ram") as client:
        await client.write(5 * CLUSTER, b"data")
        with pytest.raises(UsageError, match="shrink"):
            await control(shm, "exports/ram/resize", "POST", {"size": "512M"})
        with pytest.raises(NbdramError, match="has data up to 384 KiB"):
            await control(shm, "exports/ram/resize", "POST", {"size": 5 * CLUSTER, "shrink": True})
        await control(shm, "exports/ram/resize", "POST", {"size": 6 * CLUSTER, "shrink": True})
        assert (await client.call(Command.WRITE, 6 * CLUSTER, payload=b"too far")).error == 28
        assert await client.read(5 * CLUSTER, 4) == b"data"


async def test_a_large_write_goes_on_while_its_export_grows(shm: Path) -> None:
    async with started(shm, "--export", "ram=16M") as server, await server.entered("ram") as client:
        data = content(80, 8 * MIB)
        request = client.request(Command.WRITE, 4 * MIB, payload=data)
        await client.send(request[: 3 * MIB])
        await control(shm, "exports/ram/resize", "POST", {"size": "4G"})
        await client.send(request[3 * MIB :])
        await client.replies(1)
        assert await client.read(4 * MIB, 8 * MIB) == data


# -- what is remembered ------------------------------------------------------------------------------


async def test_what_was_changed_while_running_is_there_after_a_restart(shm: Path) -> None:
    async with started(shm, *stored(shm), "--export", "a=1G", "--export", "b=1G", uris=2) as server:
        async with await server.entered("a") as client:
            await client.write(MIB, b"kept")
        await control(shm, "exports/a/resize", "POST", {"size": "4G"})
        await control(shm, "exports/b", "DELETE")
        await control(shm, "exports", "POST", {"name": "c", "size": "2G", "description": "new"})
        before = (await control(shm, "exports"))["exports"]
    async with started(shm, *stored(shm), "--export", "a=2G", uris=2) as server:
        after = (await control(shm, "exports"))["exports"]
        facts = [(export["name"], export["size"], export["identity"]) for export in before]
        assert [(export["name"], export["size"], export["identity"]) for export in after] == facts
        async with await server.entered("a") as client:
            assert await client.read(MIB, 4) == b"kept"


async def test_a_larger_size_on_the_command_line_grows_what_is_stored(shm: Path) -> None:
    async with started(shm, *stored(shm), "--export", "a=1G"):
        pass
    async with started(shm, *stored(shm), "--export", "a=2G,ro,description=now"):
        (export,) = (await control(shm, "exports"))["exports"]
        assert (export["size"], export["read_only"], export["description"]) == (2 * GIB, True, "now")


async def test_a_device_keeps_its_identity_and_a_new_one_gets_another(shm: Path) -> None:
    found = []
    endpoint = Endpoint(path=str(shm / "nbd.sock"))
    for directory in ("state", "state", "other"):
        async with started(shm, "--state-dir", str(shm / directory)):
            found.append(await asyncio.to_thread(read_identity, endpoint, "ram"))
    assert found[0] == found[1] != found[2]
    assert len(found[0]) == 36


async def test_data_in_swap_needs_the_same_swap_again(shm: Path, tmp_path: Path) -> None:
    swap = ("--swap", f"disk:{tmp_path / 'swap'}")
    data = content(99, MIB)
    async with started(shm, *stored(shm), *swap, "--export", "a=1G", "--memory", "40M") as server:
        async with await server.entered("a") as client:
            for at in range(0, 40 * MIB, MIB):
                await client.write(at, data)
        assert (await control(shm, "stats"))["exports"][0]["disk"]
    state = ["serve", *stored(shm), "--listen", f"unix:{shm / 'nbd.sock'}", "--metrics", "off"]
    refused = await run(*state)
    assert refused.code == 1
    assert f"start the server with --swap disk:{tmp_path / 'swap'}" in refused.errors
    assert "all whole" in (await run("check", str(shm / "state"))).output
    async with started(shm, *stored(shm), *swap) as server, await server.entered("a") as client:
        for at in range(0, 40 * MIB, MIB):
            assert await client.read(at, MIB) == data


# -- commands ----------------------------------------------------------------------------------------


async def test_the_commands_say_what_they_did(shm: Path) -> None:
    at = ("--control", str(shm / "control"))
    async with started(shm, *stored(shm)):
        assert (await run("create", "x=1G,density,description=some text", *at)).output == "made x: 1 GiB\n"
        assert (await run("resize", "x", "2G", *at)).output == "x has 2 GiB now\n"
        assert (await run("resize", "x", "1G", *at)).code == 2
        assert (await run("resize", "x", "1G", "--shrink", *at)).code == 0
        listed = (await run("exports", *at)).output.splitlines()
        assert listed[1].split() == ["x", "1", "GiB", "density,", "0", "connections,", "some", "text"]
        assert json.loads((await run("exports", "--json", *at)).output)[1]["density"] is True
        in_use = await run("check", str(shm / "state"))
        assert (in_use.code, "in use" in in_use.errors) == (1, True)
        assert (await run("rm", "x", *at)).output == "removed x\n"
        ruled = await run("create", "y=1G,network=10.0.0.0/8,user=0,iops=5", *at)
        assert ruled.output == "made y: 1 GiB\n"
        listed = json.loads((await run("exports", "--json", *at)).output)[1]
        assert (listed["networks"], listed["users"], listed["iops"]) == (["10.0.0.0/8"], [0], 5)
        assert (await run("rm", "y", *at)).code == 0
        gone = await run("rm", "x", *at)
        told = "nbdram: there is no export called 'x': `nbdram exports` shows those that are there\n"
        assert (gone.code, gone.errors) == (1, told)
    assert "1 export, all whole" in (await run("check", str(shm / "state"))).output
    assert (await run("rm", f"{shm}/state")).output == f"removed {shm}/state with 1 export\n"
    assert not (shm / "state").exists()


async def test_check_names_what_is_damaged(shm: Path) -> None:
    async with started(shm, *stored(shm), "--export", "a=1G", "--memory", "40M") as server:
        async with await server.entered("a") as client:
            for at in range(0, 40 * MIB, MIB):
                await client.write(at, content(20, MIB))
        assert (await control(shm, "stats"))["exports"][0]["compressed"]
    (cold,) = (shm / "state").glob("*.cold")
    with cold.open("r+b") as file:
        for slot in range(4, 40 * MIB // CLUSTER * 2):
            file.seek(slot * CLUSTER + 100)
            if any(file.read(8)):
                file.seek(slot * CLUSTER + 100)
                file.write(b"damaged!")
                break
    checked = await run("check", str(shm / "state"))
    assert checked.code == 1
    assert f"the data at offset {slot // 2 * CLUSTER} is lost" in checked.output
    assert "damaged: a" in checked.output
