"""`python -m bench [SECTION]`: measure, print tables, keep the raw figures if asked to."""

import argparse
import json
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, NoReturn

from bench import abuse, big, curves, filesystems, host, paging, publish, remote, report, scale, serving
from bench.errors import BenchError, NoMatch
from bench.options import Found, Options
from bench.servers import PEERS
from nbdram.config import parse_size
from nbdram.errors import UsageError

SECTIONS: Final[Mapping[str, Callable[[Options], Found]]] = {
    "serving": serving.run,
    "paging": paging.run,
    "big": big.run,
    "scale": scale.run,
    "remote": remote.run,
    "curves": curves.run,
    "filesystems": filesystems.run,
    "publish": publish.run,
    "abuse": abuse.run,
}
DEFAULT_SECTIONS: Final = ("serving", "paging")


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = _parser().parse_args(arguments)
    options = Options(
        rounds=parsed.rounds,
        seconds=parsed.seconds,
        only=parsed.only,
        peers=parsed.peers,
        patience=parsed.patience,
        budget=parsed.budget,
    )
    sections = (parsed.section,) if parsed.section else DEFAULT_SECTIONS
    signal.signal(signal.SIGTERM, _terminated)
    host.raise_file_limit()
    try:
        facts = host.facts([serving.OURS, *options.peers])
        print(report.heading(facts), end="\n\n", flush=True)
        found = _run(sections, options)
        if parsed.json:
            content = {"host": facts, "found": found}
            parsed.json.write_text(json.dumps(content, indent=1) + "\n")
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _run(sections: Sequence[str], options: Options) -> dict[str, Found]:
    """The figures of each section that has something to run."""
    found = {}
    for number, name in enumerate(sections, 1):
        try:
            found[name] = SECTIONS[name](options)
        except NoMatch:
            if number == len(sections) and not found:
                raise
        print(flush=True)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("section", nargs="?", choices=SECTIONS, help="default: serving and paging")
    parser.add_argument("--rounds", type=_positive, default=5, help="of every job (default 5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of one job (default 2)")
    parser.add_argument("--only", metavar="PATTERN", default="", help="jobs or parts that match")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--budget", type=_size, default="512M", metavar="SIZE", help="RAM in paging (default 512M)")
    peers = ",".join(PEERS)
    parser.add_argument("--peers", type=_peers, default=tuple(PEERS), help=f"default: {peers}")
    parser.add_argument(
        "--patience",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long to wait, in all, for a machine that is busy with other things (default 60)",
    )
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _peers(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    if unknown := set(names) - set(PEERS):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}")
    return names


def _terminated(*_: object) -> NoReturn:
    """SIGTERM unwinds like an error, so that every server is ended."""
    sys.exit(143)


if __name__ == "__main__":
    sys.exit(main())
