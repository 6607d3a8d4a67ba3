"""Notices that something that `nbdram mount` mounted was unmounted by others, as by umount(8) or systemd.

Then its device and its server are of no use any more, and `nbdram umount --leftovers` clears up.
"""

import logging
import select
import subprocess
import sys
import threading
from pathlib import Path
from typing import Final

from nbdram.client.mount_notes import all_notes

log = logging.getLogger("nbdram.keeper")

_LOOK_ANYWAY_S: Final = 10.0


class MountWatch(threading.Thread):
    """Lives as long as the process, in the mount namespace of the first who attached a device."""

    def __init__(self) -> None:
        super().__init__(name="keeper-mounts", daemon=True)

    def run(self) -> None:
        with Path("/proc/self/mountinfo").open("rb") as table:
            poll = select.poll()
            poll.register(table, select.POLLPRI)
            while True:
                poll.poll(_LOOK_ANYWAY_S * 1000)
                try:
                    self._look()
                except Exception:
                    log.exception("could not see what is mounted; going on")

    def _look(self) -> None:
        for note in all_notes():
            if not note.kind or not note.device or note.is_mounted:
                continue
            log.info("%s was unmounted: clearing up", note.point)
            argv = [sys.executable, "-P", "-m", "nbdram", "umount", "--leftovers", "--", note.name]
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, cwd="/")
            if done.returncode != 0:
                log.warning("%s: %s", note.point, done.stderr.strip())
