"""The HTTP side: health, readiness, and ports that are taken."""

import asyncio
import socket
import urllib.error
import urllib.request
from pathlib import Path

from nbdram.config import Endpoint, ExportSettings, ServeSettings, parse_metrics
from nbdram.memory.reclaim import anonymous_bytes
from nbdram.server.server import Server

from ..helpers import Client, command_line, eventually, run, running


async def fetch(port: int, path: str, **headers: str) -> tuple[int, str]:
    """Status and body of a GET from 127.0.0.1."""

    def get() -> tuple[int, str]:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return await asyncio.to_thread(get)


def settings(directory: Path) -> ServeSettings:
    return ServeSettings(
        exports=(ExportSettings("ram", 1 << 30),),
        listen=(Endpoint(path=str(directory / "nbd.sock")),),
        memory=(64 << 20) + anonymous_bytes(),
        control=directory / "control",
        metrics=Endpoint(host="127.0.0.1", port=0),
        metrics_required=True,
    )


def port_of(server: Server) -> int:
    assert server.web
    return server.web.endpoint.port


async def test_a_server_is_ready_from_its_start_until_it_drains(tmp_path: Path) -> None:
    server = Server(settings(tmp_path))
    await server.start()
    port = port_of(server)
    client = Client(*await asyncio.open_unix_connection(str(tmp_path / "nbd.sock")))
    await client.enter()
    await eventually(lambda: bool(server.service.connections))
    try:
        assert await fetch(port, "/readyz") == (200, "ready\n")
        assert await fetch(port, "/healthz") == (200, "ok\n")
        server.ready = False
        assert await fetch(port, "/readyz") == (503, "starting or draining\n")
        assert (await fetch(port, "/metrics"))[0] == 200, "a draining server can still be looked at"
    finally:
        client.kill()
        await server.stop()


async def test_a_server_that_starts_is_not_ready(tmp_path: Path) -> None:
    server = Server(settings(tmp_path))
    server.web = server._open_web()
    assert await fetch(port_of(server), "/readyz") == (503, "starting or draining\n")
    await server.stop()


async def test_a_loop_that_does_not_run_is_not_healthy(tmp_path: Path) -> None:
    server = Server(settings(tmp_path))
    await server.start()
    try:
        server.lag._due -= 1000
        status, text = await fetch(port_of(server), "/healthz")
        assert status == 503
        assert text.startswith("the event loop has not run for ")
    finally:
        await server.stop()


async def test_unknown_paths_and_other_hosts_get_nothing(tmp_path: Path) -> None:
    server = Server(settings(tmp_path))
    await server.start()
    try:
        port = port_of(server)
        assert (await fetch(port, "/etc/passwd"))[0] == 404
        assert (await fetch(port, "/metrics", Host="rebound.example"))[0] == 403
        assert (await fetch(port, "/metrics", Host=f"localhost:{port}"))[0] == 200
        assert (await fetch(port, "/metrics", Host="[::1]:9810"))[0] == 200
    finally:
        await server.stop()


async def test_garbage_and_silence_do_no_harm(tmp_path: Path) -> None:
    server = Server(settings(tmp_path))
    await server.start()
    port = port_of(server)
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
    try:
        silent[0].sendall(b"\0" * 70000)
        for connection in silent:
            connection.close()
        answer = (0, "")
        async with asyncio.timeout(20):
            while not answer[0]:
                await asyncio.sleep(0.01)
                answer = await fetch_or_nothing(port, "/healthz")
        assert answer == (200, "ok\n")
    finally:
        await server.stop()


async def fetch_or_nothing(port: int, path: str) -> tuple[int, str]:
    try:
        return await fetch(port, path)
    except OSError:
        return 0, ""


async def test_metrics_asked_for_on_a_taken_port_are_an_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = await run("serve", "--listen", f"unix:{tmp_path}/s", "--metrics", address)
    assert done.code == 1
    assert done.errors.count("\n") == 1
    assert address in done.errors


async def test_a_taken_default_port_is_one_line_and_no_more(tmp_path: Path) -> None:
    """Whoever has the port, this test or somebody else."""
    try:
        taken = socket.create_server(("127.0.0.1", 9810))
    except OSError:
        taken = None
    command = ("serve", "--listen", f"unix:{tmp_path}/nbd.sock", "--control", f"{tmp_path}/control")
    async with running(tmp_path, command=command_line(*command)) as server:
        async with await server.entered() as client:
            await client.write(0, b"x")
        server.process.terminate()
        done = await server.ended()
    if taken:
        taken.close()
    assert done.code == 0
    assert done.errors.count("\n") == 1
    assert "no metrics and no status page" in done.errors


async def test_a_wrong_address_is_a_usage_error(tmp_path: Path) -> None:
    for wrong in ("9810", "127.0.0.1", "127.0.0.1:x", "http://127.0.0.1:9810/", ""):
        done = await run("serve", "--listen", f"unix:{tmp_path}/s", "--metrics", wrong)
        assert done.code == 2, wrong
        assert done.errors.startswith(f"nbdram: --metrics {wrong!r}: write ADDRESS:PORT"), done.errors


def test_addresses_and_off_are_understood() -> None:
    assert parse_metrics("off") is None
    assert parse_metrics("0.0.0.0:9810") == Endpoint(host="0.0.0.0", port=9810)
    assert parse_metrics("[::1]:1234") == Endpoint(host="::1", port=1234)
