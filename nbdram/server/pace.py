"""Caps on requests and bytes per second of an export: two token buckets that all its connections share.

A connection of a capped export parses through `Connection._parse_paced`, which asks `admit` how much of what has come
in may be answered by now; the rest waits, and nothing more is received. Connections of other exports do not know that
this exists.

Rules:
1. A request is paid before it is answered, all of it, as soon as its header is there and it can begin. It may put a
   bucket into debt: then nothing more goes until the debt is paid. So one request of 32 MiB passes any cap, late; and
   none is in debt for more, whatever length it claims, because all connections have to wait for it.
2. What is saved up in idle times is at most BURST_S of the rate.
"""

import time
from collections.abc import Callable
from typing import Final, NamedTuple

from nbdram.access import Rules
from nbdram.protocol import wire

BURST_S: Final = 0.1
_NO_LIMIT: Final = float("inf")


class Admission(NamedTuple):
    """The first `end` bytes may be parsed, of which the first `paid` are paid; the next one waits `delay_s`."""

    end: int
    paid: int
    delay_s: float


class Pace:
    """The caps of one export."""

    def __init__(self, rules: Rules, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rates = (float(rules.iops or _NO_LIMIT), float(rules.bandwidth or _NO_LIMIT))
        self._saved = [self._full(rate) for rate in self._rates]
        self._at = clock()

    @staticmethod
    def _full(rate: float) -> float:
        return max(1.0, rate * BURST_S)

    def _refill(self) -> None:
        now = self._clock()
        passed, self._at = now - self._at, now
        for number, rate in enumerate(self._rates):
            self._saved[number] = min(self._full(rate), self._saved[number] + passed * rate)

    def delay_s(self) -> float:
        """How long the next request has to wait; 0: not at all."""
        self._refill()
        debts = (
            (0.0 if saved > 0 else (-saved + 1) / rate) for saved, rate in zip(self._saved, self._rates, strict=True)
        )
        return max(debts)

    def pay(self, count: int, length: int) -> None:
        self._saved[0] -= count
        self._saved[1] -= length

    def admit(self, received: memoryview, start: int, *, extended: bool, direct_bytes: int) -> Admission:
        """How much of `received` goes on now; what is in front of `start` is paid or needs no paying.

        A WRITE of at least `direct_bytes` begins before all of it has come.
        """
        layout = wire.EXTENDED_REQUEST if extended else wire.REQUEST
        at, end = start, len(received)
        while end - at >= layout.size:
            magic_flags_command = layout.unpack_from(received, at)
            flags, command, length = magic_flags_command[1], magic_flags_command[2], magic_flags_command[-1]
            has_payload = command == wire.Command.WRITE or (extended and flags & wire.CommandFlag.PAYLOAD_LEN)
            payload = length if has_payload else 0
            if payload and at + layout.size + payload > end and payload < direct_bytes:
                break
            delay = self.delay_s()
            if delay:
                return Admission(at, at, delay)
            self.pay(1, _bytes_of(command, length))
            at += layout.size + payload
        return Admission(end, min(at, end), 0.0)


def _bytes_of(command: int, length: int) -> int:
    """What a request moves. A READ of more than the maximum is refused; the payload of such a WRITE still comes."""
    if command == wire.Command.WRITE:
        return min(length, wire.MAX_PAYLOAD_BYTES)
    return length if command == wire.Command.READ and length <= wire.MAX_PAYLOAD_BYTES else 0
