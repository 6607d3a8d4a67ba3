"""Servers for the tests with real clients. Each test has its own, and ends with `Server.finish`."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from .running import Server

Serve = Callable[..., Server]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts servers: serve("NAME=MAXSIZE", ..., memory="512M", tcp=False, options=())."""
    servers: list[Server] = []

    def start(*exports: str, memory: str = "512M", tcp: bool = False, options: Sequence[str] = ()) -> Server:
        directory = tmp_path / f"server{len(servers)}"
        directory.mkdir()
        servers.append(Server(directory, exports, *options, memory=memory, tcp=tcp))
        return servers[-1]

    yield start
    errors = []
    for server in servers:
        try:
            server.finish()
        except BaseException as error:
            errors.append(error)
    if errors:
        raise errors[0]


@pytest.fixture
def server(serve: Serve) -> Server:
    """One export called "disk", of 128 MiB."""
    return serve("disk=128M")
