"""nbdram check: verify a state directory that no server uses."""

import argparse
from pathlib import Path

from nbdram.config import format_size
from nbdram.memory.checking import Findings, check
from nbdram.memory.statedir import StateDirectory

_PROBLEMS_SHOWN = 20


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("check", help="verify a state directory that no server uses; changes nothing")
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    state = StateDirectory(arguments.directory, make=False)
    try:
        findings = check(state)
    finally:
        state.close()
    for found in findings:
        for line in render(found):
            print(line)
    damaged = [found.device.name for found in findings if found.problems]
    print(f"{len(findings)} exports, " + (f"damaged: {', '.join(damaged)}" if damaged else "all whole"))
    return 1 if damaged else 0


def render(found: Findings) -> list[str]:
    """A line for a device, and one for each of its problems."""
    device = found.device
    sizes = f"{format_size(found.resident)} resident, {format_size(found.compressed)} compressed, "
    sizes += f"{format_size(found.disk)} on disk, {found.images} images"
    if found.leftover:
        sizes += f", {format_size(found.leftover)} left over (the next start gives it back)"
    lines = [f"{device.name}: {format_size(device.size)}, {sizes}"]
    lines += [f"    {problem}" for problem in found.problems[:_PROBLEMS_SHOWN]]
    if len(found.problems) > _PROBLEMS_SHOWN:
        lines.append(f"    and {len(found.problems) - _PROBLEMS_SHOWN} more")
    return lines
