"""Locks that say that a directory is in use; the kernel takes them back when the process ends, however it ends."""

import fcntl
import time
from typing import Final

from nbdram.errors import NbdramError

# A server that was killed holds its locks until the kernel has unmapped all of its memory.
_PATIENCE_S: Final = 3.0


def lock_patiently(fd: int, complaint: str) -> None:
    """Lock a file exclusively; NbdramError with `complaint` if somebody holds it for longer than dying takes."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise NbdramError(complaint) from None
        time.sleep(0.01)
