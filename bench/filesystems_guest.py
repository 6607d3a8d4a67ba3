"""What `bench.filesystems` runs in the guest: how much RAM files take in a tmpfs, or in what `nbdram mount` makes.

python -m bench.filesystems_guest CONTENT PROFILE FOUND: a tar file; arguments of `nbdram mount` and an mke2fs.conf, as
JSON, or null for a tmpfs; and where to write the figures, as JSON.

RAM is what there is more of shared memory (tmpfs, also below a server), slabs, memory of processes and page tables
when everything is written and all that the kernel can drop is dropped: so it has the inodes and directory entries
that a tmpfs can't drop, and what the server needs besides. Both start from an empty file system that is mounted.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from nbdram.client.mount_notes import Place
from nbdram.observe.control import ask

NBDRAM: Final = os.environ.get("NBDRAM", "nbdram")
POINT: Final = Path("/run/scratch")
PLACE: Final = Place("bench")
SIZE: Final = "64G"
MEMORY: Final = "768M"
GIVEN_BACK_S: Final = 5.0
COUNTED: Final = ("Shmem", "Slab", "AnonPages", "PageTables")
MKE2FS_CONF: Final = Path("/run/mke2fs.conf")
PUSHER: Final = "pusher"
PUSHES: Final = 20  # at most
SETTLED: Final = 0.01  # what a push still makes cold, of what is resident, when all is cold that ever will be


Profile = tuple[list[str], str]


def main(content: str, profile: str, found: str) -> None:
    POINT.mkdir()
    how = json.loads(Path(profile).read_text())
    figures = in_ours(Path(content), how) if how else in_tmpfs(Path(content))
    Path(found).write_text(json.dumps(figures))


def in_tmpfs(content: Path) -> dict[str, Any]:
    """Bytes, and seconds for unpacking, reading and deleting it."""
    run("mount", "-t", "tmpfs", "-o", "size=2g,nr_inodes=0", "none", str(POINT))
    settle()
    before = used_bytes()
    seconds = {"write": unpack(content), "read": read()}
    taken = used_bytes() - before
    seconds["delete"] = remove()
    run("umount", str(POINT))
    return {"hot": taken, "seconds": seconds}


def in_ours(content: Path, profile: Profile) -> dict[str, Any]:
    """Bytes when all is resident; what is given back when all is deleted; bytes when all that can be is cold."""
    with mounted(profile):
        settle()
        before, base = used_bytes(), device_bytes()
        seconds = {"write": unpack(content), "read": read()}
        settle()
        hot, hot_device = used_bytes() - before, device_bytes()
        deleted = delete(base, seconds)
    with mounted(profile):
        settle()
        before = used_bytes()
        unpack(content)
        push()
        settle()
        export = export_of(PLACE.name)
        left = {name: export[name] for name in ("resident", "compressed")}
        cold = used_bytes() - before
    return {
        "hot": hot,
        "hot_device": hot_device - base,
        "cold": cold,
        "cold_device": left,
        "deleted": deleted,
        "seconds": seconds,
    }


@contextmanager
def mounted(profile: Profile) -> Iterator[None]:
    arguments, mke2fs_conf = profile
    environment = dict(os.environ)
    if mke2fs_conf:
        MKE2FS_CONF.write_text(mke2fs_conf)
        environment["MKE2FS_CONFIG"] = str(MKE2FS_CONF)
    command = [NBDRAM, "mount", SIZE, str(POINT), "--name", PLACE.name, "--memory", MEMORY, *arguments]
    run(*command, environment=environment)
    try:
        yield
    except BaseException:
        print(PLACE.log.read_text(errors="replace")[-3000:], flush=True)
        raise
    finally:
        run(NBDRAM, "umount", str(POINT))


def unpack(content: Path) -> float:
    """Seconds until all is written."""
    begun = time.monotonic()
    run("tar", "-xf", str(content), "-C", str(POINT))
    run("sync")
    taken = time.monotonic() - begun
    settle()
    return taken


def read() -> float:
    """Seconds for all of it, with nothing in the kernel's page cache."""
    begun = time.monotonic()
    run("grep", "-rqF", "no file has this line in it", str(POINT), ok=(0, 1))
    return time.monotonic() - begun


def remove() -> float:
    begun = time.monotonic()
    run("find", str(POINT), "-mindepth", "1", "-delete")
    return time.monotonic() - begun


def delete(base: int, seconds: dict[str, float]) -> list[tuple[float, float]]:
    """(seconds, share of the memory given back) since the last file was deleted."""
    before = device_bytes() - base
    seconds["delete"] = remove()
    begun = time.monotonic()
    told = []
    while (passed := time.monotonic() - begun) < GIVEN_BACK_S:
        told.append((passed, 1 - (device_bytes() - base) / before))
        time.sleep(0.1)
    return told


def push() -> None:
    """Write beside the files until nothing more of them goes cold."""
    run(NBDRAM, "create", f"{PUSHER}={MEMORY}", "--control", str(PLACE.control))
    uri = f"nbd+unix:///{PUSHER}?socket={PLACE.socket}"
    fio = ["fio", "--name=push", "--ioengine=nbd", f"--uri={uri}", "--rw=write", "--bs=256k", "--iodepth=16"]
    fio += [f"--size={MEMORY}", "--buffer_compress_percentage=90", "--refill_buffers=1"]
    before = sys.maxsize
    for _ in range(PUSHES):
        run(*fio)
        left = export_of(PLACE.name)["resident"]
        if before - left <= SETTLED * before:
            break
        before = left
    else:
        raise SystemExit("data still go cold: no figure")
    run(NBDRAM, "rm", PUSHER, "--control", str(PLACE.control))


def export_of(name: str) -> dict[str, Any]:
    return next(export for export in ask(PLACE.control, "exports")["exports"] if export["name"] == name)


def settle() -> None:
    """All is written, and what can be read again is dropped."""
    run("sync")
    for _ in range(3):
        Path("/proc/sys/vm/drop_caches").write_text("3")


def used_bytes() -> int:
    found = dict(re.findall(r"^(\w+):\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE))
    return sum(int(found[name]) for name in COUNTED) << 10


def device_bytes() -> int:
    """What the server's state takes: the device's pages, images and index."""
    status = os.statvfs(PLACE.state)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def run(*argv: str, environment: Mapping[str, str] | None = None, ok: Collection[int] = (0,)) -> None:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
    if done.returncode not in ok:
        raise SystemExit(f"{' '.join(argv)}: {done.stdout[-500:]}{done.stderr[-1000:]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
