"""`nbdram serve`, but the process kills itself at the COUNT-th time that it comes to POINT.

    python -m tests.peers.killed POINT COUNT ARGUMENTS...

Points lie between two stores that belong together. Nothing of this is in the server: functions are wrapped here.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from nbdram import cli
from nbdram.memory import device
from nbdram.memory.device import Device
from nbdram.memory.space import Space
from nbdram.memory.tiers.disk import DiskTier
from nbdram.memory.tiers.ram import RamTier

# name: (where the function is, its name, whether it is done before the end)
POINTS: dict[str, tuple[Any, str, bool]] = {
    "bytes are in hot, the word is to change": (Device, "mark_written", False),
    "a write is in, and not acknowledged": (Device, "mark_written", True),
    "an image is stored in RAM": (RamTier, "store", True),
    "an image is stored on disk": (DiskTier, "store", True),
    "the word is to point at a new image": (Space, "take_images", False),
    "the word points at a new image": (Space, "take_images", True),
    "the word has changed, pages are to be punched": (Space, "release", False),
    "pages are punched": (Space, "release", True),
    "an old image is to be dropped": (Device, "drop_image", False),
    "an old image is dropped": (Device, "drop_image", True),
    "an index page is to be punched": (Space, "_drop_metadata", False),
    "a faulted page is in hot, the word is to change": (device, "pages_within", False),
    "the manifest is to be replaced": (os, "replace", False),
    "the manifest is replaced": (os, "replace", True),
}


def wrap(place: Any, name: str, done: bool, count: int) -> None:
    original: Callable[..., Any] = getattr(place, name)
    left = count

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            if done:
                original(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(place, name, wrapped)


if __name__ == "__main__":
    wrap(*POINTS[sys.argv[1]], int(sys.argv[2]))
    sys.exit(cli.main(sys.argv[3:]))
