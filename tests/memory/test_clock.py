"""Whom the clock's hand takes: what was only written goes first, what was touched again has a second chance."""

from collections.abc import Iterator

import pytest

from nbdram.memory.budget import Budget
from nbdram.memory.clock import Clock
from nbdram.memory.device import Device
from nbdram.memory.layout import FRESH, TOUCHED, Reference
from tests.helpers import CLUSTER, MIB, PAGE

from .evicting import evict


@pytest.fixture
def device() -> Iterator[Device]:
    made = Device("clock", 64 * MIB, Budget(64 * MIB))
    yield made
    made.close()


class Hand:
    """Reclaim's, which makes idle what it takes."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._clock = Clock(Reference.FRESH, Reference.IDLE)

    def goes_round(self, count: int = 100) -> list[int]:
        """The clusters that it takes on its way, up to `count`."""
        taken: list[int] = []
        came_round = False
        while not came_round and len(taken) < count:
            victims, came_round = self._clock.take([self._device], count - len(taken))
            for device, cluster in victims:
                device.references[cluster] = Reference.IDLE
                taken.append(cluster)
        return taken


@pytest.fixture
def hand(device: Device) -> Hand:
    return Hand(device)


def test_what_was_written_once_is_taken_when_the_hand_first_comes_by(device: Device, hand: Hand) -> None:
    for cluster in (1, 2, 5):
        device.write(cluster * CLUSTER, b"x" * CLUSTER)
    assert hand.goes_round() == [1, 2, 5]


def test_written_in_small_pieces_in_order_it_is_still_written_once(device: Device, hand: Hand) -> None:
    for at in range(0, CLUSTER, PAGE):
        device.write(at, b"x" * PAGE)
    assert device.references[0] == FRESH
    assert hand.goes_round() == [0]


@pytest.mark.parametrize("again", ["read", "written"])
def test_what_was_touched_again_has_a_second_chance(device: Device, hand: Hand, again: str) -> None:
    for cluster in range(4):
        device.write(cluster * CLUSTER, b"x" * CLUSTER)
    if again == "read":
        device.read(CLUSTER, PAGE)
    else:
        device.write(CLUSTER, b"y" * CLUSTER)
    assert device.references[1] == TOUCHED
    assert hand.goes_round() == [0, 2, 3]
    assert hand.goes_round() == [0, 1, 2, 3]


def test_a_reader_keeps_its_pages_while_another_writes_more_than_there_is_memory_for(
    device: Device, hand: Hand
) -> None:
    device.write(0, b"x" * 4 * CLUSTER)
    for cluster in range(4, 1000):
        device.write(cluster * CLUSTER, b"x" * CLUSTER)
        for read in range(4):
            device.read(read * CLUSTER, PAGE)
        if cluster > 100:
            assert min(hand.goes_round(1)) >= 4


def test_idle_and_fresh_clusters_are_taken_in_the_order_of_their_addresses(device: Device, hand: Hand) -> None:
    for cluster in range(6):
        device.write(cluster * CLUSTER, b"x" * CLUSTER)
        device.references[cluster] = (Reference.IDLE, Reference.FRESH, Reference.TOUCHED)[cluster % 3]
    assert hand.goes_round(1) == [0]
    assert hand.goes_round(2) == [1, 3]
    assert hand.goes_round() == [4]


def test_written_again_after_it_went_cold_it_is_fresh_again(device: Device, hand: Hand) -> None:
    device.write(0, b"x" * CLUSTER)
    assert evict(device, 0)
    device.write(PAGE, b"y" * PAGE)
    assert device.references[0] == FRESH
    assert hand.goes_round() == [0]


def test_the_hand_for_images_lets_fresh_clusters_be(device: Device) -> None:
    device.write(0, b"x" * CLUSTER)
    clock = Clock(Reference.COLD)
    while not clock.take([device], 1)[1]:
        pass
    assert device.references[0] == FRESH
