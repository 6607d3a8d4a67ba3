"""The units of deploy/ under a real systemd, in a kernel of their own: installed and enabled as the docs say."""

import pytest

from tests.deploy.booting import FSTAB, init
from tests.kernel.guest import CHECKOUT, Guest, require_tools

TOOLS = {"systemctl": "systemd", "systemd-sysusers": "systemd", "nbdcopy": "libnbd-bin", "mkfs.ext4": "e2fsprogs"}

LOOK = r"""
set -x
export URI='nbd+unix:///scratch?socket=/run/nbdram.sock'
export SIZE=68719476736
main() { systemctl show --property=MainPID --value nbdram; }
size_of() { nbdinfo --size "nbd+unix:///$1?socket=/run/nbdram.sock"; }

# Booted: nothing has failed, and no job had to be dropped; whoever is in the group may connect.
[ -z "$(systemctl --failed --no-legend)" ]
if journalctl | grep -i 'ordering cycle'; then exit 1; fi
[ "$(stat -c '%U %G %a' /run/nbdram.sock)" = 'nbdram nbdram 660' ]
[ "$(stat -c '%U %a' /var/lib/nbdram/state /var/lib/nbdram/swap | xargs)" = 'nbdram 700 nbdram 700' ]
[ "$(size_of scratch)" = "$SIZE" ]
[ "$(nbdinfo --size nbd://127.0.0.1/scratch)" = "$SIZE" ]

# The mount of /etc/fstab is there, kept by the keeper.
grep -q '^/dev/nbd0 /var/scratch ext4 ' /proc/mounts
echo kept >/var/scratch/file

# A restart keeps the data, and so does the end by a signal that cannot be caught; the socket stays meanwhile.
head -c 1000000 /dev/urandom >/tmp/data
truncate -s 1M /tmp/data
socket=$(stat -c %i /run/nbdram.sock)
nbdcopy /tmp/data "$URI"
before=$(main)
systemctl restart nbdram
[ "$(main)" != "$before" ]
unchanged() { qemu-img dd -f raw -O raw bs=1M count=1 if="$URI" of=/tmp/found; cmp /tmp/data /tmp/found; }
unchanged
before=$(main)
kill -KILL "$before"
until [ "$(main)" != "$before" ] && [ "$(main)" != 0 ]; do sleep 0.1; done
unchanged
[ "$(stat -c %i /run/nbdram.sock)" = "$socket" ]

# A reload applies the file, and fails when there is a mistake in it: then the server goes on as it was.
printf '[exports.scratch]\nsize = "64G"\n[exports.more]\nsize = "2G"\n' >/etc/nbdram/nbdram.toml
systemctl reload nbdram
[ "$(size_of more)" = 2147483648 ]
sed -i 's/2G/much/' /etc/nbdram/nbdram.toml
if systemctl reload nbdram; then exit 1; fi
until journalctl -u nbdram | grep -q "exports.more.size: 'much' is not a size"; do sleep 0.1; done
[ "$(size_of more)" = 2147483648 ]
sed -i 's/much/2G/' /etc/nbdram/nbdram.toml

# Stopped, it is started again by whoever connects.
systemctl stop nbdram
[ "$(systemctl is-active nbdram nbdram.socket | xargs)" = 'inactive active' ]
unchanged
[ "$(systemctl is-active nbdram)" = active ]
[ "$(cat /var/scratch/file)" = kept ]
umount /var/scratch
"""


@pytest.mark.timeout(400)
def test_a_booted_system_serves_keeps_and_mounts_as_the_docs_say() -> None:
    require_tools(TOOLS)
    with Guest(memory="512M") as guest:
        result = guest.run(LOOK, timeout_s=300, init=init())
    assert result.status == 0, f"{result.output[-6000:]}\n{result.console[-6000:]}"


def test_the_line_of_fstab_that_was_booted_is_the_one_of_the_docs() -> None:
    options = FSTAB.split()[3].split(",")
    told = (CHECKOUT / "docs" / "operating.md").read_text()
    assert ",".join(options[-2:]) in told
