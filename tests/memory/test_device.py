"""A device against a model, and its promises one by one."""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdram.errors import NbdramError
from nbdram.memory.budget import Budget
from nbdram.memory.device import Device
from nbdram.memory.layout import Tier, page_runs
from nbdram.memory.space import Copies
from tests.helpers import CLUSTER, GIB, MIB, PAGE, TIB, hot_pages, index_pages, lone_device
from tests.memory.evicting import evict
from tests.memory.machine import DeviceMachine
from tests.memory.receiving import begin, receive
from tests.memory.tiers.mounts import mounted

TestDeviceAgainstModel = DeviceMachine.TestCase
TestDeviceAgainstModel.settings = settings(max_examples=50, stateful_step_count=40)

TEXT = b"All work and no play makes Jack a dull boy. " * 3000
NOISE = random.Random(1).randbytes(CLUSTER)


def device(size: int = GIB, budget: int = 64 * MIB) -> Device:
    return lone_device(size, budget)


def pages_of(device: Device) -> tuple[int, int]:
    """Pages that exist in (`hot`, `index`), as the kernel counts them."""
    return hot_pages(device), index_pages(device)


def steps(work: Iterator[None]) -> int:
    """Do it all, and count the steps."""
    return sum(1 for _ in work)


# -- holes, pages, extents ---------------------------------------------------------------------------


def test_an_untouched_device_has_no_pages_and_is_one_hole() -> None:
    made = device(TIB)
    assert list(made.extents(0, TIB)) == [(0, TIB, Tier.HOLE)]
    assert pages_of(made) == (0, 0)


def test_reading_holes_allocates_nothing() -> None:
    made = device(TIB)
    made.write(CLUSTER, b"x")
    before = pages_of(made)
    for offset, length in (
        (0, 1),
        (PAGE - 1, 2),
        (CLUSTER - PAGE, 3 * PAGE),
        (CLUSTER + PAGE, CLUSTER),
        (GIB, 32 * MIB),
    ):
        content = made.read(offset, length)
        assert len(content) == length
        assert content.count(0) == length - (offset < CLUSTER < offset + length)
    assert list(made.extents(0, TIB))[-1] == (CLUSTER + CLUSTER, TIB, Tier.HOLE)
    assert pages_of(made) == before == (1, 1)


def test_a_write_allocates_the_pages_that_it_touches_and_no_others() -> None:
    made = device()
    made.write(3 * PAGE - 1, b"ab")
    assert pages_of(made) == (2, 1)
    assert list(made.extents(0, CLUSTER)) == [
        (0, 2 * PAGE, Tier.HOLE),
        (2 * PAGE, 4 * PAGE, Tier.RESIDENT),
        (4 * PAGE, CLUSTER, Tier.HOLE),
    ]


def test_a_full_page_write_over_a_cold_page_needs_no_fault() -> None:
    made = device()
    made.write(0, TEXT[:CLUSTER])
    assert evict(made, 0)
    made.write(PAGE, NOISE[:PAGE])
    assert hot_pages(made) == 1
    assert made.read(0, CLUSTER) == TEXT[:PAGE] + NOISE[:PAGE] + TEXT[2 * PAGE : CLUSTER]


def test_a_part_of_a_cold_page_is_written_over_its_old_content() -> None:
    made = device()
    made.write(0, TEXT[:CLUSTER])
    assert evict(made, 0)
    made.write(PAGE + 100, b"new")
    assert hot_pages(made) == 1
    assert made.read(PAGE, PAGE) == TEXT[PAGE : PAGE + 100] + b"new" + TEXT[PAGE + 103 : 2 * PAGE]


def test_writing_all_of_a_cold_cluster_gives_its_image_back() -> None:
    made = device()
    made.write(0, TEXT[:CLUSTER])
    assert evict(made, 0)
    assert made.ram.allocated_bytes() > 0
    made.write(0, NOISE)
    assert made.ram.allocated_bytes() == 0
    assert made.read(0, CLUSTER) == NOISE


