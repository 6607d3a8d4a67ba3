"""How late the event loop is: a timer four times a second, that looks when it really runs."""

import asyncio
import time
from typing import Final

from nbdram.memory.histogram import Histogram

_INTERVAL_S: Final = 0.25


class LoopLag:
    """Measures the running loop, to about a millisecond, from `start` to `stop`."""

    def __init__(self) -> None:
        self.seconds = Histogram()
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._due = time.monotonic() + _INTERVAL_S
        self._timer = asyncio.get_running_loop().call_later(_INTERVAL_S, self._ran)

    def stop(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _ran(self) -> None:
        self.seconds.observe(max(0.0, time.monotonic() - self._due))
        self.start()

    @property
    def late_s(self) -> float:
        """How long the timer is overdue now; 0 if it is not, or nothing is measured."""
        return max(0.0, time.monotonic() - self._due) if self._timer else 0.0
