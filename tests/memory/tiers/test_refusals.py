"""Who is not asked to store images for a while, and for how long."""

import errno
import time

import pytest

from nbdram.memory.tiers.refusals import Node, Refusals

ONE, OTHER = ("one", 1), ("other", 2)
AWAY, FULL = OSError(errno.EIO, "away"), OSError(errno.ENOSPC, "full")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_who_refuses_is_asked_again_later_and_later_but_no_later_than_every_four_seconds(clock: list[float]) -> None:
    refusals = Refusals(lambda: [ONE, OTHER])
    assert refusals.note(ONE, AWAY)
    assert not refusals.note(ONE, AWAY), "the first of its kind was told already"
    pauses = []
    for _ in range(4):
        begun = clock[0]
        while not refusals.takes(ONE):
            clock[0] += 0.25
        pauses.append(clock[0] - begun)
        assert not refusals.note(ONE, AWAY)
    assert pauses == [1, 2, 4, 4]
    assert refusals.takes(OTHER)
    assert refusals.any_takes()
    assert not refusals.note(OTHER, AWAY)
    assert not refusals.any_takes()


def test_all_is_well_when_each_has_stored_one_or_is_gone(clock: list[float]) -> None:
    owners: list[Node] = [ONE, OTHER]
    refusals = Refusals(lambda: owners)
    assert not refusals.stored(ONE)
    refusals.note(ONE, AWAY)
    refusals.note(OTHER, AWAY)
    assert not refusals.stored(ONE)
    assert refusals
    owners.remove(OTHER)
    assert refusals.stored(ONE)
    assert not refusals


def test_room_brings_back_who_was_full_and_nobody_else(clock: list[float]) -> None:
    refusals = Refusals(lambda: [ONE, OTHER])
    refusals.note(ONE, FULL)
    refusals.note(OTHER, AWAY)
    refusals.made_room(ONE)
    refusals.made_room(OTHER)
    assert (refusals.takes(ONE), refusals.takes(OTHER)) == (True, False)
