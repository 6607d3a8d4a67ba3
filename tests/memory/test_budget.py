"""Those who wait for memory: in a queue, the first one first, whoever else would like some."""

import errno
from collections.abc import Callable

import pytest

from nbdram.memory.budget import Budget
from nbdram.memory.layout import PAGE

LIMIT = 16000  # pages


class Writer:
    """Wants pages, and waits if there are none; with `appetite` it wants as many again when it has got some."""

    def __init__(self, budget: Budget, name: str, pages: int, appetite: int = 0) -> None:
        self.budget, self.name, self.pages, self.appetite = budget, name, pages, appetite
        self.got = 0
        self.told = 0

    def write(self) -> None:
        while self.appetite >= 0:
            try:
                self.budget.take(self.pages)
            except OSError as error:
                assert error.errno == errno.ENOSPC  # noqa: PT017
                self.budget.wait(self, self.be_told)
                return
            self.got += self.pages
            self.appetite -= 1

    def be_told(self) -> None:
        self.told += 1

    def take_turn(self) -> None:
        self.told -= 1
        with self.budget.turn(self):
            self.write()


@pytest.fixture
def budget() -> Budget:
    """Full, but for what is reclaim's."""
    made = Budget(LIMIT * PAGE)
    made.attach(lambda: None)
    made.take(made.free_pages - made.reserve_pages)
    return made


def writers(budget: Budget, *pages: int, appetite: int = 0) -> list[Writer]:
    made = [Writer(budget, str(number), count, appetite) for number, count in enumerate(pages)]
    for writer in made:
        writer.write()
    return made


def told(waiting: list[Writer]) -> list[str]:
    return [writer.name for writer in waiting if writer.told]


def test_the_first_is_told_when_there_is_enough_for_it_and_the_next_when_it_is_done(budget: Budget) -> None:
    waiting = writers(budget, 256, 1, 1)
    budget.give(255)
    assert told(waiting) == []
    budget.give(1)
    assert told(waiting) == ["0"]
    waiting[0].take_turn()
    assert waiting[0].got == 256
    assert told(waiting) == []
    budget.give(2)
    assert told(waiting) == ["1"]
    waiting[1].take_turn()
    assert told(waiting) == ["2"]
    waiting[2].take_turn()
    assert budget.waiting == 0
    assert budget.free_pages == budget.reserve_pages


def test_who_comes_later_does_not_take_what_the_first_waits_for(budget: Budget) -> None:
    waiting = writers(budget, 256)
    budget.give(200)
    with pytest.raises(OSError, match="used up"):
        budget.take(1)
    budget.give(budget.wake_below)  # there is plenty
    budget.take(1)
    waiting[0].take_turn()
    assert waiting[0].got == 256


def test_one_that_never_has_enough_takes_turns_with_the_others(budget: Budget) -> None:
    waiting = writers(budget, 64, 64, 64, appetite=1000)
    for _ in range(60):
        budget.give(100)
        for writer in waiting:
            if writer.told:
                writer.take_turn()
    assert sum(writer.got for writer in waiting) > 5000
    assert max(writer.got for writer in waiting) - min(writer.got for writer in waiting) <= 256


def test_nobody_takes_everything_in_one_turn(budget: Budget) -> None:
    waiting = writers(budget, 16, 16, appetite=1000)
    budget.give(400)
    waiting[0].take_turn()
    assert waiting[0].got == 256
    assert told(waiting) == ["1"]


@pytest.mark.parametrize("how", ["leaves", "does not want it any more"])
def test_who_is_gone_is_in_nobodys_way(budget: Budget, how: str) -> None:
    waiting = writers(budget, 256, 16)
    budget.give(300)
    if how == "leaves":
        budget.leave(waiting[0])
    else:
        with budget.turn(waiting[0]):
            pass
    assert told(waiting[1:]) == ["1"]
    waiting[1].take_turn()
    assert budget.waiting == 0


def test_when_there_is_no_hope_everyone_hears_it(budget: Budget) -> None:
    waiting = writers(budget, 256, 16, 1)
    budget.give_up()
    assert told(waiting) == ["0", "1", "2"]
    assert not budget.hopeful
    for writer in waiting:
        with budget.turn(writer), pytest.raises(OSError, match="used up"):
            budget.take(writer.pages)
    assert budget.waiting == 0


