"""What tests share that attach devices in a guest with nbdram's own client, and servers that they kill and restart."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from nbdram.errors import NbdramError
from nbdram.observe.control import ask
from tests.helpers import PATIENCE_S
from tests.kernel.guest import NBD_PORT, PAUSE, SERVER_ADDRESS, Guest, Result, end, pauses

TOOLS = {"mkfs.ext4": "e2fsprogs", "fio": "fio", "nbdkit": "nbdkit"}
TIMEOUT_S = 600

# What the kernel says when a device lost data or a file system noticed.
BAD = re.compile(
    r"I/O error|Buffer I/O|EXT4-fs (error|warning)|corrupt|hung task|blocked for more|call trace|\bBUG\b", re.I
)

PRELUDE = (
    PAUSE
    + rf"""
set -eu
export NBDRAM={Path(sys.executable).parent}/nbdram
trap 'status=$?; dmesg >$SHARE/dmesg; cp /run/nbdram/keeper.log $SHARE/ 2>/dev/null; exit $status' EXIT
nbdram() {{ "$NBDRAM" "$@"; }}
refused() {{ # the command fails, and says this
    want=$1; shift
    if "$@" >$TMPDIR/said 2>&1; then echo "not refused: $*"; exit 1; fi
    grep -q -- "$want" $TMPDIR/said || {{ echo "refused otherwise: $*"; cat $TMPDIR/said; exit 1; }}
    ! grep -q Traceback $TMPDIR/said
}}
until_says() {{ # this command says this, in time
    for _ in $(seq 200); do
        if "$2" $3 2>&1 | grep -q -- "$1"; then return 0; fi
        sleep 0.1
    done
    echo "never said: $1"; exit 1
}}
killed() {{ # none is left whose command line matches: one may end, or start another, between a look and the signal
    while pids=$(pgrep -f "$1"); do kill -9 $pids 2>/dev/null || true; done
}}
"""
)


class AnyServer:
    """nbdkit on a file, which outlives it: a server that is not ours, and can be killed and started again."""

    def __init__(self, guest: Guest, image: Path, size: int) -> None:
        self._guest = guest
        self._image = image
        with image.open("wb") as file:
            file.truncate(size)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        where = ["-p", str(NBD_PORT), "-i", SERVER_ADDRESS]
        self._process = self._guest.spawn_host(["nbdkit", "-f", *where, "file", str(self._image)])
        return self

    def kill(self) -> None:
        """Without a chance to say good-bye."""
        assert self._process
        end(self._process, grace_s=0)

    def restart(self) -> None:
        self.kill()
        self.start()

    def resize(self, size: int) -> None:
        with self._image.open("r+b") as file:
            file.truncate(size)


class OurServer:
    """`nbdram serve` with a state directory in `directory`, which can be killed and started again."""

    def __init__(self, guest: Guest, directory: Path, *arguments: str) -> None:
        self._guest = guest
        self._control = directory / "control"
        listen = ["--listen", f"tcp://{SERVER_ADDRESS}:{NBD_PORT}", "--allow-plaintext", "--metrics", "off"]
        where = ["--state-dir", str(directory / "state"), "--control", str(self._control)]
        self._argv = [sys.executable, "-m", "nbdram", "serve", *listen, *where, *arguments]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        self._process = self._guest.spawn_host(self._argv)
        eventually_sync(self.exports)
        return self

    def restart(self) -> None:
        """Killed, and there again before this returns."""
        assert self._process
        end(self._process, grace_s=0)
        self.start()

    def signal(self, number: int) -> None:
        assert self._process
        self._process.send_signal(number)

    def exports(self) -> list[dict[str, Any]]:
        """What it tells of its exports; [] while it does not answer."""
        try:
            return list(ask(self._control, "exports")["exports"])
        except NbdramError:
            return []


def eventually_sync(look: Callable[[], object]) -> None:
    """Wait until something is the case."""
    deadline = time.monotonic() + PATIENCE_S
    while not look():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:g} s"
        time.sleep(0.02)


def boot(guest: Guest, script: str, on_line: Callable[[str], None] | None = None) -> Result:
    """Boot and run: the script succeeds, and no file system and no device reports an error."""
    result = guest.run(PRELUDE + script, timeout_s=TIMEOUT_S, on_line=on_line)
    logs = [f"--- {name}:\n{text}" for name in ("keeper.log", "dmesg") if (text := said(guest, name))]
    assert result.status == 0, "\n".join([result.output, *logs, f"--- console:\n{result.console}"])
    assert [line for line in said(guest, "dmesg").splitlines() if BAD.search(line)] == []
    return result


def said(guest: Guest, name: str) -> str:
    """A file that the guest left in its share."""
    path = guest.share / name
    return path.read_text() if path.exists() else ""


def acts(guest: Guest, **table: Callable[[], object]) -> Callable[[str], None]:
    """An `on_line` that does what `table` says at each `pause NAME` of the script."""

    def act(name: str) -> None:
        table[name]()

    return pauses(guest.share, act)
