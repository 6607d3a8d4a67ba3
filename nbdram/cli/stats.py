"""nbdram stats: one screen about a running server's memory."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from nbdram.config import format_size
from nbdram.observe.control import ask, default_path

_RATE_OVER_S = 1.0
_MOST_EXPORTS = 20  # so that it is one screen


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("stats", help="show where a running server's memory is")
    parser.add_argument("--control", metavar="PATH", type=Path, help=f"its control socket (default: {default_path()})")
    parser.add_argument("--json", action="store_true", help="everything, machine-readable")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    path = arguments.control or default_path()
    before = ask(path, "stats")
    if arguments.json:
        json.dump(before, sys.stdout)
        print()
        return 0
    time.sleep(_RATE_OVER_S)
    print(render(before, ask(path, "stats"), _RATE_OVER_S))
    return 0


def render(before: dict[str, Any], now: dict[str, Any], seconds: float) -> str:
    """The screen: what is where now, and rates between two snapshots."""
    budget, faults, reclaim = now["budget"], now["faults"], now["reclaim"]
    share = 100 * budget["used"] / budget["limit"]
    rate = (_reclaimed(now) - _reclaimed(before)) / seconds
    disk = f"{_total(now, 'disk')}{_ratio(now, 'disk')}" if now["swap"] else "none"
    remote = f"{_total(now, 'remote')}{_ratio(now, 'remote')}" if now["remote"] else "none"
    if now["remote"] and now["remote"]["failing"]:
        remote += "; a node takes nothing for now"
    damaged = sum(export["integrity_errors"] for export in now["exports"])
    rows = [
        ("budget", f"{format_size(budget['used'])} of {format_size(budget['limit'])} used ({share:.0f} %)"),
        ("resident", _total(now, "resident")),
        ("compressed", f"{_total(now, 'compressed')}{_ratio(now, 'compressed')}"),
        ("on disk", disk),
        ("remote", remote),
        ("index", _total(now, "index")),
        ("the server itself", format_size(budget["overhead"])),
        ("faults from RAM", f"{faults['ram']}{_latency(faults['ram_seconds'])}"),
        ("faults from disk", f"{faults['disk']}{_latency(faults['disk_seconds'])}"),
        ("faults from remote", f"{faults['remote']}{_latency(faults['remote_seconds'])}"),
        ("pages faulted back", str(faults["refaulted_pages"])),
        ("reclaim", f"{rate:.0f} clusters/s; {_reclaimed(now)} in all, {reclaim['thrown_away']} thrown away"),
        ("writes that waited", str(now["write_waits"])),
        ("errors", f"{now['errors']}, damaged images {damaged}"),
        ("connections", str(now["connections"])),
    ]
    lines = [f"{label:20}{value}" for label, value in rows]
    lines.append("")
    lines.append(f"{'export':24}{'maximum':>12}{'resident':>12}{'compressed':>12}{'disk':>12}{'remote':>12}")
    fullest = sorted(now["exports"], key=_held, reverse=True)[:_MOST_EXPORTS]
    for export in filter(fullest.__contains__, now["exports"]):
        sizes = (export[key] for key in ("maximum", "resident", "compressed", "disk", "remote"))
        lines.append(f"{export['name'][:23]:24}" + "".join(f"{format_size(size):>12}" for size in sizes))
    if more := len(now["exports"]) - len(fullest):
        lines.append(f"... and {more} more, which hold less: `nbdram exports` and `--json` have all")
    return "\n".join(lines)


def _held(export: dict[str, Any]) -> int:
    return sum(export[key] for key in ("resident", "compressed", "disk", "remote"))


def _reclaimed(snapshot: dict[str, Any]) -> int:
    counts = snapshot["reclaim"]
    return sum(counts[kind] for kind in ("compressed", "dropped_clean", "zeros", "demoted"))


def _total(snapshot: dict[str, Any], key: str) -> str:
    return format_size(sum(export[key] for export in snapshot["exports"]))


def _ratio(snapshot: dict[str, Any], key: str) -> str:
    images = sum(export[key] for export in snapshot["exports"])
    content = sum(export[f"{key}_from"] for export in snapshot["exports"])
    return f" for {format_size(content)} ({images / content:.2f})" if content else ""


def _latency(times: dict[str, float | None]) -> str:
    if times["p50"] is None or times["p99"] is None:
        return ""
    return f" (p50 {times['p50'] * 1e6:.0f} us, p99 {times['p99'] * 1e6:.0f} us)"
