"""A few seconds of `make fuzz`; and what was found once, or recorded from real clients, is run on every change."""

from pathlib import Path

import pytest

from .running import Fuzzing
from .targets import TARGETS, Target

ALL = pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))


@ALL
def test_nothing_is_wrong_with_any_seed(target: Target) -> None:
    one = target.one()
    seeds = sorted(target.seeds.iterdir())
    assert seeds
    for seed in seeds:
        one(seed.read_bytes())


@ALL
def test_a_short_run_finds_nothing(target: Target, tmp_path: Path) -> None:
    fuzzing = Fuzzing(tmp_path)
    found = fuzzing.run(target, 2.0)
    assert not found, found[0].with_suffix(".log").read_text()[-6000:]
    total = fuzzing.totals[target.name]
    assert total.executions >= len(list(target.seeds.iterdir()))
    assert total.edges > 0, "atheris sees no branches"
