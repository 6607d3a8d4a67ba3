"""nbdram map: which parts of an export are allocated."""

import argparse
import json

from nbdram.client.session import Session
from nbdram.config import format_size, parse_nbd_uri
from nbdram.errors import NbdramError
from nbdram.protocol.wire import BASE_ALLOCATION, STATE_HOLE, TIER_CONTEXT


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("map", help="show which parts of an export are allocated")
    parser.add_argument("uri", metavar="URI", help="nbd://HOST/NAME or nbd+unix:///NAME?socket=PATH")
    parser.add_argument("--tiers", action="store_true", help="of an nbdram server: draw where the data is")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    endpoint, name = parse_nbd_uri(arguments.uri)
    context = TIER_CONTEXT if arguments.tiers else BASE_ALLOCATION
    with Session(endpoint) as session:
        export = session.open(name, (context,))
        if context not in session.contexts.values():
            raise NbdramError(f"the server can't tell what is where: it has no {context}")
        extents = list(session.map_extents(context, export.size))
        session.disconnect()
    if arguments.tiers:
        return _print_tiers(extents, export.size, as_json=arguments.json)
    if arguments.json:
        rows = [{"offset": o, "length": n, "hole": bool(f & STATE_HOLE)} for o, n, f in extents]
        print(json.dumps(rows))
        return 0
    data = 0
    print(f"{'offset':>18} {'length':>18}")
    for offset, length, flags in extents:
        if not flags & STATE_HOLE:
            data += length
            print(f"{offset:>18} {length:>18}")
    print(f"{format_size(data)} allocated of {format_size(export.size)}")
    return 0


_TIERS = ("hole", "resident", "ram", "disk", "remote")
_MARKS = ".#+=~"
_COLUMNS = 64
_ROWS = 16


def _print_tiers(extents: list[tuple[int, int, int]], size: int, *, as_json: bool) -> int:
    if as_json:
        print(json.dumps([{"offset": o, "length": n, "tier": _TIERS[t]} for o, n, t in extents]))
        return 0
    print("\n".join(draw(extents, size)))
    for tier, name in enumerate(_TIERS):
        if name == "remote" and not any(t == tier for _, _, t in extents):
            continue
        print(f"{_MARKS[tier]} {name:10}{format_size(sum(n for _, n, t in extents if t == tier))}")
    return 0


def draw(extents: list[tuple[int, int, int]], size: int) -> list[str]:
    """The part of the device that is in use as a picture: each mark is the tier that most of its data is in."""
    used = max((offset + length for offset, length, tier in extents if tier), default=0)
    if not used:
        return [f"nothing is stored in all of {format_size(size)}"]
    cell = max(4096, -(-used // (_COLUMNS * _ROWS)))
    weights: list[dict[int, int]] = [{} for _ in range(-(-used // cell))]
    for offset, length, tier in extents:
        at, end = offset, min(offset + length, used)
        while tier and at < end:
            number = at // cell
            stop = min(end, (number + 1) * cell)
            weights[number][tier] = weights[number].get(tier, 0) + stop - at
            at = stop
    marks = "".join(_MARKS[max(weight, key=weight.__getitem__)] if weight else _MARKS[0] for weight in weights)
    rows = [marks[at : at + _COLUMNS] for at in range(0, len(marks), _COLUMNS)]
    rest = f"; nothing is stored behind {format_size(used)} of {format_size(size)}" if used < size else ""
    return [*rows, f"each mark is {format_size(cell)}{rest}"]
