"""`nbdram mount` and `umount` with a real kernel: one command each, and nothing is left of what goes wrong."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.attaching import TOOLS, acts, boot, said
from tests.kernel.guest import Guest, require_tools

MORE_TOOLS = {"mkfs.xfs": "xfsprogs", "mkfs.btrfs": "btrfs-progs", "blkid": "util-linux"}

LOOK = r"""
export NOTES=/run/nbdram/mounts D=/run/scratch
mkdir $D
clean() { # nothing is left of a mount
    if grep "$NOTES\|$D" /proc/mounts || pgrep -af 'nbdram serve' || nbdram attach --status | grep .; then exit 1; fi
    [ -z "$(ls $NOTES)" ] || { find $NOTES; exit 1; }
}
capacity() { df -m --output=size $D | tail -n 1; }
one_succeeds() { # of two that were started, whose output is in one and two
    made=0
    if wait $1; then made=$((made + 1)); fi
    if wait $2; then made=$((made + 1)); fi
    cat $TMPDIR/one $TMPDIR/two
    [ $made = 1 ]
}
until_there() { # these files exist, in time
    for path; do
        for _ in $(seq 200); do [ -e $path ] && continue 2; sleep 0.1; done
        echo "never there: $path"; exit 1
    done
}
"""


@pytest.fixture
def guest() -> Iterator[Guest]:
    require_tools({**TOOLS, **MORE_TOOLS})
    with Guest(memory="512M") as guest:
        yield guest


def test_a_file_system_in_ram_comes_and_goes_with_one_command_each(guest: Guest) -> None:
    boot(
        guest,
        LOOK
        + r"""
        chmod 1770 $D
        nbdram mount 1G $D --memory 64M --gid 27 --connections 2 | tee $TMPDIR/said
        [ "$(cat $TMPDIR/said)" = "$D is 1 GiB of ext4 on /dev/nbd0, in at most 64 MiB of RAM" ]
        grep -q "^/dev/nbd0 $D ext4 rw,noatime,discard 0 0" /proc/mounts
        [ "$(stat -c '%a %u %g' $D)" = "1770 0 27" ]
        [ $(cat /proc/$(pgrep -f 'nbdram serve')/oom_score_adj) -le -500 ]
        [ "$(nbdram mount)" = "$(printf '%-24s %10s %-6s %-12s run-scratch' $D '1 GiB' ext4 /dev/nbd0)" ]

        refused "is mounted at $D: unmount it" nbdram mount 1G $D
        mkdir /run/other
        refused "'run-scratch' is mounted at $D" nbdram mount 1G /run/other --name run-scratch
        head -c 20M /dev/urandom >$D/file
        sleep 60 <$D/file &
        (cd $D && exec sleep 61) &
        until [ $(pgrep -c sleep) = 2 ]; do sleep 0.1; done
        refused "$D is in use by sleep (process [0-9]*), sleep (process [0-9]*): end that first" nbdram umount $D
        kill $(pgrep sleep)
        mount --bind $D /run/other
        refused "is mounted at /run/other too" nbdram umount $D
        umount /run/other
        refused "nbdram has mounted nothing at /run/other" nbdram umount /run/other
        nbdram umount $D | grep -q "^$D is unmounted, 2.* MiB are free again$"
        clean

        # What is kept is there again; it may be larger then, and is freed when told.
        nbdram mount 1G $D --memory 64M --keep --name kept
        echo precious >$D/file
        nbdram umount kept | grep "its data is kept"
        [ -d $NOTES/kept/state ]
        nbdram mount 512M /run/other --name kept --memory 48M --keep | grep -q "1 GiB of ext4"
        [ "$(cat /run/other/file)" = precious ]
        nbdram umount /run/other
        nbdram mount 3G $D --name kept --memory 48M --keep | grep -q "3 GiB of ext4"
        [ $(capacity) -gt 2800 ]
        nbdram umount $D
        nbdram umount --free kept
        clean

        for kind in xfs btrfs; do
            nbdram mount 1G $D --fs $kind --memory 128M -o nosuid | grep -q "1 GiB of $kind"
            grep -q "^/dev/nbd0 $D $kind rw,nosuid,noatime" /proc/mounts
            [ $kind = xfs ] || grep -q "^/dev/nbd0 $D btrfs .*,nodatacow,.*commit=1" /proc/mounts
            cp /etc/passwd $D
            nbdram resize $D 2G --grow-fs | grep "the file system at $D has grown"
            [ $(capacity) -gt 1800 ]
            nbdram umount $D
        done
        clean

        # As /etc/fstab has it, once the helper is where mount(8) looks; umount(8) needs none.
        mkdir /run/sbin /run/helpers
        mount --bind /usr/sbin /run/sbin
        ln -s /run/sbin/* "${NBDRAM%nbdram}mount.nbdram" /run/helpers
        mount --bind /run/helpers /usr/sbin
        mount -t nbdram work $D -o size=256m,memory=64m,mode=1777,journal,nosuid,nofail,x-systemd.automount
        grep -q "^/dev/nbd0 $D ext4 rw,nosuid,noatime,discard 0 0" /proc/mounts
        [ "$(stat -c %a $D)" = 1777 ]
        [ -d $NOTES/work ]
        umount $D
        until [ -z "$(nbdram mount)" ]; do sleep 0.1; done
        clean

        # At boot it is called in /, where the name may be a directory's; and `mount -a` may be said again.
        echo "scratch $D nbdram size=256m,memory=64m 0 0" >$TMPDIR/fstab
        cd $(dirname $D)
        mount --fstab $TMPDIR/fstab -a
        nbdram mount | grep -q " scratch$"
        mount --fstab $TMPDIR/fstab -a 2>&1 | grep "scratch is mounted at $D already"
        cd /
        nbdram umount scratch
        clean
        refused "say how large it is" mount -t nbdram work $D -o nosuid
        """,
    )
    assert "Traceback" not in said(guest, "keeper.log")


def test_an_export_of_any_server_is_mounted_by_its_uri(guest: Guest) -> None:
    server = guest.serve("--export", "data=1GiB", "--export", "fixed=64MiB,ro", "--memory", "256MiB")
    boot(
        guest,
        LOOK
        + r"""
        URI=nbd://$SERVER
        nbdram mount $URI/data $D | grep -q "^$D is 1 GiB of ext4 on /dev/nbd0, which is $URI/data$"
        echo precious >$D/file
        mkdir /run/other
        refused "is in use already, as /dev/nbd0 at $D, .*: unmount that first" nbdram mount $URI:10809/data /run/other
        [ "$(nbdram attach --status | wc -l)" = 1 ]
        nbdram umount $D | grep -q "^$D is unmounted$"
        clean
        refused "there is ext4 on $URI/data, not xfs" nbdram mount $URI/data $D --fs xfs
        clean
        nbdram mount $URI/data $D -o ro
        [ "$(cat $D/file)" = precious ]
        nbdram umount $D
        refused "mkfs.ext4 failed" nbdram mount $URI/fixed $D
        refused "there is no export of this name" nbdram mount $URI/nothing $D
        clean

        # By force, though its server is there: nothing is lost.
        nbdram mount $URI/data $D
        echo unwritten >$D/more
        nbdram umount --force $D
        clean
        nbdram mount $URI/data $D
        [ "$(cat $D/more)" = unwritten ]
        nbdram umount $D

        # It is there, and answers nothing.
        nbdram mount $URI/data $D --dead-timeout 3600
        echo lost >$D/most
        pause frozen
        nbdram umount --force $D
        dmesg -c >$SHARE/expected
        pause thawed
        clean

        # Its server is gone for good: what was not written is lost, and the kernel says so, but nothing is left.
        nbdram mount $URI/data $D --dead-timeout 3600
        echo lost >$D/more
        pause gone
        nbdram umount --force $D
        dmesg -c >$SHARE/expected
        clean
        """,
        acts(
            guest,
            frozen=lambda: server.signal(signal.SIGSTOP),
            thawed=lambda: server.signal(signal.SIGCONT),
            gone=server.stop,
        ),
    )


def test_mounts_at_the_same_time_do_not_get_in_each_others_way(guest: Guest) -> None:
    boot(
        guest,
        LOOK
        + r"""
        mkdir /run/other
        one_of_both() { # starts both commands at once: one succeeds, the other says this
            want=$1
            "$NBDRAM" mount 1G $2 --memory 40M --name $3 >$TMPDIR/one 2>&1 & one=$!
            "$NBDRAM" mount 1G $4 --memory 40M --name $5 >$TMPDIR/two 2>&1 & two=$!
            one_succeeds $one $two
            grep -q -- "$want" $TMPDIR/one $TMPDIR/two
            [ "$(grep -c " ext4 " /proc/mounts)" = 1 ]
            nbdram umount $(nbdram mount | cut -d ' ' -f 1)
            clean
        }
        one_of_both "'twin' is \(mounted at\|being mounted\)" $D twin /run/other twin
        one_of_both "mounted at $D.* choose another directory" $D first $D second

        # Both have room, also where the kernel has one device only: it makes more.
        until_says "nothing left to keep" cat /run/nbdram/keeper.log
        rmmod nbd
        insmod /usr/lib/uml/modules/$(uname -r)/kernel/drivers/block/nbd.ko nbds_max=1
        nbdram mount 1G $D --memory 40M & one=$!
        nbdram mount 1G /run/other --memory 40M
        wait $one
        [ "$(cut -d ' ' -f 1 /proc/mounts | grep -c '^/dev/nbd[01]$')" = 2 ]
        nbdram umount $D
        nbdram umount /run/other
        clean
        """,
    )


def test_of_two_who_mount_the_same_export_at_the_same_time_one_has_it(guest: Guest) -> None:
    guest.serve("--export", "data=1GiB", "--memory", "64MiB")
    boot(
        guest,
        LOOK
        + r"""
        mkdir /run/other $TMPDIR/bin
        # Slow, so that each would find that nobody has mounted it.
        printf '#!/bin/sh\nsleep 2\nexec %s "$@"\n' $(command -v mkfs.ext4) >$TMPDIR/bin/mkfs.ext4
        chmod +x $TMPDIR/bin/mkfs.ext4
        PATH=$TMPDIR/bin:$PATH
        "$NBDRAM" mount nbd://$SERVER/data $D >$TMPDIR/one 2>&1 & one=$!
        "$NBDRAM" mount nbd://$SERVER/data /run/other >$TMPDIR/two 2>&1 & two=$!
        one_succeeds $one $two
        cat $TMPDIR/one $TMPDIR/two | grep "is in use already, as /dev/nbd[01] at .*: unmount that first"
        [ "$(grep -c " ext4 " /proc/mounts)" = 1 ]
        nbdram umount $(nbdram mount | cut -d ' ' -f 1)
        clean
        """,
    )


def test_a_step_that_fails_or_is_interrupted_undoes_those_before_it(guest: Guest) -> None:
    guest.serve("--export", "disk=1GiB", "--memory", "64MiB")
    boot(
        guest,
        LOOK
        + r"""
        mount="$NBDRAM mount 1G $D --memory 64M"
        refused "needs CAP_SYS_ADMIN" setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin "$NBDRAM" mount 1G $D
        nbdram attach nbd://$SERVER/disk /dev/nbd3
        refused "/dev/nbd3 is in use" $mount --device /dev/nbd3
        nbdram detach /dev/nbd3
        clean
        refused "the server did not start: .*/proc/nothing" $mount --swap disk:/proc/nothing
        clean
        refused "mount failed: " $mount -o nonsense
        clean
        refused "there is no file system on .*: make one first, without the option ro" $mount -o nosuid,ro
        clean

        # Interrupted where it is slow.
        mkdir $TMPDIR/bin
        interrupted() {
            rm -f $TMPDIR/here
            PATH=$TMPDIR/bin:$PATH $mount --name slow & pid=$!
            until_there $1
            kill $pid
            if wait $pid; then exit 1; fi
            clean
        }
        interrupted $NOTES/slow/server.log
        printf '#!/bin/sh\ntouch $TMPDIR/here\nexec sleep 60\n' >$TMPDIR/bin/mkfs.ext4
        chmod +x $TMPDIR/bin/mkfs.ext4
        interrupted $TMPDIR/here
        rm $TMPDIR/bin/mkfs.ext4
        cat >$TMPDIR/bin/mount <<'END'
