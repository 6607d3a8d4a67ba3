"""All tests run on uvloop, as the server does; what hypothesis tries is the same in every run."""

import asyncio
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import uvloop
from hypothesis import settings

settings.register_profile("nbdram", deadline=None, derandomize=True)
settings.load_profile("nbdram")


@pytest.fixture
def shm() -> Iterator[Path]:
    """A temporary directory on tmpfs, where state directories belong."""
    with tempfile.TemporaryDirectory(prefix="nbdram-", dir="/dev/shm") as path:
        yield Path(path)


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}
