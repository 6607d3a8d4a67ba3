"""Keep this process out of the way of the memory reclaim that may wait for it.

When memory is short the kernel writes to the very devices whose connections this process repairs. So it must not be
swapped out, must not wait for such writes itself, and must not be the one to be killed. Each is best effort.
"""

import ctypes
import logging
import os
from pathlib import Path
from typing import Final

log = logging.getLogger("nbdram.keeper")

_MCL_CURRENT, _MCL_FUTURE = 1, 2
_PR_SET_IO_FLUSHER: Final = 57


def stay_resident() -> None:
    """For this thread and those that it starts; a refusal is logged, with what it means."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE):
        _refused("be locked in memory (mlockall)", "CAP_IPC_LOCK")
    if libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0):
        _refused("be told apart from those who wait for its devices (PR_SET_IO_FLUSHER)", "CAP_SYS_RESOURCE")
    for score in ("-1000", "-500"):
        try:
            Path("/proc/self/oom_score_adj").write_text(score)
            return
        except OSError as error:
            ctypes.set_errno(error.errno or 0)
    _refused("be spared when memory runs out (oom_score_adj)", "CAP_SYS_RESOURCE")


def _refused(what: str, capability: str) -> None:
    log.warning("this process can't %s: %s; it takes %s", what, os.strerror(ctypes.get_errno()), capability)
