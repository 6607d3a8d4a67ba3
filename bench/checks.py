"""Targets that are plain limits, not ratios to a peer."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench import report


@dataclass(frozen=True)
class Check:
    """At most `limit` of something, in `unit`."""

    what: str
    value: float
    limit: float
    unit: str = ""
    strictly: bool = False  # below the limit, not at it

    @property
    def is_met(self) -> bool:
        return self.value < self.limit if self.strictly else self.value <= self.limit


def table(title: str, checks: Sequence[Check]) -> str:
    rows = []
    for check in checks:
        value = f"{check.value:.3g}" if check.value < 100 else f"{check.value:.0f}"
        sign = "<" if check.strictly else "<="
        met = "yes" if check.is_met else "no"
        rows.append([check.what, value, f"{sign}{check.limit:g}", check.unit, met])
    return report.table(title, ["what", "value", "target", "unit", "met"], rows)
