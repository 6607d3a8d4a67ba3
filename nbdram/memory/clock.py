"""The clock: picks victims in address order with a second chance; moves nothing.

What was only ever written has none: its first touch is the one that brought it. So whoever writes more than there is
memory for makes room out of what it wrote itself, and not out of what others read.

Its only input are the reference bytes, so a pass over idle memory is a search for a byte value. Holes are
skipped through the index file's own holes. On a real ext4 trace this was as good as LRU and better than SIEVE
and S3-FIFO: the client's page cache has already absorbed the re-use that those feed on.
"""

from collections.abc import Mapping, Sequence
from mmap import mmap
from typing import TYPE_CHECKING, Final

from nbdram.memory.layout import SECOND_CHANCES, Reference

if TYPE_CHECKING:
    from nbdram.memory.device import Device

# How many clusters a hand looks at in one go: some tens of microseconds.
_SLICE: Final = 1 << 16

_FREED = bytes.maketrans(bytes((Reference.STUCK,)), bytes((Reference.IDLE,)))

Victim = tuple["Device", int]  # a device and one of its clusters


class Clock:
    """One hand over all devices, that stops at clusters whose reference byte is one of `wanted`.

    Clusters that it passes lose their second chance: what it `ages`, each state to another one.
    """

    def __init__(self, *wanted: Reference, ages: Mapping[int, int] = SECOND_CHANCES) -> None:
        self._wanted = [bytes((value,)) for value in wanted]
        self._ages = bytes(ages)
        self._aged = bytes.maketrans(self._ages, bytes(ages.values()))
        self._device = 0
        self._cluster = 0
        self.aged = 0  # clusters that have lost their second chance

    def take(self, devices: Sequence["Device"], count: int) -> tuple[list[Victim], bool]:
        """Up to `count` victims from one slice, and whether the hand came round to the first device."""
        if self._device >= len(devices):
            self._device, self._cluster = 0, 0
            return [], True
        device = devices[self._device]
        span = device.next_span(self._cluster, _SLICE)
        if span is None:
            self._device, self._cluster = self._device + 1, 0
            return [], False
        start, after = span
        references = device.references
        found: list[Victim] = []
        at = start
        while len(found) < count:
            at = self._next(references, at, after)
            if at < 0:
                break
            found.append((device, at))
            at += 1
        stop = after if at < 0 else at
        # What is being compressed keeps its mark of a touch: reclaim looks for it when the image is there.
        kept = [(cluster, references[cluster]) for cluster in device.reclaiming if start <= cluster < stop]
        passed = references[start:stop]
        aged = passed.translate(self._aged)
        self.aged += len(passed) - len(passed.translate(None, self._ages))
        self.aged -= sum(state in self._ages for _, state in kept)
        if device.roomy_tier():  # what would not compress had to stay while there was none
            aged = aged.translate(_FREED)
        references[start:stop] = aged
        for cluster, state in kept:
            references[cluster] = state
        self._cluster = stop
        return found, False

    def _next(self, references: mmap, start: int, after: int) -> int:
        """The first of [start, after) that is wanted, -1 if none is."""
        first = -1
        for value in self._wanted:
            nearer = references.find(value, start, after)
            if nearer >= 0:
                first = after = nearer
        return first
