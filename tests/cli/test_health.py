"""`nbdram health`, for the health checks of containers."""

import asyncio
import subprocess
from pathlib import Path

import pytest

from nbdram.cli import health, main
from nbdram.client.ask_keeper import SOCKET_NAME
from nbdram.server.server import Server
from tests.helpers import PATIENCE_S, command_line, eventually
from tests.observe.test_web import port_of, settings


async def asked(port: int, *options: str) -> int:
    return await asyncio.to_thread(main, ["health", "--metrics", f"127.0.0.1:{port}", *options])


async def test_health_follows_readiness_and_tells_life_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(settings(tmp_path))
    await server.start()
    port = port_of(server)
    try:
        assert await asked(port) == 0
        server.ready = False
        assert await asked(port) == 1
        assert await asked(port, "--live") == 0
    finally:
        await server.stop()
    assert capsys.readouterr().out == "ready\nstarting or draining\nok\n"
    assert await asked(port) == 1
    assert f"no server answers at 127.0.0.1:{port} (Connection refused)" in capsys.readouterr().err


def test_a_server_without_metrics_can_not_be_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--metrics", "off"]) == 2
    assert "can't be asked for its health" in capsys.readouterr().err


async def test_a_keeper_is_asked_over_its_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(health, "default_directory", lambda: tmp_path)
    assert main(["health", "--keeper"]) == 1
    assert "no keeper runs" in capsys.readouterr().err
    keeper = subprocess.Popen(command_line("keeper", "--directory", str(tmp_path)), stderr=subprocess.DEVNULL)
    try:
        await eventually((tmp_path / SOCKET_NAME).is_socket)
        await eventually(lambda: main(["health", "--keeper"]) == 0)
    finally:
        keeper.terminate()
        assert keeper.wait(PATIENCE_S) == 0
    assert capsys.readouterr().out == "keeping 0 devices\n"
