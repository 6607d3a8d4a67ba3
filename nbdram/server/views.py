"""What waits for a socket: views of `hot` among bytes of our own. Views are copied before their pages are punched.

Only those: a copy of everything, for a client that takes nothing, would cost memory just when that is being reclaimed.
And one copy serves all who wait for the same. So a punch that finds views takes nothing more than it gives.
"""

import ctypes
import mmap
from collections import deque

from nbdram.memory.layout import CLUSTER_SHIFT
from nbdram.memory.space import Copies

Buffer = bytes | bytearray | memoryview


def clusters_of(buffers: deque[Buffer]) -> set[int]:
    """The clusters that are looked at."""
    found: set[int] = set()
    for buffer in buffers:
        start, end = _span(buffer)
        if end:
            found.update(range(start >> CLUSTER_SHIFT, ((end - 1) >> CLUSTER_SHIFT) + 1))
    return found


def copied(buffers: deque[Buffer], copies: Copies) -> deque[Buffer]:
    """The same bytes, without views of what is about to be punched."""
    kept: deque[Buffer] = deque()
    for buffer in buffers:
        first, after = _span(buffer)
        low, high = max(first, copies.start), min(after, copies.end)
        if low < high:
            pieces = (buffer[: low - first], *copies.of(low, high), buffer[high - first :])
            kept.extend(piece for piece in pieces if piece)
        else:
            kept.append(buffer)
    return kept


def _span(buffer: Buffer) -> tuple[int, int]:
    """The bytes of `hot` that a buffer looks at; none if it is no such view."""
    if not isinstance(buffer, memoryview) or buffer.readonly or not isinstance(buffer.obj, mmap.mmap):
        return 0, 0
    start = ctypes.addressof(ctypes.c_char.from_buffer(buffer)) - ctypes.addressof(
        ctypes.c_char.from_buffer(buffer.obj)
    )
    return start, start + len(buffer)