def test_extents_of_a_part_of_a_page_are_cut_to_it() -> None:
    made = device()
    made.write(0, b"x" * 3 * PAGE)
    assert list(made.extents(10, 20)) == [(10, 20, Tier.RESIDENT)]
    assert list(made.extents(3 * PAGE - 1, 3 * PAGE + 1)) == [
        (3 * PAGE - 1, 3 * PAGE, Tier.RESIDENT),
        (3 * PAGE, 3 * PAGE + 1, Tier.HOLE),
    ]


def test_a_cold_page_is_no_hole() -> None:
    made = device()
    made.write(0, TEXT[:CLUSTER])
    assert evict(made, 0)
    ((start, end, tier),) = made.extents(0, CLUSTER)
    assert (start, end) == (0, CLUSTER)
    assert tier not in (Tier.HOLE, Tier.RESIDENT)


@pytest.mark.parametrize("size", [PAGE, CLUSTER - PAGE, CLUSTER + PAGE, 32 * MIB + PAGE, 64 * TIB])
def test_both_ends_of_a_device_of_any_size_can_be_written(size: int) -> None:
    made = device(size)
    made.write(0, b"first")
    made.write(size - 4, b"last")
    assert made.read(0, 5) == b"first"
    assert made.read(size - 4, 4) == b"last"
    assert pages_of(made) == ((1, 1) if size == PAGE else (2, 2 if size > 32 * MIB else 1))
    assert steps(made.trim(0, size)) <= 2
    assert pages_of(made) == (0, 0)
    made.close()


def test_more_than_the_address_space_is_refused_in_words_and_leaves_nothing_behind() -> None:
    budget = Budget(MIB)
    made = [Device("first", 64 * TIB, budget)]
    with pytest.raises(NbdramError, match="address space"):
        made.append(Device("second", 64 * TIB, budget))
    made.pop().close()
    Device("third", 64 * TIB, budget).close()


@given(st.integers(0, 0xFFFF))
def test_page_runs_are_the_runs_of_bits(mask: int) -> None:
    runs = page_runs(mask)
    assert sum(((1 << after) - 1) & ~((1 << first) - 1) for first, after in runs) == mask
    assert all(first < after for first, after in runs)
    assert all(runs[i][1] < runs[i + 1][0] for i in range(len(runs) - 1))


# -- giving back -------------------------------------------------------------------------------------


def test_trimming_gives_pages_index_and_budget_back() -> None:
    made = device()
    free = made.budget.free_pages
    made.write(100, b"x" * 5 * CLUSTER)
    made.write(40 * MIB, b"y")
    assert index_pages(made) == 2
    steps(made.trim(0, 32 * MIB))
    assert pages_of(made) == (1, 1)
    steps(made.trim(0, GIB))
    assert pages_of(made) == (0, 0)
    assert made.budget.free_pages == free


def test_trimming_parts_of_pages_leaves_them_alone() -> None:
    made = device()
    made.write(0, b"x" * 4 * PAGE)
    steps(made.trim(1, 3 * PAGE - 1))
    assert made.read(0, 4 * PAGE) == b"x" * PAGE + bytes(PAGE) + b"x" * 2 * PAGE
    steps(made.trim(10, 20))
    assert made.read(0, PAGE) == b"x" * PAGE


def test_zeroing_parts_of_pages_zeroes_them_to_the_byte() -> None:
    made = device()
    made.write(0, b"x" * 4 * PAGE)
    steps(made.zero(1, 3 * PAGE - 1))
    assert made.read(0, 4 * PAGE) == b"x" + bytes(3 * PAGE - 2) + b"x" * (PAGE + 1)
    assert hot_pages(made) == 3


def test_zeroing_a_part_of_a_hole_allocates_nothing() -> None:
    made = device()
    steps(made.zero(1, CLUSTER - 1))
    steps(made.zero(10, 20))
    assert pages_of(made) == (0, 0)