def test_what_was_taken_since_reclaim_gave_up_gives_hope(budget: Budget) -> None:
    """It is new, and may be compressed: giving up was about what was there before."""
    budget.give(100)
    budget.give_up()
    assert not budget.hopeful
    budget.take(1)
    assert budget.hopeful
    budget.give_up()
    budget.give(100)
    assert not budget.hopeful
    budget.hope()
    assert budget.hopeful


def test_a_raised_limit_is_heard(budget: Budget) -> None:
    waiting = writers(budget, 256)
    budget.set_limit(2 * LIMIT * PAGE)
    assert told(waiting) == ["0"]


@pytest.mark.parametrize("pages", [16, 256])
def test_reclaim_aims_at_what_was_refused_however_small_the_budget_is(pages: int) -> None:
    budget = Budget(2 * pages * PAGE)
    calls: list[Callable[[], None]] = []
    budget.attach(lambda: calls.append(budget.freed))
    budget.take(pages + pages // 2)
    with pytest.raises(OSError, match="used up"):
        budget.take(pages)
    assert calls
    assert budget.goal_pages - budget.reserve_pages == pages


def test_reclaim_starts_early_while_memory_goes_fast() -> None:
    budget = Budget(LIMIT * PAGE)
    calls: list[int] = []
    budget.attach(lambda: calls.append(budget.free_pages))
    usual = budget.goal_pages
    for _ in range(26):
        budget.take(500)
        budget.look_ahead(0.05)
        assert bool(calls) == (budget.free_pages < budget.wake_below + budget.ahead_pages)
    assert calls
    assert min(calls) >= budget.wake_below
    assert 4900 < budget.ahead_pages <= 5000  # half of what a second takes
    assert budget.goal_pages == usual + budget.ahead_pages
    calls.clear()
    for _ in range(20):
        budget.look_ahead(0.05)
    assert budget.goal_pages == usual
    calls.clear()
    budget.look_ahead(0.05)
    assert not calls


def test_it_is_said_before_that_memory_will_be_short_soon() -> None:
    budget = Budget(LIMIT * PAGE)
    budget.attach(lambda: None)
    said = []
    while budget.free_pages > budget.wake_below:
        budget.take(min(500, budget.free_pages - budget.wake_below))
        budget.look_ahead(0.05)
        if budget.is_soon_short:
            said.append(budget.free_pages - budget.wake_below)
    assert 9000 < said[0] < 10000  # what a second takes
    assert len(said) == -(-said[0] // 500) + 1, "once said, it stays so"
    budget.take(1)
    budget.look_ahead(0.05)
    assert not budget.is_soon_short, "it is short already"
    budget.give(LIMIT)
    for _ in range(40):
        budget.look_ahead(0.05)
    assert not budget.is_soon_short


def test_of_the_memory_for_data_half_is_left_to_a_fast_writer() -> None:
    budget = Budget(LIMIT * PAGE)
    budget.attach(lambda: None)
    budget.set_overhead(LIMIT // 2)
    budget.take(4000)
    budget.look_ahead(0.001)
    assert budget.ahead_pages == LIMIT // 4


def test_a_lowered_limit_and_a_process_that_grows_are_no_pace() -> None:
    budget = Budget(LIMIT * PAGE)
    budget.attach(lambda: None)
    budget.take(1000)
    for _ in range(20):
        budget.look_ahead(0.05)
    budget.set_limit(LIMIT // 2 * PAGE)
    budget.set_overhead(1000)
    budget.look_ahead(0.05)
    assert budget.ahead_pages == 0


def test_nothing_is_expected_of_writers_that_wait_for_reclaim_already() -> None:
    budget = Budget(LIMIT * PAGE)
    budget.attach(lambda: None)
    budget.take(budget.free_pages - budget.wake_below)
    budget.look_ahead(0.05)
    assert budget.ahead_pages == LIMIT // 2
    budget.take(1)
    budget.look_ahead(0.05)
    assert budget.goal_pages == budget.stop_above
