"""Keep a process out of the way of the memory reclaim that may wait for it.

When memory is short the kernel writes to the very devices that the keeper repairs, and that a server on the same host
serves. So such a process must not be swapped out, must not wait for such writes itself, and must not be the one to be
killed. Each is best effort.
"""

import ctypes
import logging
import os
from pathlib import Path
from typing import Final

log = logging.getLogger("nbdram.resident")

_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_PR_SET_IO_FLUSHER: Final = 57


def stay_resident() -> None:
    """For a small process: it is locked in memory as a whole. A refusal is logged, with what it means."""
    _lock_memory(_MCL_CURRENT | _MCL_FUTURE)
    _never_wait_for_devices()
    _be_spared()


def stay_out_of_the_way() -> None:
    """For a server, before it has devices: these can't be locked, because their pages come and go."""
    _lock_memory(_MCL_CURRENT | _MCL_ONFAULT)
    _never_wait_for_devices()
    _be_spared()


def _lock_memory(flags: int) -> None:
    if _libc().mlockall(flags):
        _refused("be locked in memory (mlockall)", "CAP_IPC_LOCK")


def _never_wait_for_devices() -> None:
    """Holds for this thread and those that it starts."""
    if _libc().prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0):
        _refused("be told apart from those who wait for its devices (PR_SET_IO_FLUSHER)", "CAP_SYS_RESOURCE")


def _be_spared() -> None:
    for score in ("-1000", "-500"):
        try:
            Path("/proc/self/oom_score_adj").write_text(score)
            return
        except OSError as error:
            ctypes.set_errno(error.errno or 0)
    _refused("be spared when memory runs out (oom_score_adj)", "CAP_SYS_RESOURCE")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _refused(what: str, capability: str) -> None:
    log.warning("this process can't %s: %s; it takes %s", what, os.strerror(ctypes.get_errno()), capability)
