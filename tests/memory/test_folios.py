"""Whole clusters in one folio each: by a kernel that does it, and by a second map alone, where each page is one."""

import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest
from hypothesis import settings

from nbdram.memory.device import Device
from tests.helpers import CLUSTER, GIB, MIB, PAGE, hot_pages, lone_device
from tests.memory.evicting import evict
from tests.memory.machine import DeviceMachine
from tests.memory.receiving import begin, receive

_SIZES: Final = Path("/sys/kernel/mm/transparent_hugepage")
_SETTING: Final = _SIZES / "hugepages-64kB/shmem_enabled"
_HAS_KERNEL: Final = os.access(_SETTING, os.W_OK)
_KINDS: Final = ["second map", *(["kernel"] if _HAS_KERNEL else [])]


@contextmanager
def chosen(setting: Path, value: str) -> Iterator[None]:
    """One of the kernel's settings of huge pages is `value`; [] are around the choice that it had."""
    before = setting.read_text().split("[")[1].split("]")[0]
    setting.write_text(value)
    try:
        yield
    finally:
        setting.write_text(before)


@pytest.fixture
def advised() -> Iterator[None]:
    with chosen(_SETTING, "advise"):
        yield


@pytest.fixture(params=_KINDS)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    with chosen(_SETTING, "advise" if request.param == "kernel" else "never") if _HAS_KERNEL else ExitStack():
        yield request.param


def with_folios(made: Device, kind: str) -> Device:
    if kind == "second map":
        if made.folio_view:
            made.folio_view.release()
        made.backing.folios = mmap.mmap(made.backing.hot_fd, len(made.hot))
        made.folio_view = memoryview(made.backing.folios)
    assert made.folio_view
    return made


@pytest.fixture
def made(kind: str) -> Device:
    return with_folios(lone_device(GIB, 64 * MIB), kind)


def used(made: Device) -> int:
    """What of the budget is in use, in pages; what the kernel says must be as much."""
    counted = made.resident_pages + made.index_pages + made.cold_pages
    assert hot_pages(made) == made.resident_pages
    assert 64 * MIB // PAGE - made.budget.free_pages == counted
    return counted


# -- the machine -------------------------------------------------------------------------------------


