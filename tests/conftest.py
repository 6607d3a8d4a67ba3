"""All tests run on uvloop, as the server does; what hypothesis tries is the same in every run.

Servers that tests start in this process count all that it holds into their budgets. So it keeps little that nobody
uses: threads have no arenas of their own, as in the server, and freed memory goes back to the kernel. What a connection
that broke has left behind (reader, error, and the frames with all that they hold) is garbage in a circle, of so few
objects that the collector would seldom look for it among all that modules have.
"""

import asyncio
import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import uvloop
from hypothesis import settings

from nbdram.memory.malloc import keep_what_is_freed, share_one_arena
from tests.helpers import MIB, lone_devices

share_one_arena()
keep_what_is_freed(MIB)
settings.register_profile("nbdram", deadline=None, derandomize=True)
settings.load_profile("nbdram")


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what is here by now stays, and need not be looked through each time


@pytest.fixture(autouse=True, scope="module")
def _no_garbage() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def _no_devices() -> Iterator[None]:
    yield
    while lone_devices:
        device = lone_devices.pop()
        if not device.backing.hot.closed:
            device.close()


@pytest.fixture
def shm() -> Iterator[Path]:
    """A temporary directory on tmpfs, where state directories belong."""
    with tempfile.TemporaryDirectory(prefix="nbdram-", dir="/dev/shm") as path:
        yield Path(path)


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}
