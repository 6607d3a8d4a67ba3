"""The keeper, with a real kernel: servers are killed under busy file systems, and nobody but the log notices."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import MIB
from tests.kernel.attaching import TOOLS, AnyServer, OurServer, acts, boot, said
from tests.kernel.guest import Guest, require_tools

BUSY = r"""
busy() { # a tree of files and a verifying writer, for some seconds
    fio --name=verify --directory="$MNT" --size=32M --bs=16k --rw=randwrite --ioengine=libaio --iodepth=8 --direct=1 \
        --verify=crc32c --verify_fatal=1 --time_based --runtime="$1" --output="$TMPDIR/fio" >/dev/null &
}
idle() { wait $! || { cat "$TMPDIR/fio"; exit 1; }; }
"""


@pytest.fixture
def guest() -> Iterator[Guest]:
    require_tools(TOOLS)
    with Guest() as guest:
        yield guest


@pytest.mark.parametrize("connections", [1, 4])
def test_a_busy_file_system_goes_on_when_its_server_is_killed(guest: Guest, tmp_path: Path, connections: int) -> None:
    server = AnyServer(guest, tmp_path / "image", 256 * MIB).start()

    boot(
        guest,
        BUSY
        + rf"""
        nbdram attach nbd://$SERVER/ --connections {connections}
        [ "$(cat /sys/block/nbd0/backend)" = "nbdram:nbd://$SERVER/" ]
        mkfs.ext4 -q -O ^has_journal /dev/nbd0
        mount /dev/nbd0 $MNT
        busy 4
        sleep 0.7; pause first
        sleep 1.2; pause second
        idle
        sha256sum $MNT/verify* >$TMPDIR/sums
        umount $MNT
        e2fsck -fn /dev/nbd0
        mount /dev/nbd0 $MNT
        sha256sum --quiet --check $TMPDIR/sums
        umount $MNT
        nbdram attach --status --json >$SHARE/status
        nbdram detach /dev/nbd0
        [ ! -e /sys/block/nbd0/pid ]
        """,
        acts(guest, first=server.restart, second=server.restart),
    )
    assert said(guest, "keeper.log").count("connected again") >= 2
    assert f'"connected": {connections}' in said(guest, "status")
    assert '"state": "connected"' in said(guest, "status")


def test_a_server_that_is_only_slow_gets_more_time_until_one_is_really_gone(guest: Guest, shm: Path) -> None:
    """Of two devices one has several connections; the other one's only connection is never given up."""
    server = OurServer(guest, shm, "--export", "disk=256MiB", "--memory", "64MiB").start()
    freeze, thaw = lambda: server.signal(signal.SIGSTOP), lambda: server.signal(signal.SIGCONT)
    boot(
        guest,
        r"""
        timeout() { cat /sys/block/nbd$1/queue/io_timeout; }
        read_page() { dd if=/dev/nbd$1 of=/dev/null bs=4k count=1 skip=$2 iflag=direct status=none; }
        given_up() { dmesg | grep -c "nbd1: Connection timed out, retrying" || true; }
        nbdram attach nbd://$SERVER/disk /dev/nbd0 --connections 4
        nbdram attach nbd://$SERVER/disk /dev/nbd1
        [ $(timeout 0) = 300 ]
        [ $(timeout 1) = 200 ]
        pause freeze
        read_page 0 0 & several=$!
        read_page 1 0 & one=$!
        until_says "nbd0: Connection timed out, retrying" dmesg --notime
        until_says "nbd1: Possible stuck request .*read@0," dmesg --notime
        pause thaw
        wait $several
        wait $one
        until_says "nbd0: requests wait for .* s before another" cat /run/nbdram/keeper.log
        [ $(timeout 0) -gt 300 ]
        [ $(timeout 1) = 200 ]

        # What a server has taken and not answered when it is killed waits for the next one.
        pause freeze_again
        read_page 1 1 & one=$!
        until_says "nbd1: Possible stuck request .*read@4096," dmesg --notime
        [ $(given_up) = 0 ]
        pause kill
        until_says "nbd1: .*Connection refused" cat /run/nbdram/keeper.log
        until_says "nbd1: Connection timed out, retrying" dmesg --notime
        pause start
        wait $one
        until_says "requests wait for 0.3 s before another" cat /run/nbdram/keeper.log
        until_says "nbd1: connected again" cat /run/nbdram/keeper.log
        [ $(timeout 0) = 300 ]
        [ $(timeout 1) = 200 ]

        # With that one the kernel is as patient as before.
        count=$(given_up)
        pause freeze_once_more
        read_page 1 2 & one=$!
        until_says "nbd1: Possible stuck request .*read@8192," dmesg --notime
        pause thaw_again
        wait $one
        [ $(given_up) = $count ]
        nbdram detach /dev/nbd0
        nbdram detach /dev/nbd1
        """,
        acts(
            guest,
            freeze=freeze,
            freeze_again=freeze,
            freeze_once_more=freeze,
            thaw=thaw,
            thaw_again=thaw,
            kill=lambda: server.signal(signal.SIGKILL),
            start=server.start,
        ),
    )


