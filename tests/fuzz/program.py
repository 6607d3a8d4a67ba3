"""A conversation in the transmission phase, and what happens to the device meanwhile, as a string of bytes.

Every string is a program; what a mutation of it means stays close to what it meant. The first byte chooses the reply
mode and the device, then steps follow, each a byte that says what it is, and some more.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from nbdram.protocol.handshake import ReplyMode
from tests.helpers import ALL_MODES, CLUSTER, KIB, MIB, PAGE, request

SIZE: Final = 6 * CLUSTER
CLUSTERS: Final = SIZE // CLUSTER
MOST_STEPS: Final = 64

LENGTHS: Final = (
    *(0, 1, 511, 512, 513, 4095, PAGE, 4097, 2 * PAGE, 3 * PAGE, 12 * KIB + 1, 16 * KIB, 32 * KIB, CLUSTER - 1),
    *(CLUSTER, CLUSTER + 1, CLUSTER + PAGE, 100_000, 128 * KIB, 192 * KIB, 256 * KIB, 300 * KIB, 512 * KIB, SIZE),
    *(SIZE - 1, SIZE + 1, 32 * MIB, 32 * MIB + 1, 1 << 31, (1 << 32) - PAGE, (1 << 32) - 1, (1 << 32) - 512),
)
SHIFTS: Final = (0, 1, 511, 512, 2048, 4095, -1, -512, 100, 1024, 3584, SIZE, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63)
FLAGS: Final = (0, 0, 0, 0, 1, 2, 4, 8, 16, 18, 32, 36, 33, 6, 0xFFFF, 64)
_NOISE: Final = bytes((number * number * 31 + number * 7 + (number >> 8) * 13) & 0xFF for number in range(1 << 16)) * 17

# What a step is, by its first byte.
REQUESTS: Final = 160  # below: a request, and whether it is sent at once, cut, or with those after it
FREEZE: Final = 176
SETTLE: Final = 184
RAW: Final = 192


@dataclass(frozen=True)
class Step:
    """`kind`: send, queue, cut, freeze, settle, raw, or one of ACTIONS; `number`: the cluster, or where to cut."""

    kind: str
    data: bytes = b""
    number: int = 0


ACTIONS: Final = ("stop reading", "read", "free memory", "run", "lose hope", "finish", "shrink budget", "grow budget")


class Program:
    """`data` as reply mode, device and steps."""

    def __init__(self, data: bytes) -> None:
        first = data[0] if data else 0
        self.mode: ReplyMode = ALL_MODES[first % 3]
        self.has_disk = bool(first & 4)
        self.dense = bool(first & 8)
        self.has_contexts = not first & 16 and self.mode is not ReplyMode.SIMPLE
        self.is_tight = bool(first & 32)
        self.is_paced = 192 <= first < 224
        self.read_only = first >= 224
        self._data = data
        self._at = 1
        self._cookie = 0x1000

    def steps(self) -> Iterator[Step]:
        for _ in range(MOST_STEPS):
            if self._at >= len(self._data):
                return
            yield self._step(self._byte())

    def _byte(self) -> int:
        at, self._at = self._at, self._at + 1
        return self._data[at] if at < len(self._data) else 0

    def _step(self, kind: int) -> Step:
        if kind < REQUESTS:
            sent = ("send", "send", "queue", "cut", "send")[kind % 5]
            return Step(sent, self._request(), self._byte() if sent == "cut" else 0)
        if kind < FREEZE:
            return Step("freeze", number=kind % CLUSTERS)
        if kind < SETTLE:
            return Step("settle")
        if kind < RAW:
            length = self._byte()
            data, self._at = self._data[self._at : self._at + length], self._at + length
            return Step("raw", data)
        return Step(ACTIONS[kind % len(ACTIONS)])

    def _request(self) -> bytes:
        command, where, what, seed = self._byte(), self._byte(), self._byte(), self._byte()
        offset = (where * PAGE + SHIFTS[what >> 4]) & ((1 << 64) - 1)
        flags, length = FLAGS[what & 15], LENGTHS[seed % len(LENGTHS)]
        number = command & 7 if command < 240 else command
        self._cookie += 1
        payload = b""
        if number == 1:
            flags = flags | 32 if self.mode is ReplyMode.EXTENDED and not command & 128 else flags
            payload = content(command >> 3, length)
        elif number == 7 and self.mode is ReplyMode.EXTENDED and flags & 32:
            payload = (seed * PAGE).to_bytes(8, "big") + (1).to_bytes(4, "big") * (command >> 6 & 1)
            length = len(payload)
        return request(self.mode, number, offset, length, flags=flags, cookie=self._cookie)[:32] + payload


def content(kind: int, length: int) -> bytes:
    """What a WRITE brings; not all of it, where that is more than any server should take."""
    length = min(length, SIZE)
    if kind & 3 == 0:
        return bytes(length)
    if kind & 3 == 1:
        return bytes((kind,)) * length
    start = kind * 251
    return _NOISE[start : start + length]


def nearest(values: tuple[int, ...], wanted: int) -> int:
    """The number of the value that is nearest."""
    return min(range(len(values)), key=lambda number: abs(values[number] - wanted))


def program_of(mode: int, requests: list[tuple[int, int, int, int]], *, reclaim: bool = False) -> bytes:
    """The program that comes nearest to requests that were recorded: (command, flags, offset, length).

    With `reclaim`, each cluster is compressed behind the request that touched it, and then moved on to disk.
    """
    data = bytearray((mode,))
    most = (MOST_STEPS - 4) // (5 if reclaim else 1)
    for number, (command, flags, offset, length) in enumerate(requests[:most]):
        shift = nearest(SHIFTS[:11], offset % PAGE)
        flag = next((place for place, known in enumerate(FLAGS) if known == flags & ~32), 0)
        what = shift << 4 | flag
        data += bytes((0, command & 7 | (8, 24)[number % 2], offset // PAGE & 0xFF, what, nearest(LENGTHS, length)))
        if reclaim:
            cluster = offset // CLUSTER % CLUSTERS
            freeze = next(kind for kind in range(REQUESTS, FREEZE) if kind % CLUSTERS == cluster)
            data += bytes((freeze, FREEZE)) * 2
    return bytes(data)
