"""Which pages of a compressed cluster become resident again, and when."""

from collections.abc import Iterator

import pytest

from nbdram.memory.budget import Budget
from nbdram.memory.clock import Clock
from nbdram.memory.device import Device
from nbdram.memory.layout import IDLE, RESIDENT, TOUCHED, Reference
from tests.helpers import MIB, PAGE

from .evicting import evict

CONTENT = b"".join(b"page %2d\n" % page * (PAGE // 8) for page in range(16))


@pytest.fixture
def device() -> Iterator[Device]:
    """Its cluster 0 is compressed, and there is some memory to spare, but not much."""
    made = Device("paged", MIB, Budget(64 * MIB))
    made.budget.attach(lambda: None)
    made.write(0, CONTENT)
    assert evict(made, 0)
    made.budget.free_pages = made.budget.stop_above
    assert made.budget.has_spare()
    assert not made.budget.has_spare(much=True)
    yield made
    made.close()


def read(device: Device, *pages: int) -> int:
    """Read pages of the cluster one after the other; the resident pages of it afterwards, as a mask."""
    for page in pages:
        assert device.read(page * PAGE, PAGE) == CONTENT[page * PAGE : (page + 1) * PAGE]
    return device.words[0] & RESIDENT


def hand_comes_by(device: Device) -> None:
    clock = Clock(Reference.STUCK)
    while not clock.take([device], 1)[1]:
        pass


def test_a_page_that_is_read_twice_becomes_resident_and_its_neighbours_do_not(device: Device) -> None:
    assert read(device, 3) == 0
    assert read(device, 3) == 1 << 3
    assert read(device, 4) == 1 << 3
    assert read(device, 4) == 1 << 3 | 1 << 4


def test_reading_in_order_displaces_nothing_but_reading_all_again_and_again_ends_in_hot_pages(device: Device) -> None:
    assert read(device, *range(16)) == 0
    for _ in range(40):
        read(device, *range(16))
    assert device.words[0] & RESIDENT == RESIDENT


def test_the_hand_takes_the_mark_of_the_first_read_away(device: Device) -> None:
    assert read(device, 3) == 0
    hand_comes_by(device)
    assert device.references[0] == Reference.COLD
    assert read(device, 3) == 0
    assert read(device, 3) == 1 << 3


def test_beside_resident_pages_it_is_the_same_and_the_cluster_counts_as_touched(device: Device) -> None:
    assert read(device, 3, 3) == 1 << 3
    assert device.references[0] == TOUCHED
    hand_comes_by(device)
    assert device.references[0] == IDLE
    assert read(device, 9) == 1 << 3
    assert device.references[0] not in (IDLE, TOUCHED)
    hand_comes_by(device)
    assert device.references[0] == IDLE
    assert read(device, 9, 9) == 1 << 3 | 1 << 9


def test_a_write_after_a_read_is_a_touch_that_reclaim_sees(device: Device) -> None:
    read(device, 3, 3)
    read(device, 9)
    device.write(3 * PAGE, CONTENT[3 * PAGE : 4 * PAGE])
    assert device.references[0] == TOUCHED


def test_what_is_being_compressed_keeps_its_marks_when_the_hand_comes_by(device: Device) -> None:
    read(device, 3, 3)
    read(device, 9)
    mark = device.references[0]
    device.reclaiming.add(0)
    hand_comes_by(device)
    assert device.references[0] == mark


def test_with_much_memory_any_page_of_a_cluster_that_was_read_becomes_resident(device: Device) -> None:
    device.budget.free_pages = 2 * device.budget.stop_above + 1
    assert read(device, 3) == 0
    assert read(device, 4) == 1 << 4


def test_without_memory_to_spare_nothing_does_and_reclaim_is_asked_for_some(device: Device) -> None:
    asked: list[int] = []
    device.budget.attach(lambda: asked.append(1))
    device.budget.free_pages = device.budget.wake_below
    assert read(device, 3, 3, 3) == 0
    assert asked
