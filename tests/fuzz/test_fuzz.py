"""A few seconds of `make fuzz`; and what was found once, or recorded from real clients, is run on every change."""

import subprocess
import sys
from pathlib import Path

import pytest

from .running import Fuzzing
from .targets import TARGETS, Target

ROOT = Path(__file__).parents[2]
ALL = pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))


@ALL
def test_nothing_is_wrong_with_any_seed(target: Target) -> None:
    seeds = sorted(target.seeds.iterdir())
    assert seeds
    # In a process of its own: targets change limits, and what is done with what the server logs, for good.
    command = [sys.executable, "-m", "tests.fuzz", "replay", target.name, *map(str, seeds)]
    replayed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert replayed.stdout == f"{len(seeds)} inputs, and nothing is wrong\n", replayed.stderr[-6000:]


@ALL
def test_a_short_run_finds_nothing(target: Target, tmp_path: Path) -> None:
    fuzzing = Fuzzing(tmp_path)
    found = fuzzing.run(target, 2.0)
    assert not found, found[0].with_suffix(".log").read_text()[-6000:]
    total = fuzzing.totals[target.name]
    assert total.executions >= len(list(target.seeds.iterdir()))
    assert total.edges > 0, "atheris sees no branches"
