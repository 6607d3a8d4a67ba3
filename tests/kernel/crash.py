"""`make crash`: a server is killed with -9, again and again, under a mounted and busy ext4, and nothing is lost.

    python -m tests.kernel.crash [--kills N] [--only VARIANT] [--seed N]

A guest kernel has a device attached, kept by the keeper, and an ext4 of `nbdram mount` on it. In there work: fio, which
verifies what it has written; a loop that copies a tree of files, compares its checksums past all caches, and deletes
it; a file that nobody touches until the end; and a probe that times a write of one page. Outside, the server is killed:
at random moments while it serves, while it starts, and between any two stores that belong together
(`tests.peers.killed`). It is started again at once, on the same state directory. In the end everything is verified once
more, and the file system and the kernel's messages are looked at. Any error fails the run.
"""

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from nbdram.errors import NbdramError
from nbdram.observe.control import ask
from tests import program
from tests.kernel.attaching import BAD, PRELUDE, said
from tests.kernel.guest import CHECKOUT, NBD_PORT, SERVER_ADDRESS, Guest, GuestError, end
from tests.peers.killed import POINTS

RANDOM, STARTING = "at a random moment", "while it starts"
_SERVED_TIMEOUT_S: Final = 30.0
_TRAFFIC_BYTES: Final = 64 << 10  # the file system has gone on after the last kill
_POINT_TIMEOUT_S: Final = 3.0  # points of paging are not reached while memory is plenty
_UNHARMED_S: Final = 2.0
_STEP_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True)
class Variant:
    """How the server and the device are set up; `kill_keeper`: that one is killed as well, every few seconds."""

    name: str
    memory: str = "512M"
    swap: bool = False
    connections: int = 1
    kill_keeper: bool = False


VARIANTS: Final = (
    Variant("plenty of memory"),
    Variant("paging to disk", memory="44M", swap=True),
    Variant("four connections", connections=4),
    Variant("keeper killed too", memory="44M", swap=True, kill_keeper=True),
)

# The tree is read back past all caches. Each worker ends by itself once $SHARE/stop is there, and must end well.
SCRIPT: Final = r"""
until [ -e $SHARE/start ]; do sleep 0.1; done
nbdram mount nbd://$SERVER/disk $MNT --connections $CONNECTIONS
TREE=/usr/lib/x86_64-linux-gnu/perl-base
(cd $TREE && find . -type f -exec sha256sum {} +) >$TMPDIR/sums
check() { (cd $MNT/$1 && sha256sum --quiet --check $TMPDIR/sums); }
head -c 20M /dev/urandom >$MNT/still
(cd $MNT && sha256sum still) >$TMPDIR/still
sync
stopped() { [ -e $SHARE/stop ]; }

trees() {
    number=0
    until stopped; do
        number=$((number + 1))
        cp -a $TREE $MNT/tree.$number
        sync
        echo 3 >/proc/sys/vm/drop_caches
        check tree.$number
        [ $number -lt 3 ] || rm -r $MNT/tree.$((number - 2))
    done
    echo $number >$SHARE/trees
}
verify() {
    fio --name=verify --directory=$MNT --size=24M --bsrange=4k-64k --rw=randwrite --ioengine=libaio --iodepth=8 \
        --direct=1 --verify=crc32c --verify_fatal=1 --verify_state_save=0 --output=$TMPDIR/fio "$@" >/dev/null ||
        { cat $TMPDIR/fio; exit 1; }
}
verifying() { until stopped; do verify --time_based --runtime=3 --verify_backlog=64; done; }
killing() {
    [ $KILL_KEEPER = yes ] || return 0
    until stopped; do
        sleep $(shuf -i 1-4 -n 1).$(shuf -i 0-9 -n 1)
        if kill -9 $(pgrep -f 'nbdram keeper' | tail -n 1) 2>/dev/null; then echo killed >>$SHARE/keepers; fi
    done
}

trees & trees=$!
verifying & verifying=$!
python3 $CHECKOUT/tests/kernel/probe.py $MNT/probe $SHARE/stop >$SHARE/pauses & probe=$!
killing & killing=$!
echo "@busy"
for worker in $trees $verifying $probe $killing; do wait $worker; done
dmesg | tail -n 3
echo "@verifying"

verify
sync
echo 3 >/proc/sys/vm/drop_caches
(cd $MNT && sha256sum --quiet --check $TMPDIR/still)
for tree in $MNT/tree.*; do check ${tree##*/}; done
until [ "$(nbdram attach --status | grep -c "$CONNECTIONS/$CONNECTIONS  connected")" = 1 ]; do sleep 0.1; done
nbdram umount $MNT
nbdram attach nbd://$SERVER/disk /dev/nbd0
e2fsck -fn /dev/nbd0 >$SHARE/e2fsck
nbdram detach /dev/nbd0
"""


