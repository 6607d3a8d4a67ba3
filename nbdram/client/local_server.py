"""A server of this host that belongs to one mount: started, awaited and stopped."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from nbdram.client.log_file import cut
from nbdram.client.mount_notes import Place
from nbdram.config import SwapSettings
from nbdram.errors import NbdramError
from nbdram.observe.control import ask

_START_TIMEOUT_S: Final = 120.0  # what is kept is looked through first
_STOP_TIMEOUT_S: Final = 15.0


def command(place: Place, size: int, memory: int, swap: Sequence[SwapSettings], metrics: str) -> tuple[str, ...]:
    """What starts it, and starts it again when it has died. `size` and `memory` in bytes."""
    words = [sys.executable, "-P", "-m", "nbdram", "serve", "--same-host"]
    words += ["--export", f"{place.name}={size}", "--memory", str(memory), "--metrics", metrics]
    words += ["--listen", f"unix:{place.socket}", "--control", str(place.control), "--state-dir", str(place.state)]
    for area in swap:
        limit = f",max={area.max_bytes}" if area.max_bytes else ""
        words += ["--swap", f"disk:{area.path.absolute()}{limit}"]
    return tuple(words)


def start(place: Place, argv: Sequence[str]) -> "subprocess.Popen[bytes]":
    with place.log.open("ab") as log:
        cut(log.fileno())
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, cwd="/", start_new_session=True
        )


def wait_until_ready(place: Place, process: "subprocess.Popen[bytes]") -> None:
    """Return when it serves; NbdramError with the last that it said if it doesn't."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        if place.control.is_socket():
            with suppress(NbdramError):
                ask(place.control, "exports")
                return
        if process.poll() is not None:
            said = place.log.read_text(errors="replace").strip().rpartition("\n")[2]
            raise NbdramError(f"the server did not start: {said.removeprefix('nbdram: ')}")
        if time.monotonic() > deadline:
            raise NbdramError(f"the server is not ready after {_START_TIMEOUT_S:g} s: see {place.log}")
        time.sleep(0.01)


def end(process: "subprocess.Popen[bytes]") -> None:
    """End one that has just been started."""
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def stop(state: Path) -> None:
    """End whichever server uses a state directory: it drains, and is killed if that takes too long."""
    pid = _user_of(state)
    if pid is None:
        return
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, number)
            if select.select([process], [], [], _STOP_TIMEOUT_S)[0]:
                return
    finally:
        os.close(process)
    raise NbdramError(f"the server (process {pid}) does not end: the kernel's messages may say why (dmesg)")


def _user_of(state: Path) -> int | None:
    """The process that holds the lock of a state directory."""
    try:
        found = state.stat()
    except FileNotFoundError:
        return None
    wanted = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()  # 1: FLOCK ADVISORY WRITE PID MAJOR:MINOR:INODE 0 EOF
        if len(words) == 8 and words[1] == "FLOCK" and words[5] == wanted:
            return int(words[4])
    return None
