"""A limit on the memory of a process, page cache included, by a control group of its own (v1 or v2)."""

import itertools
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

from bench.errors import BenchError

_ROOT: Final = Path("/sys/fs/cgroup")
_REMOVE_S: Final = 5.0
_numbers = itertools.count()


class MemoryLimit:
    """At most `limit` bytes for the processes that are added; they must have ended when the block does."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._directory = Path()
        self._limit_file = self._usage_file = Path()

    @staticmethod
    def available() -> bool:
        """Whether we may set one."""
        try:
            with MemoryLimit(1 << 30):
                return True
        except BenchError:
            return False

    def __enter__(self) -> Self:
        try:
            parent, limit, usage = _place()
            self._directory = parent / f"nbdram-bench-{os.getpid()}-{next(_numbers)}"
            self._limit_file, self._usage_file = self._directory / limit, self._directory / usage
            self._directory.mkdir()
            try:
                self.set_limit(self._limit)
            except OSError:
                self._directory.rmdir()
                raise
        except OSError as error:
            raise BenchError(f"memory can't be limited by a control group: {error.strerror}") from None
        return self

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + _REMOVE_S  # the kernel needs a moment after the last process has ended
        while time.monotonic() < deadline:
            with suppress(OSError):
                self._directory.rmdir()
                return
            time.sleep(0.02)

    @property
    def directory(self) -> Path:
        """The group itself."""
        return self._directory

    def add(self, pid: int) -> None:
        (self._directory / "cgroup.procs").write_text(str(pid))

    def set_limit(self, limit: int) -> None:
        """OSError if it is lower than what is used, and that can't be given back."""
        self._limit_file.write_text(str(limit))

    def used_bytes(self) -> int:
        return int(self._usage_file.read_text())


def _place() -> tuple[Path, str, str]:
    """Where a group can be made, within what limits us already, and its files for the limit and the usage."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _ROOT / "memory" / group.lstrip("/"), "memory.limit_in_bytes", "memory.usage_in_bytes"
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            # Not below ours: in v2 a group with processes has no limits to give to groups below it.
            return _ROOT / line[4:].strip().rpartition("/")[0], "memory.max", "memory.current"
    raise FileNotFoundError(2, "there are no control groups")