class CrashError(Exception):
    """Something was lost, or the campaign could not be made."""


@dataclass
class Figures:
    """What a campaign has seen. `pauses`: for how long writes stood still after kills, in seconds."""

    kills: Counter[str] = field(default_factory=Counter)
    pauses: list[float] = field(default_factory=list)
    trees: int = 0
    keepers_killed: int = 0
    disk_bytes: int = 0
    compressed_bytes: int = 0

    def __str__(self) -> str:
        kinds = Counter("between two stores" if kind in POINTS else kind for kind in self.kills.elements())
        return (
            f"{self.kills.total()} kills ({', '.join(f'{count} {kind}' for kind, count in kinds.items())}; "
            f"{len(POINTS.keys() & self.kills.keys())} different points), {self.keepers_killed} of the keeper; "
            f"{self.trees} trees compared; pause: median {statistics.median(self.pauses):.2f} s, "
            f"worst {max(self.pauses):.2f} s; in the end {self.compressed_bytes >> 20} MiB of images in RAM, "
            f"{self.disk_bytes >> 20} MiB on disk"
        )


class Killer(threading.Thread):
    """Runs the server, and kills it. It must live as long as the guest: what it starts would end with it."""

    def __init__(self, guest: Guest, variant: Variant, directory: Path, kills: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.kills: list[tuple[float, str]] = []  # when, and how
        self.error: BaseException | None = None
        self.busy, self.over = threading.Event(), threading.Event()
        self._guest, self._variant, self._count = guest, variant, kills
        self._control = directory / "control"
        self._chance = random.Random(seed)
        self._points = [point for point in POINTS if "manifest" not in point]
        self._arguments = [
            *("serve", "--listen", f"tcp://{SERVER_ADDRESS}:{NBD_PORT}", "--allow-plaintext", "--metrics", "off"),
            *("--export", "disk=16G", "--memory", variant.memory, "--state-dir", str(directory / "state")),
            *("--control", str(self._control)),
        ]
        if variant.swap:
            self._arguments += ["--swap", f"disk:{directory / 'swap'}"]

    def run(self) -> None:
        share = self._guest.share
        try:
            process = self._start()
            (share / "start").touch()
            self._wait_for(self.busy)
            number = 0
            while len(self.kills) < self._count:
                self._await_traffic(process)
                process = self._kill(number, process)
                number += 1
            self._await_traffic(process)
        except BaseException as error:
            self.error = error
        finally:
            (share / "start").touch()
            (share / "stop").touch()
            self.over.wait()

    def _wait_for(self, event: threading.Event) -> None:
        if not event.wait(_STEP_TIMEOUT_S):
            raise CrashError("the guest did not get busy")

    def _start(self, through: Sequence[str] = ("-m", "nbdram")) -> "subprocess.Popen[bytes]":
        return self._guest.spawn_host([sys.executable, *through, *self._arguments])

    def _kill(self, number: int, process: "subprocess.Popen[bytes]") -> "subprocess.Popen[bytes]":
        """Kill a server, one way or another; the one that runs afterwards."""
        # Not just after the last recovery: the kernel's timer, which is what the next one waits for, begins with it.
        time.sleep(self._chance.uniform(0.05, _UNHARMED_S))
        if number % 10 == 9:
            self._kill_now(RANDOM, process)
            process = self._start()
            time.sleep(self._chance.uniform(0.0, 0.5))
            self._kill_now(STARTING, process)
        elif number % 2:
            # Every other kill is one for the next server to come to: it takes over in a gentle way first.
            self._kill_now(RANDOM, process)
            process = self._die_at(self._points[number // 2 % len(self._points)])
        else:
            self._kill_now(RANDOM, process)
        return self._start()

    def _die_at(self, point: str) -> "subprocess.Popen[bytes]":
        """A server that kills itself at this point, after it has died; if it never gets there, it is killed."""
        process = self._start(["-m", "tests.peers.killed", point, str(self._chance.randint(1, 40))])
        try:
            process.wait(_POINT_TIMEOUT_S)
            self.kills.append((time.time(), point))
        except subprocess.TimeoutExpired:
            self._kill_now(RANDOM, process)
        return process

    def _kill_now(self, how: str, process: "subprocess.Popen[bytes]") -> None:
        if process.poll() is not None:
            raise CrashError(f"the server has ended by itself, with status {process.returncode}")
        self.kills.append((time.time(), how))
        end(process, grace_s=0)

    def _await_traffic(self, process: "subprocess.Popen[bytes]") -> None:
        deadline = time.monotonic() + _SERVED_TIMEOUT_S
        while time.monotonic() < deadline:
            with suppress(NbdramError):  # it may not be there yet
                stats = ask(self._control, "stats")
                if stats["connections"] >= self._variant.connections and stats["written_bytes"] >= _TRAFFIC_BYTES:
                    return
            if process.poll() is not None:
                raise CrashError(f"the server has ended by itself, with status {process.returncode}")
            time.sleep(0.02)
        raise CrashError(f"nobody has written to the server within {_SERVED_TIMEOUT_S:g} s")

    def stored(self) -> dict[str, Any]:
        """The export, as the server tells."""
        return dict(ask(self._control, "exports")["exports"][0])


def campaign(variant: Variant, kills: int, seed: int = 1) -> Figures:
    """Run it; CrashError or GuestError with all that was said if anything is lost or broken."""
    settings = {
        "CONNECTIONS": variant.connections,
        "KILL_KEEPER": "yes" if variant.kill_keeper else "no",
        "CHECKOUT": CHECKOUT,
    }
    script = "".join(f"export {name}={value}\n" for name, value in settings.items())
    figures = Figures()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as state, tempfile.TemporaryDirectory() as disk, Guest() as guest:
        (Path(state) / "swap").symlink_to(disk)
        killer = Killer(guest, variant, Path(state), kills, seed)

        def on_line(line: str) -> None:
            if line == "@busy":
                killer.busy.set()
            elif line == "@verifying" and not killer.error:
                stored = killer.stored()
                figures.compressed_bytes, figures.disk_bytes = stored["compressed"], stored["disk"]

        killer.start()
        try:
            result = guest.run(PRELUDE + script + SCRIPT, timeout_s=_STEP_TIMEOUT_S + 10 * kills, on_line=on_line)
        finally:
            killer.over.set()
        if killer.error:
            raise killer.error
        bad = [line for line in said(guest, "dmesg").splitlines() if BAD.search(line)]
        if result.status != 0 or bad:
            raise CrashError("\n".join([result.output, *bad, "--- keeper.log:", said(guest, "keeper.log")]))
        figures.kills.update(how for _, how in killer.kills)
        figures.pauses = pauses([when for when, _ in killer.kills], said(guest, "pauses"))
        figures.trees = int(said(guest, "trees"))
        figures.keepers_killed = len(said(guest, "keepers").splitlines())
    return figures


def pauses(kills: list[float], told: str) -> list[float]:
    """How long each write that a kill has hit went on from there; of several kills in one write, the first counts."""
    found = []
    for line in told.splitlines():
        begun, took = map(float, line.split())
        hits = [kill for kill in kills if begun - 0.1 <= kill <= begun + took]
        if hits:
            found.append(begun + took - max(begun, min(hits)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="make crash", description="Kill servers under a busy ext4; nothing is lost.")
    parser.add_argument("--kills", type=int, default=100, help="of each variant (default: %(default)s)")
    parser.add_argument("--only", choices=[variant.name for variant in VARIANTS], help="one variant, not all")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.kills < 1:
        parser.error("--kills must be at least 1")
    for variant in VARIANTS:
        if arguments.only in (None, variant.name):
            begun = time.monotonic()
            try:
                figures = campaign(variant, arguments.kills, arguments.seed)
            except (CrashError, GuestError) as error:
                print(f"{variant.name}: {error}", file=sys.stderr)
                return 1
            print(f"{variant.name}: {figures}; {time.monotonic() - begun:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    program.run(main)
