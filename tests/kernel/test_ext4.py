"""A real kernel attaches devices with nbd-client, and ext4 lives on them.

Every boot costs two seconds, so each test takes one device through a life of its own and asserts on the way.
The scripts run under `set -e`: a step that fails, a mount above all, ends them with its status and its message.
"""

import re
from collections.abc import Callable, Iterator

import pytest

from tests.kernel.guest import PAUSE, Guest, Result, Server, pauses, require_tools

MIB = 1 << 20
TIMEOUT_S = 300
TOOLS = {"nbd-client": "nbd-client", "mkfs.ext4": "e2fsprogs", "fio": "fio", "ss": "iproute2"}

# RAM is compared before and after. So the journal is small, as it is zeroed when it is made, and inode tables are not
# zeroed in the background: zeros that are written take RAM as any data does, until reclaim finds them.
PRELUDE = (
    PAUSE
    + r"""
set -eux
attach() { nbd-client "$SERVER" "$PORT" -N disk "$@" /dev/nbd0; }
detach() { nbd-client -d /dev/nbd0; }
make_ext4() { mkfs.ext4 -q -J size=4 "$@" /dev/nbd0; }
mount_ext4() {
    mount -t ext4 -o noinit_itable /dev/nbd0 "$MNT"
    grep -q "^/dev/nbd0 $MNT ext4 rw" /proc/mounts
}
check_ext4() { e2fsck -f -n /dev/nbd0; }
verify() {
    fio --name=verify --ioengine=libaio --iodepth=16 --direct=1 --rw=randwrite --verify=crc32c --verify_fatal=1 \
        --output="$TMPDIR/fio" "$@" || { cat "$TMPDIR/fio"; exit 1; }
}
"""
)


@pytest.fixture
def guest() -> Iterator[Guest]:
    require_tools(TOOLS)
    with Guest() as guest:
        yield guest


@pytest.fixture
def server(guest: Guest) -> Iterator[Server]:
    """One export called "disk", of 4 GiB. It ends when told to, and has had nothing to complain about."""
    server = guest.serve("--export", "disk=4GiB", "--memory", "1GiB")
    yield server
    assert server.is_running(), server.log()
    assert server.stop() == 0
    assert server.log() == ""


def boot(guest: Guest, script: str, on_line: Callable[[str], None] | None = None) -> Result:
    """Boot and run: the script succeeds, and the kernel reports nothing bad on the way."""
    result = guest.run(PRELUDE + script + "\ndmesg >$SHARE/dmesg\n", timeout_s=TIMEOUT_S, on_line=on_line)
    assert result.status == 0, f"{result.output}\n--- console:\n{result.console}"
    bad = re.compile(r"error|timed out|corrupt|warning|\bbug\b|hung|call trace", re.IGNORECASE)
    messages = (guest.share / "dmesg").read_text().splitlines()
    assert any("nbd0: detected capacity change" in line for line in messages)
    assert [line for line in messages if bad.search(line)] == []
    return result


def test_ext4_over_four_connections_holds_its_data_and_gives_memory_back(guest: Guest, server: Server) -> None:
    ram: dict[str, int] = {}

    def look(name: str) -> None:
        ram[name] = server.allocated_bytes("disk")

    boot(
        guest,
        r"""
        attach -C 4 -b 4096
        [ "$(blockdev --getsize64 /dev/nbd0)" = $((4 << 30)) ]
        [ "$(ss -Htn state established dport = ":$PORT" | wc -l)" = 4 ]
        make_ext4
        mount_ext4
        sync
        pause empty

        head -c 64M /dev/urandom >"$MNT/large"
        cp -a /etc "$MNT/small"
        sync
        pause full

        verify --directory="$MNT" --size=16M --bsrange=4k-128k --numjobs=4
        rm -r "$MNT"/large "$MNT"/small "$MNT"/verify.*
        sync
        fstrim "$MNT"
        pause trimmed

        umount "$MNT"
        check_ext4
        detach
        """,
        pauses(guest.share, look),
    )
    assert ram["empty"] < 16 * MIB
    assert 64 * MIB <= ram["full"] - ram["empty"] < 96 * MIB
    assert abs(ram["trimmed"] - ram["empty"]) < 4 * MIB


def test_files_outlive_the_kernel_that_wrote_them(guest: Guest, server: Server) -> None:
    boot(
        guest,
        r"""
        attach
        make_ext4
        mount_ext4
        head -c 16M /dev/urandom >"$MNT/random"
        cp -a /usr/lib/*/perl-base "$MNT"
        (cd "$MNT" && find . -type f -exec sha256sum {} + >"$SHARE/sums")
        umount "$MNT"
        detach

        attach
        mount_ext4
        (cd "$MNT" && sha256sum --quiet --check "$SHARE/sums")
        umount "$MNT"
        detach
        """,
    )
    assert len((guest.share / "sums").read_text().splitlines()) > 50
    boot(
        guest,
        r"""
        attach
        check_ext4
        mount_ext4
        (cd "$MNT" && sha256sum --quiet --check "$SHARE/sums")
        umount "$MNT"
        detach
        """,
    )


def test_requests_smaller_than_a_page_touch_nothing_else(guest: Guest, server: Server) -> None:
    boot(
        guest,
        r"""
        attach -b 512
        [ "$(blockdev --getss /dev/nbd0)" = 512 ]
        verify --filename=/dev/nbd0 --size=2M --bs=512
        verify --filename=/dev/nbd0 --size=4M --bs=1k
        verify --filename=/dev/nbd0 --size=8M --bsrange=512-9k --blockalign=512 --offset=512

        make_ext4 -F -b 1024
        mount_ext4
        verify --directory="$MNT" --size=4M --bs=1k

        # Trims that begin and end amid pages, with neighbours that stay.
        head -c 1M /dev/urandom | split -b 1500 -a 4 - "$MNT"/piece.
        sha256sum "$MNT"/piece.* >"$TMPDIR/sums"
        sync
        sed -n 's/^[0-9a-f]*  //p;n' "$TMPDIR/sums" | xargs rm
        sync
        fstrim "$MNT"
        umount "$MNT"
        check_ext4
        mount_ext4
        sed -n 'n;p' "$TMPDIR/sums" | sha256sum --quiet --check
        umount "$MNT"
        detach
        """,
    )
