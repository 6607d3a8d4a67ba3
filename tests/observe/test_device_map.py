"""Maps of devices, held against what the device itself says is where."""

import random
from collections import Counter

from nbdram.memory.device import Device
from nbdram.memory.layout import Tier
from nbdram.observe import device_map

from ..helpers import CLUSTER, GIB, MIB, PAGE, TIB, lone_device
from ..memory.evicting import evict


def made(size: int = TIB) -> Device:
    return lone_device(size, 512 * MIB)


def drawn_bytes(drawn: device_map.DeviceMap) -> list[float]:
    """Bytes by tier, as the cells tell them: to a 255th of a cell."""
    return [sum(drawn.cells[tier::5]) / 255 * drawn.cell_bytes for tier in range(4)]


def test_a_device_that_was_never_written_has_no_cells() -> None:
    drawn = device_map.draw(made())
    assert (drawn.spans, drawn.cells, drawn.complete) == ([], b"", True)


def test_only_what_was_written_is_drawn() -> None:
    device = made()
    device.write(3 * CLUSTER, b"x" * CLUSTER)
    device.write(TIB - CLUSTER, b"x" * PAGE)
    drawn = device_map.draw(device)
    assert drawn.spans == [(3 * CLUSTER, 4 * CLUSTER), (TIB - CLUSTER, TIB)]
    assert drawn.cell_bytes == CLUSTER
    assert drawn.cells == bytes((255, 0, 0, 0, 255, 16, 0, 0, 0, 255))


def test_drawing_allocates_nothing() -> None:
    device = made()
    device.write(5 * GIB, b"x" * PAGE)
    before = device.backing.allocated_bytes()
    device_map.draw(device)
    assert device.backing.allocated_bytes() == before


def test_cells_tell_what_the_extents_tell() -> None:
    device = made()
    chance = random.Random(1)
    for cluster in chance.sample(range(4000), 900):
        device.write(cluster * CLUSTER + chance.randrange(16) * PAGE, b"some text " * 1000)
    for cluster in range(0, 4000, 3):
        if device.word(cluster):
            evict(device, cluster)
    for cluster in range(0, 4000, 9):
        device.write(cluster * CLUSTER, b"y" * PAGE)
    drawn = device_map.draw(device, 100)
    expected: Counter[int] = Counter()
    for start, end, tier in device.extents(0, 4000 * CLUSTER):
        expected[tier] += end - start
    assert len(drawn.cells) <= 5 * 100
    resident, compressed, disk, remote = drawn_bytes(drawn)
    slack = 100 * drawn.cell_bytes / 255
    assert expected[Tier.RESIDENT] <= resident <= expected[Tier.RESIDENT] + slack
    assert expected[Tier.RAM] <= compressed <= expected[Tier.RAM] + slack
    assert disk == remote == 0


def test_pages_on_disk_and_in_a_remote_are_told_apart() -> None:
    words = b"".join(
        word.to_bytes(8, "little")
        for word in (
            *(0xFFFFFFFF, 0x3 | 0x800 << 32 | Tier.RAM << 50, 0x10001 | 0x800 << 32 | Tier.DISK << 50, 0),
            *(0x7 | 0x800 << 32 | Tier.REMOTE << 50, 0x800 << 32 | Tier.REMOTE << 50),
        )
    )
    assert device_map._pages_by_tier(words) == (16 + 2 + 1 + 3, 14, 15, 13 + 16)


def test_a_scattered_device_has_a_bounded_number_of_cells() -> None:
    device = made()
    for at in range(0, TIB, 4 * GIB):
        device.write(at, b"x" * 20 * CLUSTER)
    drawn = device_map.draw(device)
    assert len(drawn.spans) == 256
    assert len(drawn.cells) <= 5 * device_map.MAX_CELLS
    assert sum(drawn.cells[0::5]) * drawn.cell_bytes / 255 >= 256 * 20 * CLUSTER
