"""What `nbdram top` shows: one screen, made of two looks at a server. Drawn with rich, and imported only for that."""

from typing import Any, Final

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nbdram.config import format_size
from nbdram.memory.histogram import BOUNDS_S, Histogram

Facts = dict[str, Any]  # what /v1/status tells

_TIERS: Final = (("resident", "green"), ("compressed", "cyan"), ("disk", "yellow"), ("remote", "magenta"))
_MAX_CONNECTIONS: Final = 20
_LATENCIES: Final = ("read", "write", "fault", "loop")


def screen(before: Facts, now: Facts, height: int = 0) -> RenderableType:
    """All of it; with `height`, as many exports and connections as fit in so many lines."""
    seconds = max(now["time"] - before["time"], 1e-3)
    room = max(4, height - 12) if height else 1000
    exports = _exports(before, now, seconds, max(2, room * 2 // 3))
    connections = _connections(now, max(1, min(_MAX_CONNECTIONS, room - exports.row_count)))
    return Group(_head(now), _memory(now["memory"]), _latencies(before, now), Text(), exports, Text(), connections)


def _head(now: Facts) -> Text:
    uptime = int(now["uptime_s"])
    head = Text.assemble(
        ("nbdram ", "bold"), now["version"], f"  up {uptime // 3600}:{uptime // 60 % 60:02}:{uptime % 60:02}"
    )
    if not now["ready"]:
        head.append("  stopping", "bold red")
    if waiting := now["memory"]["waiting"]:
        head.append(f"  {waiting} writes wait for memory", "bold red")
    for area in now["swap"]:
        if area["failing"]:
            head.append(f"  {area['path']} can't be written", "bold red")
    if now["remote"] and now["remote"]["failing"]:
        head.append("  a node of the remote takes nothing", "bold red")
    return head


def _memory(memory: Facts) -> Table:
    grid = Table.grid(padding=(0, 2))
    share = memory["used"] / memory["limit"]
    colour = "red" if memory["waiting"] else "green"
    bar = ProgressBar(total=memory["limit"], completed=memory["used"], width=30, complete_style=colour)
    told = f"{format_size(memory['used'])} of {format_size(memory['limit'])} ({share:.0%})"
    grid.add_row("memory", bar, told, f"holds {format_size(memory['stored'])}")
    tiers = [Text.assemble((f"{tier} ", colour), format_size(memory[tier])) for tier, colour in _TIERS if memory[tier]]
    rest = Text(f"index {format_size(memory['index'])}  itself {format_size(memory['overhead'])}", "dim")
    outer = Table.grid()
    outer.add_row(grid)
    outer.add_row(Text("  ").join([Text("      "), *tiers, rest]))
    return outer


def _latencies(before: Facts, now: Facts) -> Text:
    """p50 and p99 of what was timed between the two looks."""
    line = Text("p50 p99 ")
    for name in _LATENCIES:
        timed = Histogram()
        timed.counts = [new - old for new, old in zip(now["latency_s"][name], before["latency_s"][name], strict=True)]
        line.append(f" {name} ", "dim")
        line.append(f"{_time(timed.percentile(0.5))} {_time(timed.percentile(0.99))} ")
    return line


def _time(seconds: float | None) -> str:
    """A bound of a bucket, as people say it."""
    if seconds is None:
        return "-"
    above = ">" if seconds == BOUNDS_S[-1] else "<"
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if seconds * factor < 1000:
            return f"{above}{seconds * factor:g}{unit}"
    return f"{above}{seconds:g}s"


def _exports(before: Facts, now: Facts, seconds: float, most: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    table.add_column("export", ratio=1, no_wrap=True)
    for column in (
        "conns",
        "req/s",
        "read/s",
        "write/s",
        "faults/s",
        "resident",
        "compressed",
        "swap",
        "maximum",
        "errors",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    earlier = {export["name"]: export for export in before["exports"]}

    def rate(export: Facts, *keys: str) -> float:
        was = earlier.get(export["name"], export)
        return max(0.0, float(sum(export[key] - was[key] for key in keys)) / seconds)

    busiest = sorted(now["exports"], key=lambda export: (-rate(export, "requests"), -export["connections"]))
    for export in busiest[:most]:
        errors = export["errors"] + export["integrity_errors"]
        table.add_row(
            Text(export["name"], "dim" if not export["connections"] else ""),
            str(export["connections"]),
            f"{rate(export, 'requests'):.0f}",
            format_size(round(rate(export, "read_bytes"))),
            format_size(round(rate(export, "written_bytes"))),
            f"{rate(export, 'ram_faults', 'disk_faults', 'remote_faults'):.0f}",
            format_size(export["resident"]),
            format_size(export["compressed"]),
            format_size(export["disk"] + export["remote"]),
            format_size(export["size"]),
            Text(str(errors), "bold red" if errors else ""),
        )
    left = now["export_count"] - min(most, len(busiest))
    if left:
        table.add_row(Text(f"and {left} more", "dim"))
    return table


def _connections(now: Facts, most: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("connection")
    table.add_column("export", no_wrap=True)
    table.add_column("replies")
    table.add_column("for", justify="right")
    newest = sorted(now["connections"], key=lambda connection: float(connection["seconds"]))
    for connection in newest[:most]:
        seconds = int(connection["seconds"])
        table.add_row(
            connection["peer"], connection["export"], connection["replies"], f"{seconds // 60}:{seconds % 60:02}"
        )
    left = now["connection_count"] - min(most, len(newest))
    if left:
        table.add_row(Text(f"and {left} more", "dim"))
    return table
