"""RAM that a file system takes: an empty one, many small files, a tree of source; `nbdram mount` against tmpfs.

All of it in one guest kernel, so that server, file system and tmpfs share one MemFree. The source is Linux's, of
Debian's package; the small files are pieces of it.
"""

import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from bench import checks, report
from bench.checks import Check
from bench.errors import BenchError
from bench.options import Found, Options
from tests.kernel.guest import CHECKOUT, PAUSE, Guest, GuestError, pauses

SMALL_FILES: Final = 100_000
SMALL_BYTES: Final = 300
_PACKAGE: Final = "linux-source-6.1"
_LARGE_FILES: Final = 8
_LARGE_BYTES: Final = 16 << 20
_TREES: Final = ("fs", "kernel", "mm", "net", "include")
_GUEST_MEMORY: Final = "3G"
_TIMEOUT_S: Final = 1800.0
_LIMITS: Final = {"64G": 4, "1T": 24}  # MiB of an empty one
_COLD_SHARE: Final = 0.5
_GIVEN_BACK: Final = 0.99
_MIB: Final = 1 << 20

_SCRIPT: Final = f"""{PAUSE}
set -e
export NBDRAM={Path(sys.executable).parent}/nbdram PYTHONPATH={CHECKOUT}
for size in {" ".join(_LIMITS)}; do # one server for all: address space of a guest ends at half a TiB
    $NBDRAM mount nbd://$SERVER/$size $MNT
    sync
    pause $size
    $NBDRAM umount $MNT
done
mkdir $SHARE/found
{sys.executable} -m bench.filesystems_guest $SHARE/contents $SHARE/found/figures
"""


def run(_: Options) -> Found:
    found = _measure()
    print(_files_table(found["files"]), end="\n\n")
    print(checks.table("Targets", list(_checks(found))))
    return found


def _measure() -> dict[str, Any]:
    try:
        with Guest(memory=_GUEST_MEMORY) as guest:
            contents = guest.share / "contents"
            contents.mkdir()
            print("making the contents", file=sys.stderr)
            source = _source(contents / f"Linux {', '.join(_TREES)}.tar")
            _pieces(source, contents / f"{SMALL_FILES} files of {SMALL_BYTES} bytes.tar", SMALL_FILES, SMALL_BYTES)
            _pieces(
                source, contents / f"{_LARGE_FILES} files of {_LARGE_BYTES >> 20} MiB.tar", _LARGE_FILES, _LARGE_BYTES
            )
            print("measuring in the guest", file=sys.stderr)
            server = guest.serve(*(word for size in _LIMITS for word in ("--export", f"{size}={size}")))
            empty: dict[str, int] = {}

            def look(size: str) -> None:
                empty[size] = server.allocated_bytes(size)

            waits = pauses(guest.share, look)

            def on_line(line: str) -> None:
                print(f"guest: {line}", file=sys.stderr)
                waits(line)

            result = guest.run(_SCRIPT, timeout_s=_TIMEOUT_S, on_line=on_line)
            if result.status:
                raise BenchError(f"the guest failed: {result.output[-2000:]}")
            return {"empty": empty, "files": json.loads((guest.share / "found/figures").read_text())}
    except GuestError as error:
        raise BenchError(str(error)) from error


def _source(tar: Path) -> Path:
    """A tar of the trees."""
    with tempfile.TemporaryDirectory(prefix="nbdram-bench-") as directory:
        _run(["apt-get", "download", "-q", _PACKAGE], directory)
        (package,) = Path(directory).glob("*.deb")
        _run(["dpkg-deb", "--extract", str(package), "package"], directory)
        packed = f"package/usr/src/{_PACKAGE}.tar.xz"
        _run(["tar", "-xf", packed, *(f"{_PACKAGE}/{tree}" for tree in _TREES)], directory)
        _run(["tar", "-cf", str(tar), "-C", _PACKAGE, *_TREES], directory)
    return tar


def _pieces(source: Path, tar: Path, count: int, size: int) -> None:
    """A tar of pieces of the other's text, a thousand to a directory."""
    with source.open("rb") as text, tarfile.open(tar, "w", format=tarfile.GNU_FORMAT) as archive:
        for number in range(count):
            entry = tarfile.TarInfo(f"{number // 1000}/{number}")
            entry.size = size
            archive.addfile(entry, io.BytesIO(text.read(size)))


def _run(argv: list[str], directory: str) -> None:
    done = subprocess.run(argv, cwd=directory, capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"{argv[0]} failed: {done.stderr.strip()[-1000:]}")


def _files_table(files: dict[str, Any]) -> str:
    rows = []
    for content, taken in files.items():
        cells = [f"{taken['tmpfs'] / _MIB:.0f} MiB"]
        for state in ("hot", "cold"):
            cells += [f"{taken[state] / _MIB:.0f} MiB", f"{taken[state] / taken['tmpfs']:.2f}"]
        rows.append([content, *cells])
    head = ["content", "tmpfs", "hot", "to tmpfs", "cold", "to tmpfs"]
    return report.table("RAM that files take in ext4 on nbdram, and in tmpfs", head, rows)


def _checks(found: dict[str, Any]) -> Iterator[Check]:
    for size, limit in _LIMITS.items():
        yield Check(f"empty, {size}", found["empty"][size] / _MIB, limit, "MiB", strictly=True)
    for content, taken in found["files"].items():
        yield Check(f"cold, {content}", taken["cold"] / taken["tmpfs"], _COLD_SHARE, "of tmpfs")
        left = 1 - max(share for _, share in taken["deleted"])
        yield Check(f"left after deleting, {content}", 100 * left, 100 * (1 - _GIVEN_BACK), "%")
