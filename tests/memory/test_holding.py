"""What READs hold: counted before it is there, and measured when it may have grown."""

import asyncio
import mmap
import subprocess
import sys

from nbdram.memory.budget import Budget
from nbdram.memory.holding import Holding
from nbdram.memory.layout import PAGE
from nbdram.memory.reclaim import anonymous_bytes
from tests.helpers import CLUSTER, MIB, eventually


async def test_those_that_need_more_than_is_free_wait_for_others_to_end_and_one_may_always_go_on() -> None:
    budget, holding = Budget(100 * PAGE), Holding()
    begun: list[int] = []
    ends = [asyncio.Event() for _ in range(6)]

    async def read(number: int, pages: int) -> None:
        await holding.take(budget, pages)
        begun.append(number)
        await ends[number].wait()
        holding.give(pages)

    tasks = [asyncio.create_task(read(number, pages)) for number, pages in enumerate((40, 40, 40, 200, 1, 40))]
    await eventually(lambda: begun == [0, 1, 4])
    tasks[2].cancel()
    ends[0].set()
    await eventually(lambda: begun == [0, 1, 4, 5])
    for number in (1, 4, 5):
        assert 3 not in begun
        ends[number].set()
        await asyncio.gather(tasks[number])
    await eventually(lambda: begun[-1] == 3)
    ends[3].set()
    await asyncio.gather(*tasks, return_exceptions=True)
    budget.set_limit(0)
    await holding.take(budget, 1)


def test_the_process_is_measured_after_each_mib_that_it_may_have_grown() -> None:
    measured = []
    budget = Budget(64 * MIB)
    budget.may_have_grown(10 * MIB)  # by nobody yet
    budget.attach(lambda: None, lambda: measured.append(1))
    for _ in range(64):
        budget.may_have_grown(CLUSTER)
    assert len(measured) == 4


def test_what_is_measured_is_what_the_kernel_calls_anonymous() -> None:
    with open("/proc/self/status") as status:
        (before,) = (int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))
    with mmap.mmap(-1, 32 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:  # of no memory that was freed
        for page in range(0, 32 * MIB, PAGE):
            held[page] = 1
        assert 31 * MIB <= anonymous_bytes() - before <= 40 * MIB


def test_threads_take_what_they_allocate_from_one_arena() -> None:
    """glibc puts each arena of its own at a multiple of 64 MiB, and reserves all addresses up to the next one."""
    code = """if True:
        import sys, threading
        from nbdram.memory.malloc import share_one_arena
        if sys.argv[1] == "shared":
            assert share_one_arena()
        barrier = threading.Barrier(5)
        def work():
            held = bytearray(50000)
            barrier.wait(); barrier.wait()
        for _ in range(4):
            threading.Thread(target=work).start()
        barrier.wait()
        areas = [line.split()[:2] for line in open("/proc/self/maps")]
        barrier.wait()
        found = 0
        for (used, how), (rest, how_rest) in zip(areas, areas[1:]):
            start, end, rest_start, rest_end = (int(at, 16) for at in (used + "-" + rest).split("-"))
            is_heap = (how, how_rest) == ("rw-p", "---p") and end == rest_start
            found += is_heap and start % (64 << 20) == 0 and rest_end - start == 64 << 20
        print(found)
    """
    arenas = {
        how: int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, check=True).stdout)
        for how in ("shared", "own")
    }
    assert arenas["shared"] == 0 < arenas["own"]


def test_what_was_freed_among_what_is_needed_goes_back_to_the_kernel() -> None:
    code = """if True:
        from nbdram.memory.malloc import give_back_what_is_free
        from nbdram.memory.reclaim import anonymous_bytes
        held = [bytearray(20000) for _ in range(1000)]
        del held[:-1]
        before = anonymous_bytes()
        give_back_what_is_free()
        print(before - anonymous_bytes())
    """
    given_back = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert 15 * MIB < given_back < 25 * MIB
