"""What a server takes, looked at from outside, again and again; and whether it stays the same."""

import os
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any, Final

from nbdram.observe.control import ask
from tests.helpers import MIB, Running

_TIERS: Final = ("resident", "compressed", "disk", "remote")
_WARM_UP_MINUTES: Final = 8.0
# Latency is not among them: the machine may have other things to do.
_SLACK: Final = {"private": 4.0, "files": 4.0, "threads": 2.0, "tasks": 4.0}


@dataclass(frozen=True)
class Sample:
    """Sizes in MiB, latencies of the probe in ms; `files` without connections."""

    minute: float
    private: float  # RssAnon
    used: float  # of the budget
    limit: float
    resident: float
    compressed: float
    disk: float
    remote: float
    files: int
    threads: int
    tasks: int
    connections: int
    p50: float
    p99: float
    worst: float
    errors: int
    damaged: int


def take(server: Running, began: float, latencies: list[float]) -> Sample:
    """Empties `latencies`."""
    stats: dict[str, Any] = ask(server.directory / "control", "stats")
    times = sorted(latencies) or [0.0]
    latencies.clear()
    connections = stats["connections"]
    tiers = {tier: sum(export[tier] for export in stats["exports"]) / MIB for tier in _TIERS}
    return Sample(
        minute=(time.monotonic() - began) / 60,
        private=server.memory_kib("RssAnon") / 1024,
        used=stats["budget"]["used"] / MIB,
        limit=stats["budget"]["limit"] / MIB,
        **tiers,
        files=len(os.listdir(f"/proc/{server.process.pid}/fd")) - connections,
        threads=len(os.listdir(f"/proc/{server.process.pid}/task")),
        tasks=stats["tasks"],
        connections=connections,
        p50=times[len(times) // 2] * 1e3,
        p99=times[len(times) * 99 // 100] * 1e3,
        worst=times[-1] * 1e3,
        errors=stats["errors"],
        damaged=sum(export["integrity_errors"] for export in stats["exports"]),
    )


def all_tiers(samples: list[Sample]) -> bool:
    """Whether there was data in each, at some time."""
    return all(any(getattr(sample, tier) for sample in samples) for tier in _TIERS)


def drift(samples: list[Sample]) -> dict[str, tuple[float, float]]:
    """Medians of the second and of the last quarter: what leaks has grown by the last."""
    quarter = max(1, len(samples) // 4)
    early, late = samples[quarter : 2 * quarter] or samples, samples[-quarter:]
    names = ("private", "used", "files", "threads", "tasks", "p50", "p99")
    return {name: (median(vars(s)[name] for s in early), median(vars(s)[name] for s in late)) for name in names}


def check(samples: list[Sample]) -> None:
    """Raises if something has grown that should not, or memory was not kept within its budget.

    In the first minutes everything grows: threads start, connections to the remote are opened, caches fill.
    """
    found = drift(samples) if samples[-1].minute > _WARM_UP_MINUTES else {}
    for name, (early, late) in found.items():
        slack = _SLACK.get(name)
        assert slack is None or late <= early * 1.1 + slack, f"{name} has grown from {early:g} to {late:g}"
    assert not any(sample.damaged for sample in samples)
    over = max(sample.used / sample.limit for sample in samples)
    assert over <= 1.01, f"{over:.1%} of the budget were used"


def table(samples: list[Sample], rows: int = 13) -> str:
    """In Markdown, `rows` of the samples, evenly spread."""
    names = [field.name for field in fields(Sample)]
    lines = ["| " + " | ".join(names) + " |", "|" + "---:|" * len(names)]
    last = len(samples) - 1
    for number in sorted({round(row * last / max(1, rows - 1)) for row in range(rows)}):
        values = asdict(samples[number]).values()
        shown = (f"{value:.2f}" if isinstance(value, float) and value < 10 else f"{value:.0f}" for value in values)
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def save(samples: list[Sample], path: Path) -> None:
    """All of them, as CSV."""
    lines = [",".join(field.name for field in fields(Sample))]
    lines += [",".join(f"{value:g}" for value in asdict(sample).values()) for sample in samples]
    path.write_text("\n".join(lines) + "\n")
