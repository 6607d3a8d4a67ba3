"""A few seconds each of a few faults; `make chaos` has all of them, and for longer."""

from pathlib import Path

import pytest

from .faults import FAULTS
from .world import REGION, WRITERS

SHORT = {"server stopped": 1.0, "network cut off": 2.0, "disk can't be read": 2.0, "clients die": 1.0}


@pytest.mark.parametrize("name", SHORT)
async def test_after_a_fault_all_that_was_acknowledged_is_there_and_clients_get_on(name: str, shm: Path) -> None:
    result = await FAULTS[name].run(shm, SHORT[name])
    assert result.requests > 0
    assert f"{WRITERS * REGION >> 20} MiB whole" in result.line()