class SecondMapMachine(DeviceMachine):
    kind = "second map"

    def __init__(self) -> None:
        super().__init__()
        with_folios(self.device, self.kind)

    def surplus(self) -> int:
        return len(self.live) * (CLUSTER // PAGE - 1)  # of the cluster that each is received into


class KernelMachine(SecondMapMachine):
    kind = "kernel"


TestSecondMap = SecondMapMachine.TestCase
TestSecondMap.settings = settings(max_examples=30, stateful_step_count=40)

if _HAS_KERNEL:
    TestKernel = pytest.mark.usefixtures("advised")(KernelMachine.TestCase)
    TestKernel.settings = settings(max_examples=30, stateful_step_count=40)


# -- a WRITE to whole clusters -----------------------------------------------------------------------


def test_what_comes_in_pieces_is_what_was_sent(made: Device) -> None:
    data = os.urandom(4 * CLUSTER)
    incoming = begin(made, CLUSTER, 5 * CLUSTER)
    incoming.write(memoryview(data)[: CLUSTER + 100])
    assert receive(incoming, data[CLUSTER + 100 :])
    assert made.read(0, 6 * CLUSTER) == bytes(CLUSTER) + data + bytes(CLUSTER)
    assert used(made) == 4 * 16 + 1


def test_what_comes_at_once_is_what_was_sent(made: Device) -> None:
    data = os.urandom(3 * CLUSTER)
    made.write(CLUSTER, data)
    assert made.read(0, 5 * CLUSTER) == bytes(CLUSTER) + data + bytes(CLUSTER)
    assert used(made) == 3 * 16 + 1


def test_a_cold_cluster_that_is_written_anew_gives_its_image_back(made: Device) -> None:
    made.write(0, b"o" * CLUSTER)
    assert evict(made, 0)
    assert receive(begin(made, 0, CLUSTER), b"n" * CLUSTER)
    assert made.read(0, CLUSTER) == b"n" * CLUSTER
    assert made.cold_pages == 0
    assert used(made) == 16 + 1


def test_zeros_become_holes(made: Device) -> None:
    assert receive(begin(made, 0, 3 * CLUSTER), b"a" * CLUSTER + bytes(CLUSTER) + b"b" * CLUSTER)
    assert made.read(0, 3 * CLUSTER) == b"a" * CLUSTER + bytes(CLUSTER) + b"b" * CLUSTER
    assert used(made) == 2 * 16 + 1


@pytest.mark.parametrize("arrived", [1, PAGE, 2 * PAGE + 100, CLUSTER, CLUSTER + 1, CLUSTER + 3 * PAGE])
def test_an_abandoned_write_leaves_whole_pages_and_nothing_else(made: Device, arrived: int) -> None:
    incoming = begin(made, 0, 2 * CLUSTER)
    receive(incoming, b"a" * arrived)
    incoming.abandon()
    whole = arrived // PAGE
    assert made.read(0, 2 * CLUSTER) == b"a" * whole * PAGE + bytes(2 * CLUSTER - whole * PAGE)
    assert used(made) == (whole + 1 if whole else 0)


def test_an_abandoned_write_leaves_what_others_wrote_behind_it(made: Device) -> None:
    incoming = begin(made, 0, CLUSTER)
    receive(incoming, b"a" * (2 * PAGE + 100))
    made.write(2 * PAGE, b"b" * PAGE)
    made.write(9 * PAGE, b"c" * PAGE)
    incoming.abandon()
    expected = b"a" * 2 * PAGE + b"b" * PAGE + bytes(6 * PAGE) + b"c" * PAGE + bytes(6 * PAGE)
    assert made.read(0, CLUSTER) == expected
    assert used(made) == 4 + 1


def test_of_two_writes_to_one_cluster_the_other_goes_on(made: Device) -> None:
    first, second = begin(made, 0, CLUSTER), begin(made, 0, CLUSTER)
    receive(first, b"a" * (3 * PAGE + 100))
    receive(second, b"b" * (5 * PAGE + 100))
    first.abandon()
    assert receive(second, b"b" * (11 * PAGE - 100))
    assert made.read(0, CLUSTER) == b"b" * CLUSTER
    assert used(made) == 16 + 1


@pytest.mark.parametrize("arrived", [PAGE, 8 * PAGE, 8 * PAGE + 100, 15 * PAGE])
def test_pages_that_are_discarded_while_the_rest_comes_are_not_taken_again(made: Device, arrived: int) -> None:
    incoming = begin(made, 0, CLUSTER)
    receive(incoming, b"a" * arrived)
    list(made.trim(0, CLUSTER))
    assert receive(incoming, b"b" * (CLUSTER - arrived))
    whole = arrived // PAGE
    left = made.read(0, CLUSTER)
    assert left == bytes(whole * PAGE) + b"a" * (arrived % PAGE) + b"b" * (CLUSTER - arrived)
    assert used(made) == 16 - whole + 1


def test_a_cluster_that_is_received_later_is_not_taken_as_a_whole_when_it_was_discarded(made: Device) -> None:
    incoming = begin(made, 0, 2 * CLUSTER)
    made.write(CLUSTER, b"o" * PAGE)
    list(made.trim(CLUSTER, 2 * CLUSTER))
    assert receive(incoming, b"a" * 2 * CLUSTER)
    assert made.read(0, 2 * CLUSTER) == b"a" * 2 * CLUSTER
    assert used(made) == 2 * 16 + 1


def test_a_part_of_a_cluster_can_be_given_back(made: Device) -> None:
    made.write(0, b"a" * CLUSTER)
    list(made.trim(3 * PAGE, 5 * PAGE))
    assert made.read(0, CLUSTER) == b"a" * 3 * PAGE + bytes(2 * PAGE) + b"a" * 11 * PAGE
    assert used(made) == 14 + 1


def test_a_device_that_grew_has_them_in_its_new_part(kind: str) -> None:
    made = with_folios(lone_device(CLUSTER, 64 * MIB), kind)
    made.write(0, b"a" * CLUSTER)
    made.resize(GIB)
    assert bool(made.folio_view) is (kind == "kernel")
    assert receive(begin(made, GIB - CLUSTER, GIB), b"b" * CLUSTER)
    assert made.read(0, CLUSTER) == b"a" * CLUSTER
    assert made.read(GIB - CLUSTER, CLUSTER) == b"b" * CLUSTER
    assert used(made) == 2 * 16 + 2


# -- what the kernel does ----------------------------------------------------------------------------


def folios_taken() -> int:
    return int((_SETTING.parent / "stats/shmem_alloc").read_text())


class TestKernelsFolios:
    __test__ = _HAS_KERNEL

    @pytest.mark.usefixtures("advised")
    def test_a_cluster_takes_one_folio_and_a_page_takes_a_page(self) -> None:
        made = lone_device(GIB, 64 * MIB)
        before = folios_taken()
        made.write(0, os.urandom(4 * CLUSTER))
        incoming = begin(made, MIB, 2 * MIB)
        receive(incoming, os.urandom(PAGE + 100))
        assert receive(incoming, os.urandom(MIB - PAGE - 100))
        assert folios_taken() - before >= 20
        made.write(100 * MIB, b"x")
        made.write(200 * MIB + PAGE, b"x" * 3 * PAGE)
        assert hot_pages(made) == 20 * 16 + 1 + 3

    @pytest.mark.parametrize("size", [3 * CLUSTER, MIB, GIB + PAGE, 64 * GIB])
    def test_a_cluster_takes_no_more_than_itself_even_where_larger_folios_are_on(self, size: int) -> None:
        with ExitStack() as stack:
            for setting in _SIZES.glob("hugepages-*kB/shmem_enabled"):
                stack.enter_context(chosen(setting, "advise"))
            made = lone_device(size, 64 * MIB)
            assert made.folio_view
            assert hot_pages(made) == 0
            made.write(CLUSTER, b"x" * CLUSTER)
            assert hot_pages(made) == 16
            made.write(0, b"x")
            assert hot_pages(made) == 17

    def test_a_server_does_without_where_the_kernel_has_it_off(self) -> None:
        with chosen(_SETTING, "never"):
            assert lone_device(GIB, 64 * MIB).folio_view is None
