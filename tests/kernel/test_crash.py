"""A short crash campaign; `make crash` is the long one."""

from tests.kernel.crash import VARIANTS, campaign, pauses


def test_ten_kills_under_a_busy_file_system_lose_nothing() -> None:
    """Little memory, paging to disk, and the keeper is killed as well."""
    figures = campaign(VARIANTS[-1], kills=10)
    assert figures.kills.total() >= 10
    assert len(figures.kills) >= 3, "points between two stores were hit"
    assert figures.pauses
    assert figures.trees
    assert figures.keepers_killed
    assert figures.disk_bytes, "the budget was not tight enough to say anything"


def test_a_pause_is_from_the_first_kill_to_the_end_of_the_write_that_it_hit() -> None:
    assert pauses([100.5, 101.0, 110.0], "90.000 1.000\n100.000 2.000\n110.050 0.250\n") == [1.5, 0.25]
