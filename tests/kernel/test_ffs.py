"""BSD's fast file system on our devices: UFS1 and UFS2, written by a kernel, paged out, killed under, read again."""

import subprocess
from pathlib import Path

import pytest

from tests.kernel.attaching import TOOLS, OurServer, acts, boot
from tests.kernel.guest import Guest, require_tools
from tests.kernel.ufs_module import ufs_module

VERSIONS = {1: "44bsd", 2: "ufs2"}


def make_image(directory: Path, version: int) -> Path:
    """An FFS of 64 MiB with one file, and room for many."""
    (directory / "files").mkdir(exist_ok=True)
    (directory / "files/motd").write_text("made by makefs\n")
    image = directory / f"ufs{version}"
    options = ["-t", "ffs", "-s", "64m", "-f", "3000", "-o", f"version={version}"]
    subprocess.run(["makefs", *options, image, directory / "files"], check=True, capture_output=True)
    return image


@pytest.mark.timeout(400)  # the module may have to be built
def test_ffs_lives_on_a_device_that_is_paged_out_and_whose_server_is_killed(tmp_path: Path, shm: Path) -> None:
    require_tools({**TOOLS, "makefs": "makefs"})
    module = ufs_module()
    for version in VERSIONS:
        make_image(tmp_path, version)
    found = []
    with Guest() as guest:
        exports = [word for version in VERSIONS for word in ("--export", f"ufs{version}=64M")]
        swap = ["--swap", f"disk:{tmp_path / 'swap'}"]
        server = OurServer(guest, shm, *exports, "--memory", "40M", *swap).start()

        def kill_when_paged_out() -> None:
            found.extend(server.exports())
            server.restart()

        boot(
            guest,
            rf"""
            insmod {module}
            each() {{ for version in 1 2; do "$1" $version; done; }}
            attach() {{ nbdram attach nbd://$SERVER/ufs$1 /dev/nbd$1 --block-size 512 >/dev/null; }}
            mount_it() {{
                [ $1 = 1 ] && type={VERSIONS[1]} || type={VERSIONS[2]}
                mount -t ufs -o rw,noatime,ufstype=$type /dev/nbd$1 $MNT/$1
                grep -q "^/dev/nbd$1 $MNT/$1 ufs rw" /proc/mounts
            }}
            away() {{ umount $MNT/$1; nbdram detach /dev/nbd$1; }}
            fill() {{
                dd if={tmp_path}/ufs$1 of=/dev/nbd$1 bs=1M status=none
                mount_it $1
                [ "$(cat $MNT/$1/motd)" = "made by makefs" ]
                cp -a /usr/lib/x86_64-linux-gnu/perl-base $MNT/$1
                head -c 14M /dev/urandom >$MNT/$1/random
                rm $MNT/$1/motd
            }}
            sums() {{ (cd $MNT && find . -type f -exec sha256sum {{}} +); }}
            check() {{ echo 3 >/proc/sys/vm/drop_caches; (cd $MNT && sha256sum --quiet --check $TMPDIR/sums); }}

            mount -t tmpfs none $MNT
            mkdir $MNT/1 $MNT/2
            each attach
            each fill
            sync
            sums >$TMPDIR/sums
            [ $(wc -l <$TMPDIR/sums) -gt 1000 ]
            pause paged
            check

            # Killed in the middle of writing, and everything there after the file systems were mounted anew.
            (for version in 1 2; do head -c 4M /dev/urandom >$MNT/$version/more; done; sync) & writer=$!
            pause writing
            wait $writer
            sums >$TMPDIR/sums
            each away
            each attach
            each mount_it
            check
            rm -r $MNT/?/perl-base $MNT/?/random
            each away
            """,
            acts(guest, paged=kill_when_paged_out, writing=server.restart),
        )
    assert all(export["disk"] for export in found), found
    assert any(export["compressed"] for export in found), found
