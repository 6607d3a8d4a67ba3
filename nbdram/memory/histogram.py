"""Durations in buckets, as plain numbers."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

# Upper bounds in seconds: from a fault in RAM to a WRITE that waited for memory as long as it may.
BOUNDS_S: Final = (
    0.000005,
    0.00001,
    0.000025,
    0.00005,
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    1.0,
    5.0,
    20.0,
    60.0,
)


class Histogram:
    """How many durations were within each bound, not cumulated; the last count is of those above all bounds."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.sum_s = 0.0

    def observe(self, seconds: float, weight: int = 1) -> None:
        """Count a duration that stands for `weight` of its kind."""
        self.counts[bisect_left(BOUNDS_S, seconds)] += weight
        self.sum_s += seconds * weight

    @classmethod
    def total(cls, several: Sequence["Histogram"]) -> "Histogram":
        """All of `several` in one."""
        all_of_them = cls()
        all_of_them.counts = [
            sum(column) for column in zip(all_of_them.counts, *(one.counts for one in several), strict=True)
        ]
        all_of_them.sum_s = sum(one.sum_s for one in several)
        return all_of_them

    def percentile(self, share: float) -> float | None:
        """The bound that `share` (0 to 1) of the durations do not exceed; None if there are none."""
        total = sum(self.counts)
        if not total:
            return None
        seen = 0
        for bound, count in zip(BOUNDS_S, self.counts, strict=False):
            seen += count
            if seen >= share * total:
                return bound
        return BOUNDS_S[-1]
