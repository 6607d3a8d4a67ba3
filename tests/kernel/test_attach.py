"""Attach and detach with a real kernel: what works, and what each mistake is told."""

from collections.abc import Iterator

import pytest

from tests.kernel.attaching import TOOLS, boot, said
from tests.kernel.guest import Guest, require_tools


@pytest.fixture
def guest() -> Iterator[Guest]:
    require_tools(TOOLS)
    with Guest() as guest:
        yield guest


def test_devices_are_attached_listed_and_detached_and_mistakes_cost_nothing(guest: Guest) -> None:
    guest.serve("--export", "disk=1GiB", "--export", "other=1TiB", "--export", "fixed=64MiB,ro", "--memory", "256MiB")
    boot(
        guest,
        r"""
        URI=nbd://$SERVER
        [ -z "$(nbdram attach --status)" ]
        refused "is not attached" nbdram detach /dev/nbd0

        # Without the capability nothing is begun, and it says which is missing.
        refused "needs CAP_SYS_ADMIN" setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin "$NBDRAM" attach $URI/disk
        [ ! -e /run/nbdram/keeper.sock ]

        nbdram attach $URI/disk /dev/nbd3 | grep -q "^/dev/nbd3 is $URI/disk, 1 GiB$"
        nbdram attach $URI/other | grep -q "^/dev/nbd0 is"
        nbdram attach $URI/fixed | grep -q "^/dev/nbd1 is"
        [ $(blockdev --getsize64 /dev/nbd0) = $((1 << 40)) ]
        [ $(blockdev --getro /dev/nbd1) = 1 ]
        [ $(nbdram attach --status | grep -c " 1/1  connected  $URI/") = 3 ]

        refused "there is no export of this name" nbdram attach $URI/nothing
        refused "Connection refused" nbdram attach nbd://$SERVER:1/disk
        refused "is not an NBD URI" nbdram attach http://$SERVER/disk
        refused "/dev/nbd3 is in use" nbdram attach $URI/disk /dev/nbd3
        refused "is not a network block device" nbdram attach $URI/disk /dev/sda
        refused "connections must be" nbdram attach $URI/disk --connections 0
        refused "block-size must be" nbdram attach $URI/disk --block-size 3000

        # Somebody else's device is in use, and is not ours to detach.
        nbd-client $SERVER -N disk /dev/nbd5 >/dev/null
        refused "/dev/nbd5 is in use" nbdram attach $URI/disk /dev/nbd5
        refused "not attached by nbdram" nbdram detach /dev/nbd5

        mkfs.ext4 -q -O ^has_journal /dev/nbd3
        mount /dev/nbd3 $MNT
        refused "/dev/nbd3 is in use: unmount it first" nbdram detach /dev/nbd3
        umount $MNT
        [ $(nbdram attach --status | wc -l) = 3 ]

        # Detached by others: the keeper lets it go.
        nbd-client -d /dev/nbd1 >/dev/null
        until_says "nbd1: somebody else has detached it" cat /run/nbdram/keeper.log
        for device in 0 3 5; do
            [ $device = 5 ] && nbd-client -d /dev/nbd5 >/dev/null || nbdram detach /dev/nbd$device
            [ ! -e /sys/block/nbd$device/pid ]
        done
        [ -z "$(nbdram attach --status)" ]

        until_says "nothing left to keep" cat /run/nbdram/keeper.log
        rmmod nbd
        refused "modprobe nbd" nbdram attach $URI/disk
        """,
    )
    assert "Traceback" not in said(guest, "keeper.log")
