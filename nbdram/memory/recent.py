"""The latest few durations of something, for percentiles that follow what happens now."""

from collections import deque


class Recent:
    """Keeps the last 512 durations, in seconds."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=512)

    def add(self, seconds: float) -> None:
        self._times.append(seconds)

    def extend(self, other: "Recent") -> None:
        self._times.extend(other._times)

    def percentile(self, share: float) -> float | None:
        """The duration that `share` (0 to 1) of the kept ones do not exceed; None if there are none."""
        ordered = sorted(self._times)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
