"""What waits for a socket: views of `hot` among bytes of our own. Views are copied before their pages are punched.

Only those: a copy of everything, for a client that takes nothing, would cost memory just when that is being reclaimed.
So a punch that finds a view takes nothing more than it gives.
"""

import ctypes
import mmap
from collections import deque

from nbdram.memory.layout import CLUSTER_SHIFT

Buffer = bytes | memoryview


def clusters_of(buffers: deque[Buffer]) -> set[int]:
    """The clusters that are looked at."""
    found: set[int] = set()
    for buffer in buffers:
        start, end = _span(buffer)
        if end:
            found.update(range(start >> CLUSTER_SHIFT, ((end - 1) >> CLUSTER_SHIFT) + 1))
    return found


def copied(buffers: deque[Buffer], start: int, end: int) -> tuple[deque[Buffer], int]:
    """The same bytes without views of [start, end), and how many of them are copies now."""
    kept: deque[Buffer] = deque()
    length = 0
    for buffer in buffers:
        first, after = _span(buffer)
        if first < end and start < after:
            low, high = max(start - first, 0), min(end, after) - first
            pieces = (buffer[:low], bytes(buffer[low:high]), buffer[high:])
            kept.extend(piece for piece in pieces if piece)
            length += high - low
        else:
            kept.append(buffer)
    return kept, length


def _span(buffer: Buffer) -> tuple[int, int]:
    """The bytes of `hot` that a buffer looks at; none if it is no such view."""
    if not isinstance(buffer, memoryview) or buffer.readonly or not isinstance(buffer.obj, mmap.mmap):
        return 0, 0
    start = ctypes.addressof(ctypes.c_char.from_buffer(buffer)) - ctypes.addressof(
        ctypes.c_char.from_buffer(buffer.obj)
    )
    return start, start + len(buffer)
