"""Whether the event loop dozes after large batches: the way that gets more done has nearly all of the time."""

import time
from pathlib import Path

import pytest

from nbdram.protocol.wire import Command
from nbdram.server.doze import Doze
from tests.helpers import PAGE, served

_TURN_S = 0.001
_SOME_SECONDS = 5_000  # turns


def share_of_dozing(doze: Doze, without: int, dozing: int, turns: int = _SOME_SECONDS) -> float:
    """Of the time, with a client that gets so many requests done in each turn."""
    dozed = 0
    for _ in range(turns):
        dozed += doze.pays
        doze.judge(dozing if doze.pays else without, _TURN_S)
    return dozed / turns


@pytest.mark.parametrize(("without", "dozing"), [(80, 120), (100, 105), (100, 100)])
def test_it_dozes_where_as_much_is_done(without: int, dozing: int) -> None:
    assert share_of_dozing(Doze(), without, dozing) > 0.95


@pytest.mark.parametrize(("without", "dozing"), [(120, 65), (100, 98)])
def test_it_does_not_where_less_is_done(without: int, dozing: int) -> None:
    assert share_of_dozing(Doze(), without, dozing) < 0.02


def test_it_changes_its_mind_when_the_client_changes() -> None:
    doze = Doze()
    share_of_dozing(doze, 120, 65)
    share_of_dozing(doze, 80, 120)
    assert share_of_dozing(doze, 80, 120) > 0.95
    share_of_dozing(doze, 120, 65)
    assert share_of_dozing(doze, 120, 65) < 0.02


def test_one_turn_in_which_little_was_done_decides_nothing() -> None:
    doze = Doze()
    doze.judge(0, _TURN_S)
    for _ in range(4):
        doze.judge(100, _TURN_S)
    doze.judge(1, _TURN_S)  # without dozing
    assert share_of_dozing(doze, 100, 60) < 0.02


def test_a_client_that_does_nothing_is_no_mistake() -> None:
    assert share_of_dozing(Doze(), 0, 0) > 0.9


async def test_it_dozes_after_large_batches_only_and_only_if_that_pays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dozed: list[float] = []
    monkeypatch.setattr(time, "sleep", dozed.append)
    async with served(tmp_path) as server, await server.entered("ram") as client:
        await client.write(0, b"x" * PAGE)

        async def dozes(reads: int, *, pays: bool) -> list[float]:
            dozed.clear()
            server.server.service.doze.pays = pays
            await client.send(b"".join(client.request(Command.READ, 0, PAGE) for _ in range(reads)))
            await client.replies(reads)
            return dozed

        assert await dozes(32, pays=False) == []
        assert await dozes(4, pays=True) == []
        (seconds,) = await dozes(32, pays=True)
        assert 0 < seconds < 0.0001
