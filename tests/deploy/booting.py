"""A guest kernel with systemd as process 1, the units of deploy/ installed as docs/operating.md says, and enabled.

The root is the host's, read-only. What an installation writes to is the guest's: /etc, /var, /tmp, and the directories
of programs, which are filled with links. Python and the checkout are mounted below /srv: where they are on the host,
the units' hardening hides them (/root, /home, /tmp).
"""

import sys
from pathlib import Path
from typing import Final

import uvloop

from tests.kernel.guest import CHECKOUT

# As docs/mount.md has it, and docs/operating.md for a keeper that is a service.
FSTAB: Final = (
    "scratch /var/scratch nbdram size=1g,memory=64m,mode=1777,_netdev,x-systemd.requires=nbdram-keeper.service 0 0"
)

_PREPARE: Final = r"""
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
exec </dev/null >/dev/tty1 2>&1
stty -opost </dev/tty1
set -e
finish() { printf '\n%s %s\n' "$token" "$1"; mount -t proc none /proc || true; echo o >/proc/sysrq-trigger; sleep 60; }
token=$1
trap 'finish 1' EXIT
mount -t proc none /proc
mount -t sysfs none /sys
ip link set lo up

mount -t tmpfs none /srv
mkdir /srv/python /srv/nbdram /srv/packages /srv/sbin /srv/etc
mount --bind @BASE@ /srv/python
mount --bind @CHECKOUT@ /srv/nbdram
mount --bind @PACKAGES@ /srv/packages
mount --bind /usr/sbin /srv/sbin
mount --bind /etc /srv/etc
mount -t tmpfs none /usr/sbin && ln -s /srv/sbin/* /usr/sbin/
mount -t tmpfs none /usr/local/bin
insmod /usr/lib/uml/modules/"$(uname -r)"/kernel/drivers/block/nbd.ko
for directory in /etc /var /tmp; do mount -t tmpfs -o mode=755 none $directory; done
chmod 1777 /tmp
mkdir -m 1777 /var/tmp
ln -s /run /var/run
cp -a /srv/etc/passwd /srv/etc/group /srv/etc/nsswitch.conf /srv/etc/ld.so.cache /srv/etc/mke2fs.conf /etc/
touch /etc/machine-id /etc/shadow /etc/gshadow

for program in nbdram mount.nbdram; do
    called='nbdram.cli:main'; [ $program = nbdram ] || called='nbdram.cli.mount_helper:mount'
    cat >/usr/local/bin/$program <<END
#!/bin/sh
export PYTHONPATH=/srv/nbdram:/srv/packages PYTHONDONTWRITEBYTECODE=1 LD_LIBRARY_PATH=/srv/python/lib
exec /srv/python/bin/@PYTHON@ -c 'import sys; from ${called%:*} import ${called#*:}; sys.exit(${called#*:}())' "\$@"
END
    chmod 755 /usr/local/bin/$program
done
ln -s /usr/local/bin/mount.nbdram /sbin/
cd /srv/nbdram/deploy
mkdir -p /etc/systemd/system /etc/sysusers.d
install -m 644 systemd/*.service systemd/*.socket systemd/*.slice systemd/*.mount /etc/systemd/system/
install -m 644 systemd/sysusers.conf /etc/sysusers.d/nbdram.conf && systemd-sysusers /etc/sysusers.d/nbdram.conf
install -D -m 640 -g nbdram nbdram.toml /etc/nbdram/nbdram.toml
systemctl --quiet enable nbdram.socket nbdram.service nbdram-keeper.service remote-fs.target
mkdir /var/scratch
echo '@FSTAB@' >/etc/fstab

# Of a whole system only what the units ask for, and the check, which is last.
cat >/etc/systemd/system/check.service <<END
[Unit]
After=multi-user.target remote-fs.target
[Service]
Type=oneshot
StandardOutput=tty
StandardError=tty
TTYPath=/dev/tty1
ExecStart=/bin/sh /run/check $token
END
cat >/run/check <<'END'
sh -eu /run/share/script
printf '\n%s %s\n' "$1" "$?"
echo o >/proc/sysrq-trigger
sleep 60
END
cat >/etc/systemd/system/check.target <<END
[Unit]
Wants=multi-user.target check.service
AllowIsolate=yes
END
for unit in getty.target dbus.service dbus.socket e2scrub_reap.service systemd-binfmt.service systemd-logind.service \
    systemd-udevd.service systemd-udev-trigger.service systemd-update-utmp.service systemd-user-sessions.service; do
    ln -s /dev/null /etc/systemd/system/$unit
done
exec /lib/systemd/systemd --system --unit=check.target --show-status=no
"""


def init() -> str:
    """What process 1 does before it becomes systemd."""
    words = {
        "@BASE@": sys.base_prefix,
        "@CHECKOUT@": str(CHECKOUT),
        "@PACKAGES@": str(Path(uvloop.__file__).parents[1]),
        "@PYTHON@": f"python{sys.version_info.major}.{sys.version_info.minor}",
        "@FSTAB@": FSTAB,
    }
    text = _PREPARE
    for word, value in words.items():
        text = text.replace(word, value)
    return text
