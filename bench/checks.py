"""Targets that are plain limits, not ratios to a peer."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench import report


@dataclass(frozen=True)
class Check:
    """At most `limit` of something, in `unit`. `floor` is what the machine made of it with nothing of ours."""

    what: str
    value: float
    limit: float
    unit: str = ""
    strictly: bool = False  # below the limit, not at it
    floor: float | None = None

    @property
    def is_met(self) -> bool:
        return self.value < self.limit if self.strictly else self.value <= self.limit


def table(title: str, checks: Sequence[Check]) -> str:
    rows = []
    for check in checks:
        sign = "<" if check.strictly else "<="
        met = "yes" if check.is_met else "no"
        floor = "-" if check.floor is None else _figure(check.floor)
        rows.append([check.what, _figure(check.value), f"{sign}{check.limit:g}", check.unit, met, floor])
    return report.table(title, ["what", "value", "target", "unit", "met", "floor"], rows)


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
