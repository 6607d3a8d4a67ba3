"""Small real file systems, for what only a real one does: fill up, be read-only, or know no sparse files."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def mounted(directory: Path, kind: str, *options: str, size_bytes: int = 0) -> Iterator[Path]:
    """A fresh file system of `kind`; with a size it lives in an image file in `directory`.

    It is not mounted below `directory`: that may be pytest's, which could not remove it after a run that was killed.
    """
    directory.mkdir(exist_ok=True)
    source = Path(kind)
    if size_bytes:
        source = directory / "image"
        with source.open("wb") as image:
            image.truncate(size_bytes)
        _run(f"mkfs.{kind}", "-q", source)
        options = ("loop", *options)
    with TemporaryDirectory(prefix="nbdram-test-") as name:
        point = Path(name)
        _run("mount", "-t", kind, *(("-o", ",".join(options)) if options else ()), source, point)
        try:
            yield point
        finally:
            _run("umount", point)


def remount(point: Path, *options: str) -> None:
    _run("mount", "-o", ",".join(("remount", *options)), point)


def _run(name: str, *arguments: str | Path) -> None:
    done = subprocess.run([name, *map(str, arguments)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{name}: {done.stderr} (it takes root, and Debian's e2fsprogs and mount)"