def test_a_device_outlives_its_keeper_and_the_server_that_goes_meanwhile(guest: Guest, tmp_path: Path) -> None:
    server = AnyServer(guest, tmp_path / "image", 256 * MIB).start()
    boot(
        guest,
        r"""
        keeper() { pgrep -f 'nbdram keeper' | tail -n 1; }
        nbdram attach nbd://$SERVER/
        mkfs.ext4 -q -O ^has_journal /dev/nbd0
        mount /dev/nbd0 $MNT

        # Its parent starts it again; the new one has no sockets of the old one's, but hears of what dies.
        kill -9 $(keeper)
        until_says "connected again" cat /run/nbdram/keeper.log
        pause kill
        dd if=/dev/urandom of=$MNT/file bs=1M count=4 oflag=direct status=none

        # Both at once, and the parent too: an operator starts the next one.
        killed 'nbdram keeper'
        pause stop
        dd if=/dev/urandom of=$MNT/other bs=1M count=4 oflag=direct status=none &
        pause start
        "$NBDRAM" keeper --until-idle >>/run/nbdram/keeper.log 2>&1 &
        wait %1
        umount $MNT
        e2fsck -fn /dev/nbd0
        nbdram detach /dev/nbd0
        until_says "nothing left to keep" cat /run/nbdram/keeper.log
        """,
        acts(guest, kill=server.restart, stop=server.kill, start=server.start),
    )


def test_an_empty_device_of_the_same_name_is_not_taken_for_the_lost_one(guest: Guest) -> None:
    first = guest.serve("--export", "disk=1GiB", "--memory", "64MiB")
    boot(
        guest,
        r"""
        nbdram attach nbd://$SERVER/disk --dead-timeout 4
        mkfs.ext4 -q -O ^has_journal /dev/nbd0
        pause restart
        until_says "another device under this name" cat /run/nbdram/keeper.log
        until_says "another device under this name" nbdram "attach --status"
        refused "has no server now" nbdram detach /dev/nbd0

        # What was asked for when the server stays away: an error, in time, and the rest of the host is well.
        refused "Input/output error" dd if=/dev/nbd0 of=/dev/null bs=4k count=1 iflag=direct
        dmesg -c >$SHARE/expected
        nbdram detach --force /dev/nbd0
        [ ! -e /sys/block/nbd0/pid ]
        nbdram attach nbd://$SERVER/disk /dev/nbd0
        nbdram detach /dev/nbd0
        """,
        acts(guest, restart=lambda: (first.stop(), guest.serve("--export", "disk=1GiB", "--memory", "64MiB"))),
    )
    log = said(guest, "keeper.log")
    assert log.count("another device under this name") == 1, "one line, not one for each try"
    assert "connected again" not in log


def test_a_device_grows_with_its_export_and_never_shrinks(guest: Guest, tmp_path: Path) -> None:
    server = AnyServer(guest, tmp_path / "image", 256 * MIB).start()

    def restart_with(size: int) -> None:
        server.kill()
        server.resize(size)
        server.start()

    boot(
        guest,
        r"""
        size() { blockdev --getsize64 /dev/nbd0; }
        nbdram attach nbd://$SERVER/
        mkfs.ext4 -q -O ^has_journal /dev/nbd0
        mount /dev/nbd0 $MNT
        pause grow
        until_says "grew to 512 MiB" cat /run/nbdram/keeper.log
        [ $(size) = $((512 << 20)) ]
        resize2fs /dev/nbd0
        [ $(($(stat -f -c %b $MNT) * $(stat -f -c %S $MNT))) -gt $((400 << 20)) ]

        pause shrink
        until_says "has only 128 MiB now" cat /run/nbdram/keeper.log
        [ $(size) = $((512 << 20)) ]
        pause repair
        until_says "connected again" cat /run/nbdram/keeper.log
        umount $MNT
        e2fsck -fn /dev/nbd0
        nbdram detach /dev/nbd0
        """,
        acts(
            guest,
            grow=lambda: restart_with(512 * MIB),
            shrink=lambda: restart_with(128 * MIB),
            repair=lambda: restart_with(512 * MIB),
        ),
    )
