"""The log files of keepers and of mounts' servers, which nobody rotates: they are cut before they are long."""

import fcntl
import logging
import os
import stat
from contextlib import suppress
from typing import Final, TextIO

_LONGEST: Final = 1 << 20
_KEPT: Final = _LONGEST // 2


def cut(fd: int) -> None:
    """Cut a file that is too long to the last half of that, in whole lines, if it is one that is appended to."""
    status = os.fstat(fd)
    if (
        status.st_size <= _LONGEST
        or not stat.S_ISREG(status.st_mode)
        or not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND
    ):
        return
    with open(f"/proc/self/fd/{fd}", "rb") as file:
        file.seek(-_KEPT, os.SEEK_END)
        last = file.read().partition(b"\n")[2]
    os.ftruncate(fd, 0)
    os.write(fd, last)


class Bounded(logging.StreamHandler[TextIO]):
    """Logs to stderr, and cuts it if it is a log file."""

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        with suppress(OSError, ValueError):  # no room, or no descriptor
            cut(self.stream.fileno())
