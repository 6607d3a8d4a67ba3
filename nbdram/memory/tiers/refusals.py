"""Which nodes of a remote take no images for now: they are away, full, or lack replicas. The others go on.

A node that has refused one is tried again after a second, after each further refusal twice as late, but no later than
that: whoever waits for memory waits for it. One that was full is tried again when something was dropped there. For all
threads.
"""

import errno
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from nbdram.memory.tiers.remote_settings import Address

FIRST_S: Final = 1.0
_LONGEST_S: Final = 4.0

Node = Address | None  # None: nobody has the slot


@dataclass(slots=True)
class _Refusal:
    pause_s: float
    again_at: float
    is_full: bool


class Refusals:
    def __init__(self, owners: Callable[[], Sequence[Node]]) -> None:
        """`owners`: all nodes that have slots."""
        self._owners = owners
        self._nodes: dict[Node, _Refusal] = {}
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        """Whether there are any since which nothing was stored at that node."""
        return bool(self._nodes)

    def takes(self, node: Node) -> bool:
        refusal = self._nodes.get(node)
        return refusal is None or time.monotonic() >= refusal.again_at

    def any_takes(self) -> bool:
        """Whether any node may take an image."""
        return not self._nodes or any(self.takes(node) for node in self._owners())

    def note(self, node: Node, error: OSError) -> bool:
        """A node has refused an image; whether it is the only one."""
        with self._lock:
            now, last = time.monotonic(), self._nodes.get(node)
            pause = FIRST_S
            if last:  # those that were on their way together count once
                pause = min(_LONGEST_S, 2 * last.pause_s) if now >= last.again_at else last.pause_s
            self._nodes[node] = _Refusal(pause, now + pause, error.errno == errno.ENOSPC)
            return len(self._nodes) == 1 and last is None

    def stored(self, node: Node) -> bool:
        """A node has taken an image; whether none refuses them any more."""
        with self._lock:
            if not self._nodes:
                return False
            self._nodes.pop(node, None)
            owners = self._owners()
            for gone in [other for other in self._nodes if other not in owners]:
                del self._nodes[gone]
            return not self._nodes

    def made_room(self, node: Node) -> None:
        """Something was dropped from a node."""
        with self._lock:
            refusal = self._nodes.get(node)
            if refusal and refusal.is_full:
                refusal.again_at = 0.0
