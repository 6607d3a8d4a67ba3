"""nbdram check: verify a state directory that no server uses."""

import argparse
from pathlib import Path

from nbdram.cli.remote_of import add_swap, remote_of
from nbdram.config import format_size
from nbdram.memory.checking import Findings, check
from nbdram.memory.statedir import StateDirectory

_PROBLEMS_SHOWN = 20


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("check", help="verify a state directory that no server uses; changes nothing")
    parser.add_argument("directory", metavar="DIR", type=Path)
    add_swap(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    state = StateDirectory(arguments.directory, make=False)
    try:
        findings = check(state, remote_of(state, arguments.swap))
    finally:
        state.close()
    for found in findings:
        for line in render(found):
            print(line)
    damaged = [found.device.name for found in findings if found.problems]
    unchecked = sum(found.unchecked for found in findings)
    verdict = f"damaged: {', '.join(damaged)}" if damaged else "all whole"
    if unchecked:
        verdict += f", as far as they could be checked: {unchecked} images in a remote could not"
    print(f"{len(findings)} export{'s' * (len(findings) != 1)}, {verdict}")
    return 1 if damaged or unchecked else 0


def render(found: Findings) -> list[str]:
    """A line for a device, and one for each of its problems."""
    device = found.device
    sizes = f"{format_size(found.resident)} resident, {format_size(found.compressed)} compressed, "
    sizes += f"{format_size(found.disk)} on disk, "
    sizes += f"{format_size(found.remote)} in a remote, " if found.remote else ""
    sizes += f"{found.images} images"
    if found.leftover:
        sizes += f", {format_size(found.leftover)} left over (the next start gives it back)"
    lines = [f"{device.name}: {format_size(device.size)}, {sizes}"]
    if found.unchecked:
        lines.append(f"    {found.unchecked} images in a remote are unchecked: {found.why}")
    lines += [f"    {problem}" for problem in found.problems[:_PROBLEMS_SHOWN]]
    if len(found.problems) > _PROBLEMS_SHOWN:
        lines.append(f"    and {len(found.problems) - _PROBLEMS_SHOWN} more")
    return lines
