"""All tests run on uvloop, as the server does; what hypothesis tries is the same in every run."""

import asyncio
from collections.abc import Callable, Mapping

import uvloop
from hypothesis import settings

settings.register_profile("nbdram", deadline=None, derandomize=True)
settings.load_profile("nbdram")


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}
