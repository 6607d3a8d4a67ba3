"""Whether the event loop should sleep a little after a large batch of READs: found out by trying both.

While one client is all there is to serve, a sleep lets its next requests gather. Where that client has a whole core to
do, it need not wake anybody meanwhile, and gets 15 % more done, for half of the server's CPU time. Where it is faster
than that, or waking up costs more, the two end up waiting for each other: 130 instead of 245 kIOPS at depth 32, on
another processor. So both ways have a few milliseconds in each second, and the better one has the rest of it.
"""

from typing import Final

_TRIAL: Final = 8  # turns, each of a millisecond, for each way
_SETTLING: Final = 2  # of them, that do not count: what was under way goes on the old way
_CYCLE: Final = 1024  # turns from one trial to the next


class Doze:
    """For one event loop."""

    def __init__(self) -> None:
        self.pays = False
        self._turn = 0
        self._requests = [0.0, 0.0]  # without, and with dozing; those of earlier trials count less and less
        self._seconds = [0.0, 0.0]

    def judge(self, requests: int, seconds: float) -> None:
        """A turn, in which a client had something to do all the time, is over."""
        if self._turn < 2 * _TRIAL and self._turn % _TRIAL >= _SETTLING:
            self._requests[self.pays] += requests
            self._seconds[self.pays] += seconds
        self._turn = (self._turn + 1) % _CYCLE
        if self._turn == 0:
            self.pays = False
        elif self._turn == _TRIAL:
            self.pays = True
        elif self._turn == 2 * _TRIAL:
            without, dozing = (n / s for n, s in zip(self._requests, self._seconds, strict=True))
            self.pays = dozing >= without
            self._requests = [n / 2 for n in self._requests]
            self._seconds = [s / 2 for s in self._seconds]