def test_zeros_that_must_stay_allocated_are_resident() -> None:
    made = device()
    steps(made.zero(PAGE, 3 * CLUSTER, keep_allocated=True))
    assert hot_pages(made) == 47
    assert not any(made.read(0, 3 * CLUSTER))


def test_trimming_a_large_device_costs_what_was_touched() -> None:
    made = device(TIB)
    rng = random.Random(7)
    clusters = sorted(rng.sample(range(TIB // CLUSTER), 300))
    for cluster in clusters:
        made.write(cluster * CLUSTER + PAGE, b"x")
    assert steps(made.trim(0, TIB)) == len(clusters)
    assert pages_of(made) == (0, 0)


def test_no_step_of_a_trim_gives_back_more_than_two_mebibytes() -> None:
    made = device(budget=128 * MIB)
    made.write(0, bytes(64 * MIB))
    trim = made.trim(PAGE, 64 * MIB - PAGE)
    count = 0
    while True:
        before = made.resident_pages
        if next(trim, "end") == "end":
            break
        assert before - made.resident_pages <= 2 * MIB // PAGE
        count += 1
    assert count == 32
    assert made.resident_pages == 2


def test_a_trim_that_others_come_between_gives_back_what_it_still_finds() -> None:
    made = device(budget=128 * MIB)
    made.write(0, b"x" * 8 * MIB)
    slow = made.trim(0, 8 * MIB)
    next(slow)
    steps(made.trim(4 * MIB, 8 * MIB))
    made.write(6 * MIB, b"new")
    next(slow)
    steps(slow)
    assert made.resident_pages == hot_pages(made)
    assert not any(made.read(0, 4 * MIB))
    assert made.read(6 * MIB, 3) in (b"new", bytes(3))


@dataclass
class Socket:
    """A sender that could not send its views yet."""

    device: Device
    told: list[tuple[int, int]] = field(default_factory=list)
    saw: bytes = b""

    def copy_out(self, copies: Copies) -> None:
        self.told.append((copies.start, copies.end))
        self.saw += b"".join(copies.of(copies.start, copies.start + 4))
        self.device.senders.discard(self)

    def __hash__(self) -> int:
        return id(self)


@pytest.mark.parametrize("way", ["trim", "zero", "evict"])
def test_a_sender_is_told_before_pages_go(way: str) -> None:
    made = device()
    made.write(0, TEXT[:CLUSTER])
    socket = Socket(made)
    made.senders.add(socket)
    if way == "evict":
        evict(made, 0)
    else:
        steps(made.trim(0, CLUSTER) if way == "trim" else made.zero(0, CLUSTER))
    assert socket.told == [(0, CLUSTER)]
    assert socket.saw == TEXT[:4], "the pages were gone before the sender could copy them"
    assert hot_pages(made) == 0


def test_what_was_read_stays_what_it_was_when_its_cold_image_goes() -> None:
    made = device()
    made.write(0, NOISE[: 16 * 1024] + TEXT[: CLUSTER - 16 * 1024])  # one block that does not compress
    assert evict(made, 0)
    word = made.word(0)
    pieces = made.decode(0, word, 0, 16 * 1024)
    made.write(0, bytes(CLUSTER))
    assert b"".join(pieces) == NOISE[: 16 * 1024]


# -- running out -------------------------------------------------------------------------------------


def test_a_write_that_finds_no_memory_changes_nothing() -> None:
    made = device(budget=64 * PAGE)
    made.write(0, b"x" * 50 * PAGE)
    free, pages = made.budget.free_pages, pages_of(made)
    with pytest.raises(OSError, match="budget"):
        made.write(49 * PAGE, b"y" * 20 * PAGE)
    assert made.read(0, 70 * PAGE) == b"x" * 50 * PAGE + bytes(20 * PAGE)
    assert (made.budget.free_pages, pages_of(made)) == (free, pages)


def test_a_full_device_can_be_written_where_it_has_pages_and_trimmed() -> None:
    made = device(budget=17 * PAGE)
    made.write(0, b"x" * 16 * PAGE)
    assert made.budget.free_pages == 0
    made.write(10, b"y" * 3 * PAGE)
    steps(made.trim(8 * PAGE, 9 * PAGE))
    made.write(100 * PAGE, b"z")
    with pytest.raises(OSError, match="budget"):
        made.write(101 * PAGE, b"z")


def test_trimming_a_part_of_a_cold_cluster_needs_no_memory() -> None:
    made = device(budget=40 * PAGE)
    made.write(0, TEXT[: 2 * CLUSTER])
    assert evict(made, 0)
    made.budget.set_limit(made.budget.used_pages * PAGE)
    steps(made.trim(PAGE, CLUSTER + PAGE))
    assert made.read(0, PAGE) == TEXT[:PAGE]
    assert made.read(PAGE, PAGE) in (TEXT[PAGE : 2 * PAGE], bytes(PAGE))  # what was trimmed may stay
    assert made.read(CLUSTER, 2 * PAGE) == bytes(PAGE) + TEXT[CLUSTER + PAGE : CLUSTER + 2 * PAGE]
    with pytest.raises(OSError, match="budget"):
        steps(made.zero(PAGE, CLUSTER))


def test_zeros_that_must_stay_allocated_need_memory() -> None:
    made = device(budget=32 * PAGE)
    with pytest.raises(OSError, match="budget"):
        steps(made.zero(0, MIB, keep_allocated=True))
    assert not any(made.read(0, MIB))
    assert made.resident_pages == hot_pages(made)


def test_two_devices_share_one_budget() -> None:
    budget = Budget(20 * PAGE)
    first, second = Device("first", MIB, budget), Device("second", MIB, budget)
    first.write(0, b"x" * 12 * PAGE)
    with pytest.raises(OSError, match="budget"):
        second.write(0, b"x" * 12 * PAGE)
    first.close()
    second.write(0, b"x" * 12 * PAGE)


# -- payload that is received in pieces --------------------------------------------------------------


def test_a_write_in_pieces_shows_pages_as_they_are_complete() -> None:
    made = device()
    incoming = begin(made, PAGE, 4 * PAGE)
    assert not receive(incoming, b"a" * (PAGE + 10))
    assert made.read(0, 5 * PAGE) == bytes(PAGE) + b"a" * PAGE + bytes(3 * PAGE)
    assert not receive(incoming, b"b" * PAGE)
    assert receive(incoming, b"c" * (PAGE - 10))
    assert made.read(PAGE, 3 * PAGE) == b"a" * (PAGE + 10) + b"b" * PAGE + b"c" * (PAGE - 10)


def test_an_abandoned_write_leaves_whole_pages_and_gives_the_rest_back() -> None:
    made = device()
    free = made.budget.free_pages
    incoming = begin(made, 0, CLUSTER)
    assert made.budget.free_pages == free - 16
    receive(incoming, b"a" * (2 * PAGE + 100))
    assert hot_pages(made) == (16 if made.folio_view else 3)
    incoming.abandon()
    assert made.read(0, CLUSTER) == b"a" * 2 * PAGE + bytes(CLUSTER - 2 * PAGE)
    assert pages_of(made) == (2, 1)
    assert made.budget.free_pages == free - 3


def test_a_write_that_never_began_to_arrive_leaves_no_trace() -> None:
    made = device()
    free = made.budget.free_pages
    begin(made, 10, CLUSTER).abandon()
    assert pages_of(made) == (0, 0)
    assert made.budget.free_pages == free


def test_a_large_write_is_refused_before_its_first_byte_if_there_is_no_memory() -> None:
    made = device(budget=16 * PAGE)
    with pytest.raises(OSError, match="budget"):
        begin(made, 0, 17 * PAGE)
    assert made.budget.free_pages == 16
    assert not made.incoming


def test_an_abandoned_write_to_resident_pages_takes_nothing_away() -> None:
    made = device()
    made.write(0, b"o" * CLUSTER)
    incoming = begin(made, 0, CLUSTER)
    receive(incoming, b"n" * (PAGE + 512))
    incoming.abandon()
    assert made.read(0, CLUSTER) == b"n" * (PAGE + 512) + b"o" * (CLUSTER - PAGE - 512)
    assert made.resident_pages == hot_pages(made) == 16


def test_what_an_abandoned_write_left_in_a_page_survives_eviction() -> None:
    made = device()
    made.write(0, TEXT[:CLUSTER])
    assert evict(made, 0)
    incoming = begin(made, 100, 200)  # faults the page in, clean
    receive(incoming, b"n" * 50)
    incoming.abandon()
    seen = made.read(0, PAGE)
    assert seen in (TEXT[:PAGE], TEXT[:100] + b"n" * 50 + TEXT[150:PAGE])
    assert evict(made, 0)
    assert made.read(0, PAGE) == seen, "bytes that were there have gone"


def test_an_abandoned_write_to_cold_pages_leaves_them_old_or_new() -> None:
    made = device()
    made.write(0, TEXT[:CLUSTER])
    assert evict(made, 0)
    incoming = begin(made, 1000, CLUSTER - 1000)
    receive(incoming, b"n" * (2 * PAGE))
    incoming.abandon()
    content = made.read(0, CLUSTER)
    assert content[:1000] == TEXT[:1000]
    assert content[1000 : 2 * PAGE] == b"n" * (2 * PAGE - 1000)
    assert content[2 * PAGE + 1000 :] == TEXT[2 * PAGE + 1000 : CLUSTER]
    assert content[2 * PAGE : 2 * PAGE + 1000] in (TEXT[2 * PAGE : 2 * PAGE + 1000], b"n" * 1000)


def test_the_page_that_is_being_received_survives_a_trim() -> None:
    made = device()
    incoming = begin(made, 0, 2 * PAGE)
    receive(incoming, b"a" * 100)
    steps(made.trim(0, CLUSTER))
    assert hot_pages(made) == 1
    receive(incoming, b"b" * (2 * PAGE - 100))
    assert made.read(0, 2 * PAGE) == b"a" * 100 + b"b" * (2 * PAGE - 100)


def test_the_page_that_is_being_received_is_punched_when_that_is_abandoned_after_a_trim() -> None:
    made = device()
    made.write(0, b"o" * CLUSTER)
    incoming = begin(made, 0, 2 * PAGE)
    receive(incoming, b"a" * 100)
    steps(made.trim(0, CLUSTER))
    incoming.abandon()
    assert pages_of(made) == (0, 0)
    assert not any(made.read(0, CLUSTER))


@pytest.mark.parametrize("offset", [0, 512], ids=["its end", "its start"])
def test_zeros_stay_zeros_in_the_page_where_a_write_in_pieces_ends_or_starts(offset: int) -> None:
    made = device()
    made.write(0, b"o" * PAGE)
    incoming = begin(made, offset, offset + 1000)
    receive(incoming, b"n" * 10)
    steps(made.zero(0, PAGE))
    receive(incoming, b"n" * 990)
    assert made.read(0, PAGE) == bytes(offset) + b"n" * 1000 + bytes(PAGE - 1000 - offset)


def test_a_page_that_a_write_waits_to_receive_is_punched() -> None:
    made = device()
    made.write(0, b"o" * PAGE)
    incoming = begin(made, 0, PAGE)
    steps(made.trim(0, PAGE))
    assert hot_pages(made) == 0
    receive(incoming, b"n" * PAGE)
    assert made.read(0, PAGE) == b"n" * PAGE


@pytest.mark.parametrize("reads", [1, 2, 3])
def test_reading_a_cold_page_does_not_undo_what_a_write_has_received_of_it(reads: int) -> None:
    made = device()
    made.write(0, TEXT[:CLUSTER])
    assert evict(made, 0)
    incoming = begin(made, 0, CLUSTER)
    receive(incoming, b"n" * 100)
    for _ in range(reads):
        made.read(0, PAGE)
    receive(incoming, b"n" * (CLUSTER - 100))
    assert made.read(0, CLUSTER) == b"n" * CLUSTER


def test_writing_a_part_of_a_cold_page_does_not_undo_what_another_write_has_received_of_it() -> None:
    made = device()
    made.write(0, TEXT[:CLUSTER])
    assert evict(made, 0)
    incoming = begin(made, 0, CLUSTER)
    receive(incoming, b"n" * 100)
    made.write(200, b"other")
    receive(incoming, b"n" * (CLUSTER - 100))
    assert made.read(0, CLUSTER) == b"n" * CLUSTER


@pytest.mark.parametrize("arrived", [0, 100])
def test_a_page_that_finds_no_room_stays_cold_and_is_read_all_the_same(tmp_path: Path, arrived: int) -> None:
    with mounted(tmp_path, "tmpfs", "size=1m") as point:

        def open_file(kind: str, length: int) -> int:
            fd = os.open(point / kind, os.O_RDWR | os.O_CREAT)
            os.ftruncate(fd, length)
            return fd

        made = Device("test", MIB, Budget(64 * MIB), None, open_file)
        made.write(0, TEXT[:CLUSTER])
        assert evict(made, 0)
        incoming = begin(made, PAGE, 3 * PAGE)
        receive(incoming, b"n" * arrived)
        with (point / "other").open("wb", buffering=0) as other:
            while os.statvfs(point).f_bavail > 1:
                other.write(bytes(PAGE))
            for _ in range(3):
                content = made.read(0, CLUSTER)
                assert content[:PAGE] + content[3 * PAGE :] == TEXT[:PAGE] + TEXT[3 * PAGE : CLUSTER]
            assert made.resident_pages == 0
            assert hot_pages(made) == (arrived > 0)
        (point / "other").unlink()
        assert receive(incoming, b"n" * (2 * PAGE - arrived))
        assert made.read(0, CLUSTER) == TEXT[:PAGE] + b"n" * 2 * PAGE + TEXT[3 * PAGE : CLUSTER]
        made.close()


def test_two_writes_may_be_received_into_one_page() -> None:
    made = device()
    first, second = begin(made, 0, PAGE // 2), begin(made, PAGE // 2, PAGE)
    receive(first, b"a" * 100)
    receive(second, b"b" * 100)
    first.abandon()
    assert receive(second, b"b" * (PAGE // 2 - 100))
    assert made.read(PAGE // 2, PAGE // 2) == b"b" * (PAGE // 2)
    assert made.resident_pages == hot_pages(made) == 1


def test_memory_that_was_trimmed_under_a_write_is_counted_when_it_arrives() -> None:
    made = device(budget=100 * PAGE)
    made.write(0, b"o" * CLUSTER)
    free = made.budget.free_pages
    incoming = begin(made, 0, CLUSTER)
    steps(made.trim(0, CLUSTER))
    receive(incoming, b"n" * CLUSTER)
    assert made.budget.free_pages == free


def test_memory_that_another_write_has_made_needless_is_given_back_before_the_next_is_claimed() -> None:
    made = device(size=8 * MIB, budget=1000 * PAGE)
    first, second = begin(made, 0, 3 * MIB), begin(made, 0, 3 * MIB)
    receive(first, b"a" * MIB)
    receive(second, b"b" * MIB)
    assert made.budget.free_pages == 1000 - 1 - 256
    first.grant()
    second.grant()
    receive(first, b"a" * (MIB - 10))
    receive(second, b"b" * MIB)
    assert made.budget.free_pages == 1000 - 1 - 512 - 1  # the page that the first is receiving into
    first.abandon()
    second.abandon()
    assert made.budget.free_pages == 1000 - 1 - 512
    assert made.resident_pages == hot_pages(made) == 512
