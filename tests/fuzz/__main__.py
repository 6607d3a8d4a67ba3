"""`make fuzz MINUTES=n`: fuzz all targets in turn, going on where the last run ended; 1 if anything was found.

python -m tests.fuzz run [--minutes N] [--directory DIR] [TARGET...]
python -m tests.fuzz replay TARGET FILE...     run inputs once, without atheris, to see what they break
python -m tests.fuzz totals                    what all runs together have done
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import coverage

from tests import program

from .running import SLICE_S, Fuzzing
from .targets import REACHABLE, TARGETS, Target

_DIRECTORY: Final = Path(".fuzz")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz nbdram; see docs/fuzzing.md.")
    parser.add_argument("--directory", type=Path, default=_DIRECTORY, help="of corpus, findings and totals")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--minutes", type=float, default=10.0)
    run.add_argument("targets", nargs="*", metavar="TARGET", help=" ".join(TARGETS))
    replay = commands.add_parser("replay")
    replay.add_argument("target", choices=TARGETS)
    replay.add_argument("files", nargs="+", type=Path)
    commands.add_parser("totals")
    commands.add_parser("coverage")
    arguments = parser.parse_args()
    if arguments.command == "run" and arguments.minutes <= 0:
        parser.error("--minutes must be above 0")
    if arguments.command == "replay":
        if missing := [path for path in arguments.files if not path.is_file()]:
            parser.error(f"there is no file {missing[0]}: findings are in {arguments.directory}/findings")
        return _replay(TARGETS[arguments.target], arguments.files)
    fuzzing = Fuzzing(arguments.directory)
    if arguments.command == "totals":
        _tell_totals(fuzzing)
        return 0
    if arguments.command == "coverage":
        _tell_coverage(fuzzing)
        return 0
    if unknown := set(arguments.targets) - TARGETS.keys():
        parser.error(f"there is no target {unknown.pop()}: choose from {' '.join(TARGETS)}")
    chosen = [TARGETS[name] for name in arguments.targets or TARGETS]
    return _run(fuzzing, chosen, arguments.minutes * 60)


def _run(fuzzing: Fuzzing, targets: Sequence[Target], seconds: float) -> int:
    broken: set[str] = set()
    for target, slice_s in _plan(targets, seconds):
        if target.name in broken:
            continue
        found = fuzzing.run(target, slice_s)
        total = fuzzing.totals[target.name]
        print(f"{target.name}: {total.executions:,} executions in all, {total.edges} edges", flush=True)
        for path in found:
            broken.add(target.name)
            print(f"FOUND {path}: see {path.with_suffix('.log')}, and what breaks when it is alone, by")
            print(f"    {sys.executable} -m tests.fuzz replay {target.name} {path}", flush=True)
    _tell_totals(fuzzing)
    return 1 if broken else 0


def _plan(targets: Sequence[Target], seconds: float) -> Iterator[tuple[Target, float]]:
    """Slices of time, each target as much as its share, and all of them in each round."""
    shares = sum(target.share for target in targets)
    longest = max(target.share for target in targets) * seconds / shares
    rounds = max(1, round(longest / SLICE_S))
    for _ in range(rounds):
        for target in targets:
            yield target, target.share * seconds / shares / rounds


def _replay(target: Target, files: Sequence[Path]) -> int:
    one = target.one()
    for path in files:
        one(path.read_bytes())
    print(f"{len(files)} input{'s' * (len(files) != 1)}, and nothing is wrong")
    return 0


def _tell_coverage(fuzzing: Fuzzing) -> None:
    """Of the modules that are fuzzed; importing them is part of it."""
    measured = coverage.Coverage(branch=True, data_file=None, source=["nbdram"], config_file=False)
    measured.start()
    for target in TARGETS.values():
        one = target.one()
        for directory in (target.seeds, fuzzing.corpus(target)):
            for path in directory.iterdir():
                one(path.read_bytes())
    measured.stop()
    root = Path(__file__).parents[2]
    files = [str(root / f"{module.replace('.', '/')}.py") for module in REACHABLE]
    measured.report(include=files, output_format="markdown", show_missing=True, file=sys.stdout)


def _tell_totals(fuzzing: Fuzzing) -> None:
    print("| target | executions | hours | edges | features | corpus | findings |\n|---|---|---|---|---|---|---|")
    for name, total in fuzzing.totals.items():
        print(
            f"| {name} | {total.executions:,} | {total.seconds / 3600:.2f} | {total.edges} | {total.features} "
            f"| {total.corpus} | {total.findings} |"
        )


if __name__ == "__main__":
    program.run(main)
