"""RAM that a file system takes: an empty one, many small files, a tree of source; `nbdram mount` against tmpfs.

All of it in guest kernels, so that server, file system and tmpfs share one MemFree. The source is Linux's, of
Debian's package; the small files are pieces of it. Each file system that `nbdram mount` makes has its row, and so have
other ways to make an ext4, which docs/mount.md weighs. Targets are the default's.
"""

import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from bench import checks, report
from bench.checks import Check
from bench.errors import BenchError, NoMatch
from bench.options import Found, Options
from nbdram.client.filesystems import FILE_SYSTEMS
from tests.kernel.guest import CHECKOUT, PAUSE, Guest, GuestError, pauses

SMALL_FILES: Final = 100_000
SMALL_BYTES: Final = 300
_PACKAGE: Final = "linux-source-6.1"
_LARGE_FILES: Final = 8
_LARGE_BYTES: Final = 16 << 20
_TREES: Final = ("fs", "kernel", "mm", "net", "include")
_GUEST_MEMORY: Final = "3G"
_TIMEOUT_S: Final = 600.0
_LIMITS: Final = {"64G": 4, "1T": 24}  # MiB of an empty one
_COLD_SHARE: Final = 0.5
_GIVEN_BACK: Final = 0.99
_MIB: Final = 1 << 20
_Profile = tuple[list[str], str]  # arguments of `nbdram mount`; and an mke2fs.conf, or "" for the one that is there
_TMPFS: Final = "tmpfs"
_DEFAULT: Final = "ext4"
_MKE2FS_CONF: Final = """\
[defaults]
base_features = sparse_super,large_file,filetype,dir_index,ext_attr,extent,huge_file,flex_bg,metadata_csum,64bit,\
dir_nlink,extra_isize{features}
blocksize = 4096
inode_size = {inode_size}
inode_ratio = 16384
"""


def _ext4(inode_size: int, *features: str) -> _Profile:
    more = "".join(f",{feature}" for feature in features)
    return [], _MKE2FS_CONF.format(inode_size=inode_size, features=more)


_PROFILES: Final[dict[str, _Profile]] = {
    _DEFAULT: ([], ""),
    "xfs": (["--fs", "xfs"], ""),
    "btrfs": (["--fs", "btrfs"], ""),
    "ext4, inodes of 128": _ext4(128),
    "ext4, inline data in 512": _ext4(512, "inline_data"),
    "ext4, inline data in 1024": _ext4(1024, "inline_data"),
}

_EMPTY: Final = """
$NBDRAM mount nbd://$SERVER/{export} $MNT --fs {kind}
sync
pause {export}
$NBDRAM umount $MNT
"""
_FILES: Final = '{python} -m bench.filesystems_guest "$SHARE/contents/{content}" $SHARE/profile $SHARE/figures\n'


def run(options: Options) -> Found:
    """All of it, in the file systems whose name matches."""
    profiles = {name: how for name, how in _PROFILES.items() if re.search(options.only, name, re.IGNORECASE)}
    if not profiles:
        raise NoMatch(f"no file system matches {options.only!r}: {', '.join(_PROFILES)}")
    found = _measure(profiles)
    print(_empty_table(found["empty"]), end="\n\n")
    for content, taken in found["files"].items():
        print(_files_table(content, taken), end="\n\n")
    if _DEFAULT in profiles:
        print(checks.table(f"Targets, for {_DEFAULT}", list(_checks(found))))
    return found


def _measure(profiles: dict[str, _Profile]) -> dict[str, Any]:
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
            empty = _measure_empty(guest, [kind for kind in FILE_SYSTEMS if kind in profiles])
            files = {tar.stem: _measure_files(guest, tar, profiles) for tar in sorted(contents.iterdir())}
            return {"empty": empty, "files": files}
    except GuestError as error:
        raise BenchError(str(error)) from error


def _measure_empty(guest: Guest, kinds: list[str]) -> dict[str, int]:
    """Bytes, by export. One server outside for all of them: address space of a guest ends at half a TiB."""
    exports = {f"{size}-{kind}": kind for kind in kinds for size in _LIMITS}
    if not exports:
        return {}
    server = guest.serve(*(word for name in exports for word in ("--export", f"{name}={name.partition('-')[0]}")))
    empty: dict[str, int] = {}

    def look(export: str) -> None:
        empty[export] = server.allocated_bytes(export)

    script = "".join(_EMPTY.format(export=export, kind=kind) for export, kind in exports.items())
    _run_in(guest, PAUSE + script, pauses(guest.share, look))
    return empty


def _measure_files(guest: Guest, content: Path, profiles: dict[str, _Profile]) -> dict[str, Any]:
    """Each in a kernel of its own, whose memory is in one piece: of scattered pages, a process of it can't map many."""
    found = {}
    for name, profile in {_TMPFS: None, **profiles}.items():
        print(f"measuring {content.stem}, {name}", file=sys.stderr)
        (guest.share / "profile").write_text(json.dumps(profile))
        _run_in(guest, _FILES.format(python=sys.executable, content=content.name))
        found[name] = json.loads((guest.share / "figures").read_text())
    return found


def _run_in(guest: Guest, script: str, on_line: Callable[[str], None] | None = None) -> None:
    head = f"set -e\nexport NBDRAM={Path(sys.executable).parent}/nbdram PYTHONPATH={CHECKOUT}\n"
    result = guest.run(head + script, timeout_s=_TIMEOUT_S, on_line=on_line)
    if result.status:
        raise BenchError(f"the guest failed: {result.output[-2000:]}\n{result.console[-2000:]}")


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


def _empty_table(empty: dict[str, int]) -> str:
    rows = [[export, report.size(taken)] for export, taken in empty.items()]
    return report.table("RAM of an empty file system", ["size and kind", "RAM"], rows)


def _files_table(content: str, taken: dict[str, Any]) -> str:
    tmpfs = taken[_TMPFS]["hot"]
    rows = []
    for name, of in taken.items():
        row = [name]
        for state in ("hot", "cold"):
            row += [f"{of[state] / _MIB:.0f} MiB", f"{of[state] / tmpfs:.2f}"] if state in of else ["-", "-"]
        row += [f"{100 * _given_back(of):.1f} %"] if "deleted" in of else ["-"]
        row += [f"{of['seconds'][what]:.1f}" for what in ("write", "read", "delete")]
        rows.append(row)
    head = ["in", "hot", "to tmpfs", "cold", "to tmpfs", "given back", "write s", "read s", "delete s"]
    return report.table(f"RAM that {content} take", head, rows)


def _given_back(of: dict[str, Any]) -> float:
    """The share of the memory that is there again some seconds after all was deleted."""
    shares: list[float] = [share for _, share in of["deleted"]]
    return max(shares)


def _checks(found: dict[str, Any]) -> Iterator[Check]:
    for size, limit in _LIMITS.items():
        yield Check(f"empty, {size}", found["empty"][f"{size}-{_DEFAULT}"] / _MIB, limit, "MiB", strictly=True)
    for content, taken in found["files"].items():
        of = taken[_DEFAULT]
        yield Check(f"cold, {content}", of["cold"] / taken[_TMPFS]["hot"], _COLD_SHARE, "of tmpfs")
        left = 1 - _given_back(of)
        yield Check(f"left after deleting, {content}", 100 * left, 100 * (1 - _GIVEN_BACK), "%")
