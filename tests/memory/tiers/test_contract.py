"""What every tier promises, each tier by the same tests."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nbdram.memory.codec import IntegrityError
from nbdram.memory.layout import cold_word
from tests.helpers import CLUSTER, GIB
from tests.memory.tiers.rigs import RIGS, Rig

LAST = GIB // CLUSTER - 1
NOISE = random.Random(1).randbytes(CLUSTER)
TEXT = (b"All work and no play makes Jack a dull boy. " * 2000)[:CLUSTER]


@pytest.fixture(params=RIGS)
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    servers = request.getfixturevalue("redis_cluster") if request.param == "remote" else None
    with RIGS[request.param](tmp_path, servers) as made:
        yield made


@pytest.mark.parametrize("length", [1, 2, 4067, 4068, 4069, 4095, 4096, 4097, 20000, CLUSTER - 1, CLUSTER])
def test_an_image_of_any_length_comes_back(rig: Rig, length: int) -> None:
    for cluster in (0, 1, 4711, LAST):
        for slot in (0, 1):
            rig.store(rig.first, cluster, slot, NOISE[:length])
            assert rig.load(rig.first, cluster, slot, length) == NOISE[:length]


def test_the_slots_of_a_cluster_and_its_neighbours_do_not_touch_each_other(rig: Rig) -> None:
    images = {(cluster, slot): bytes([cluster, slot]) * (CLUSTER // 2) for cluster in (6, 7, 8) for slot in (0, 1)}
    for place, image in images.items():
        rig.store(rig.first, *place, image)
    rig.drop(rig.first, 7, 0, CLUSTER)
    rig.store(rig.first, 7, 0, b"short")
    assert rig.load(rig.first, 7, 0, 5) == b"short"
    for place, image in images.items():
        if place != (7, 0):
            assert rig.load(rig.first, *place, CLUSTER) == image


def test_dropping_an_image_gives_all_of_it_back(rig: Rig) -> None:
    assert rig.used_bytes() == 0
    for cluster, length in ((0, 1), (3, 4096), (3000, 4097), (LAST, CLUSTER)):
        rig.store(rig.first, cluster, 1, NOISE[:length])
        assert length <= rig.used_bytes() <= length + 2 * 4096
        rig.drop(rig.first, cluster, 1, length)
        assert rig.used_bytes() == 0


def test_what_is_used_is_what_is_stored_in_both_devices(rig: Rig) -> None:
    rig.store(rig.first, 5, 0, NOISE[:10000])
    one = rig.used_bytes()
    rig.store(rig.second, 5, 0, NOISE[:10000])
    assert rig.used_bytes() == 2 * one
    rig.drop(rig.first, 5, 0, 10000)
    assert rig.used_bytes() == one
    assert rig.load(rig.second, 5, 0, 10000) == NOISE[:10000]


def test_a_device_does_not_read_what_another_has_stored(rig: Rig) -> None:
    rig.store(rig.first, 5, 0, TEXT)
    try:
        found = rig.load(rig.second, 5, 0, CLUSTER)
    except OSError:
        return
    assert found == bytes(CLUSTER)


def test_a_flipped_bit_is_noticed_before_the_image_is_used(rig: Rig) -> None:
    parts = rig.first.codec.encode(memoryview(NOISE[: CLUSTER // 2] + TEXT[CLUSTER // 2 :]))
    assert parts
    image = b"".join(parts)
    word = cold_word(len(image), 1, rig.tier)
    rig.store(rig.first, 9, 1, image)
    rig.flip_a_bit(rig.first, 9, 1)
    with pytest.raises(IntegrityError):
        rig.first.decode_quietly(9, word, 0, CLUSTER, rig.first.load_image(9, word))


def test_an_image_that_was_dropped_is_an_error_when_it_is_used(rig: Rig) -> None:
    parts = rig.first.codec.encode(memoryview(TEXT))
    assert parts
    image = b"".join(parts)
    word = cold_word(len(image), 0, rig.tier)
    rig.store(rig.first, 9, 0, image)
    rig.drop(rig.first, 9, 0, len(image))
    with pytest.raises((IntegrityError, OSError), match=r"short read|not what was stored|does not match|is missing"):
        rig.first.decode_quietly(9, word, 0, CLUSTER, rig.first.load_image(9, word))


def test_images_can_be_stored_and_loaded_from_many_threads_at_once(rig: Rig) -> None:
    def there_and_back(cluster: int) -> bool:
        image = random.Random(cluster).randbytes(1 + 700 * cluster % CLUSTER)
        rig.store(rig.first, cluster, cluster & 1, image)
        return rig.load(rig.first, cluster, cluster & 1, len(image)) == image

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(there_and_back, range(100)))
