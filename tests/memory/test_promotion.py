"""Which pages of a cold cluster become resident again, and when."""

import errno
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdram.memory.budget import Budget
from nbdram.memory.clock import Clock
from nbdram.memory.device import Device
from nbdram.memory.layout import IDLE, RESIDENT, TOUCHED, WANTED, Reference, Tier, cold_word
from nbdram.memory.space import FarImage
from nbdram.memory.tiers.disk import SwapArea
from nbdram.server.exports import Exports
from tests.helpers import CLUSTER, MIB, PAGE

from .evicting import evict

CONTENT = b"".join(b"page %2d\n" % page * (PAGE // 8) for page in range(16))
NOISE = random.Random(1).randbytes(CLUSTER)


@pytest.fixture
def device() -> Iterator[Device]:
    """Its cluster 0 is compressed, and there is some memory to spare, but not much."""
    made = Device("paged", MIB, Budget(64 * MIB))
    made.budget.attach(lambda: None)
    made.write(0, CONTENT)
    assert evict(made, 0)
    spare_some(made)
    yield made
    made.close()


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Device]:
    """The same with its cluster on a disk."""
    area = SwapArea(tmp_path, 0)
    exports = Exports(Budget(64 * MIB), [area])
    made = exports.create("far", MIB).device
    made.budget.attach(lambda: None)
    made.write(0, NOISE)
    assert made.disk
    made.disk.writer.submit(made.disk.store, 0, 0, NOISE).result()
    made.take_images(0, [cold_word(CLUSTER, 0, Tier.DISK)])
    spare_some(made)
    yield made
    exports.close()
    area.close()


def spare_some(device: Device) -> None:
    device.budget.free_pages = device.budget.stop_above
    assert device.budget.has_spare()
    assert not device.budget.has_spare(much=True)


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


# -- below RAM, where each image that is fetched counts ------------------------------------------------


def fetch(device: Device, *pages: int, image: FarImage | None = None) -> int:
    """Read pages, each out of an image that is fetched for it, or all out of one; the resident pages afterwards."""
    for page in pages:
        fetched = image or FarImage()
        fetched.content = NOISE
        ((_, _, buffers),) = device.gather(page * PAGE, (page + 1) * PAGE, {0: fetched})
        assert b"".join(buffers) == NOISE[page * PAGE : (page + 1) * PAGE]
    return device.words[0] & RESIDENT


def test_what_is_read_when_a_far_image_is_fetched_for_the_third_time_becomes_resident(far: Device) -> None:
    assert fetch(far, 3, 4) == 0
    assert fetch(far, 5) == 1 << 5
    assert fetch(far, 6) == 1 << 5 | 1 << 6


def test_far_images_that_are_read_seldom_are_read_through(far: Device) -> None:
    for _ in range(4):
        assert fetch(far, 3, 3) == 0
        hand_comes_by(far)
        assert far.references[0] == Reference.FAR


@pytest.mark.parametrize("first", [Reference.FAR, Reference.REMOTE])
def test_the_hand_takes_a_far_image_s_touches_away(far: Device, first: Reference) -> None:
    far.references[0] = first
    states = []
    for _ in range(2):
        fetch(far, 3)
        states.append(far.references[0])
        hand_comes_by(far)
        assert far.references[0] == first
        fetch(far, *[3] * len(states))
    assert len({int(first), *states, far.references[0]}) == 3


def test_all_that_is_read_of_one_far_image_counts_once(far: Device) -> None:
    in_order = FarImage()
    assert fetch(far, *range(16), image=in_order) == 0
    assert far.references[0] == Reference.FAR_TOUCHED
    assert fetch(far, 3) == 0
    assert fetch(far, 3, 4, image=FarImage()) == 1 << 3 | 1 << 4


def test_beside_resident_pages_a_far_image_counts_from_when_the_hand_came_by(far: Device) -> None:
    fetch(far, 3, 3, 3)
    assert far.references[0] == WANTED
    hand_comes_by(far)
    assert far.references[0] == IDLE
    assert fetch(far, 9, 9) == 1 << 3
    assert fetch(far, 9) == 1 << 3 | 1 << 9
    far.read(3 * PAGE, PAGE)
    assert far.references[0] == WANTED


def test_with_much_memory_what_is_first_read_of_a_far_image_becomes_resident(far: Device) -> None:
    far.budget.free_pages = 2 * far.budget.stop_above + 1
    assert fetch(far, 3) == 1 << 3


def test_without_memory_to_spare_nothing_of_a_far_image_does_and_reclaim_is_asked_for_some(far: Device) -> None:
    asked: list[int] = []
    far.budget.attach(lambda: asked.append(1))
    far.budget.free_pages = far.budget.wake_below
    assert fetch(far, 3, 3) == 0
    assert not asked
    assert fetch(far, 3) == 0
    assert asked
    assert far.references[0] == Reference.FAR_TWICE


def test_where_a_far_image_s_page_finds_no_room_the_cluster_stays_cold(
    far: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(far, "put", full)
    assert fetch(far, 3, 3, 3, 3) == 0
    assert far.references[0] == Reference.FAR_TWICE


def test_a_write_to_a_far_cluster_that_is_read_often_is_a_touch(far: Device) -> None:
    fetch(far, 3, 3)
    far.write(3 * PAGE, NOISE[:PAGE])
    assert far.references[0] == TOUCHED
