"""Content as compressible as what people store: files of this machine, as a tar and as an ext4 image."""

import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from bench.errors import BenchError

# Text, source, binaries, and much that is compressed already (manuals, pictures), in about equal shares.
TREES: Final = ("/usr/lib/python3", "/usr/lib/python3.*", "/usr/share", "/usr/bin", "/usr/include")
_PAGE: Final = 4096
_STEP: Final = 1 << 20
_ZERO_PAGE: Final = bytes(_PAGE)
_FS_SHARE: Final = 0.2  # of an image, for what a file system keeps besides the files


def tar(path: Path, size: int) -> Path:
    """Make a file of exactly `size` bytes: a tar of real files, begun anew where there are not enough of them."""
    files = list(_files(size))
    if not files:
        raise BenchError(f"there are no files to read in {', '.join(TREES)}")
    with path.open("wb") as out:
        while out.tell() < size:
            begun = out.tell()
            archive = tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT)  # noqa: SIM115 (never ended)
            for name in files:
                with suppress(OSError):
                    archive.add(name, recursive=False)
                if out.tell() >= size:
                    break
            if out.tell() == begun:
                raise BenchError("none of the files of this machine can be read")
        out.truncate(size)
    return path


def ext4_image(path: Path, size: int, staging: Path) -> Path:
    """Make a sparse file of `size` bytes: an ext4 file system with the same files; `staging` must not exist yet."""
    content = int(size * (1 - _FS_SHARE))
    for name in _files(content):
        target = staging / name.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            shutil.copyfile(name, target)
    command = ["mkfs.ext4", "-q", "-F", "-d", str(staging), str(path), f"{size >> 10}k"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BenchError(f"mkfs.ext4 can't be run: {error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if done.returncode:
        raise BenchError(f"mkfs.ext4 failed: {done.stderr.strip()[-1000:]}")
    return path


def data_bytes(path: Path) -> int:
    """The bytes of a file in pages that are not all zeros."""
    pages = 0
    with path.open("rb") as file:
        while step := file.read(_STEP):
            pages += sum(step[at : at + _PAGE] != _ZERO_PAGE for at in range(0, len(step), _PAGE))
    return pages * _PAGE


def _files(size: int) -> Iterator[Path]:
    """Regular files of about `size` bytes in all; the next comes from the tree that has given the least so far."""
    trees = [_walk(path) for pattern in TREES for path in sorted(Path("/").glob(pattern[1:])) if path.is_dir()]
    given = [0] * len(trees)
    total = 0
    while trees and total < size:
        least = given.index(min(given))
        try:
            path, length = next(trees[least])
        except StopIteration:
            del trees[least], given[least]
            continue
        given[least] += length
        total += length
        yield path


def _walk(tree: Path) -> Iterator[tuple[Path, int]]:
    for path in sorted(tree.rglob("*")):
        with suppress(OSError):
            if path.is_file() and not path.is_symlink():
                yield path, path.stat().st_size