#!/bin/sh
/usr/bin/mount "$@" || exit
case "$*" in *ext4*) touch $TMPDIR/here; exec sleep 60;; esac
END
        chmod +x $TMPDIR/bin/mount

        # Killed when a child has done its work, it can undo nothing: what is left is told, and umount clears it.
        rm -f $TMPDIR/here
        PATH=$TMPDIR/bin:$PATH $mount --name cut & pid=$!
        until_there $TMPDIR/here
        kill -9 $pid
        wait $pid || true
        refused "'cut' is mounted at $D: unmount it" nbdram mount 1G /run/nbdram --name cut --nonempty
        umount -i $D
        refused "a mount of 'cut' was cut short: clean up with .nbdram umount $D" $mount --name cut
        nbdram umount $D
        clean

        # The server is killed between mount and umount: the keeper starts it again.
        $mount
        echo precious >$D/file
        sync
        kill -9 $(pgrep -f 'nbdram serve')
        echo 3 >/proc/sys/vm/drop_caches
        [ "$(cat $D/file)" = precious ]
        nbdram umount $D
        clean

        # All are killed, the keeper and its parent too: who asks for a keeper next starts one, which goes on.
        $mount
        for asks in "$NBDRAM attach --status" "$NBDRAM umount $D"; do
            echo precious >$D/file
            killed 'nbdram (keeper|serve)'
            $asks | grep "/dev/nbd0 \|free again"
        done
        clean

        until_says "nothing left to keep" cat /run/nbdram/keeper.log
        rmmod nbd
        refused "load the module with .modprobe nbd" $mount
        clean
        """,
    )


def test_a_busy_file_system_grows_after_paging_has_occurred(guest: Guest, tmp_path: Path) -> None:
    boot(
        guest,
        LOOK
        + r"""
        nbdram mount 128M $D --name work --memory 40M --swap disk:/run/swap --keep
        nbdram resize work 64M && exit 1
        head -c 24M /dev/urandom | base64 -w 0 >$D/file
        sha256sum $D/file >$TMPDIR/sums
        sync
        nbdram exports --json --control $NOTES/work/control | grep '"disk": [1-9]'
        fio --name=verify --directory=$D --size=16M --bs=16k --rw=randwrite --ioengine=libaio --iodepth=8 --direct=1 \
            --verify=crc32c --verify_fatal=1 --time_based --runtime=4 --output=$TMPDIR/fio >/dev/null & fio=$!
        nbdram resize work 16G --grow-fs | grep "the file system at $D has grown"
        [ $(blockdev --getsize64 /dev/nbd0) = $((16 << 30)) ]
        [ $(capacity) -gt 15000 ]
        wait $fio
        head -c 8M /dev/urandom >$D/more
        echo 3 >/proc/sys/vm/drop_caches
        sha256sum --quiet --check $TMPDIR/sums
        umount -i $D
        until nbdram mount | grep -q " kept "; do sleep 0.1; done
        "$NBDRAM" serve --state-dir $NOTES/work/state --memory 40M --swap disk:/run/swap --listen unix:$TMPDIR/nbd \
            --metrics off & server=$!
        until_there $TMPDIR/nbd
        nbdram attach "nbd+unix:///work?socket=$TMPDIR/nbd" /dev/nbd0
        e2fsck -fn /dev/nbd0
        nbdram detach /dev/nbd0
        kill $server
        wait $server
        nbdram umount --free work
        clean
        [ "$(ls /run/swap)" = lock ]
        """,
    )
