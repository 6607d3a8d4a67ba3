"""Servers with more data than they have RAM for: ours, and nbdkit on zram, each within the same budget."""

import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final, Self

from bench import proc
from bench.cgroup import MemoryLimit
from bench.errors import BenchError
from bench.servers import DEFAULT_EXPORT, Server, socket_in
from bench.watched import Longest, Stall
from bench.zram import Zram
from nbdram.observe.control import ask

_SAMPLE_S: Final = 0.02
_SETTLE_LOOK_S: Final = 2.0  # it makes images smaller after a second of quiet
_SETTLE_LOOKS: Final = 60
_IDLE_CORES: Final = 0.1
LEAST_PAGE_CACHE: Final = 24 << 20  # less, and nbdkit's sixteen threads hardly get anywhere
_COPY_TIMEOUT_S: Final = 300.0


class Paged(Server):
    """A server of which one can ask how much RAM it holds for its data, in bytes."""

    def held_bytes(self) -> int:
        raise NotImplementedError

    def rebalance(self) -> None:
        """Divide its budget anew, going by what its data take now."""


class Nbdram(Paged):
    """Ours, without a disk unless `more` says so; `exports` are names and sizes, as in {"ram": "768M"}."""

    def __init__(
        self,
        exports: Mapping[str, str],
        budget: int,
        name: str = "nbdram",
        more: Sequence[str] = (),
        *,
        is_watched: bool = False,
    ) -> None:
        """`is_watched`: it tells how long its event loop did not come round."""

        def argv(directory: Path) -> list[str]:
            program = ["bench.watched", str(directory / "longest")] if is_watched else ["nbdram"]
            command = [sys.executable, "-m", *program, "serve", "--memory", str(budget)]
            command += ["--listen", f"unix:{socket_in(directory)}", "--control", str(directory / "control")]
            for export, size in exports.items():
                command += ["--export", f"{export}={size}"]
            return [*command, *more]

        super().__init__(name, argv, announces="nbd+unix://")

    def held_bytes(self) -> int:
        """All of it: anonymous memory, resident pages, images, index."""
        return proc.held_bytes(self.pid, memfd_prefix="nbdram")

    def settle(self) -> None:
        for _ in range(_SETTLE_LOOKS):
            before = self.cpu_s()
            time.sleep(_SETTLE_LOOK_S)
            if self.cpu_s() - before < _IDLE_CORES * _SETTLE_LOOK_S:
                return
        print(f"{self.name}: still at work after {_SETTLE_LOOKS * _SETTLE_LOOK_S:.0f} s", file=sys.stderr)

    def longest_stall(self) -> Stall:
        """The longest that its event loop did not come round since this was last asked."""
        return Longest(self.directory / "longest").take()

    def stats(self) -> dict[str, Any]:
        return ask(self.directory / "control", "stats")

    def export_stats(self, name: str = DEFAULT_EXPORT) -> dict[str, Any]:
        found: dict[str, Any] = next(export for export in self.stats()["exports"] if export["name"] == name)
        return found


class NbdkitOnZram(Paged):
    """nbdkit's file plugin on a zram device of `size` bytes.

    nbdkit reads and writes through the page cache. What zram leaves of the budget is for that, and for nbdkit itself:
    at first what is left when zram's cost is `expected_cost`, and see `rebalance`. If `uses_page_cache` is false, it
    is told to keep nothing there.
    """

    def __init__(self, name: str, size: int, budget: int, expected_cost: int, *, uses_page_cache: bool) -> None:
        super().__init__(name, self._command)
        self._size, self._budget, self._expected_cost = size, budget, expected_cost
        self._group: MemoryLimit | None = None
        self._uses_page_cache = uses_page_cache
        self._resources = ExitStack()

    def _command(self, directory: Path) -> list[str]:
        cache = "default" if self._uses_page_cache else "none"
        return ["nbdkit", "-f", "-U", str(socket_in(directory)), "file", str(self.disk.path), f"cache={cache}"]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.disk = stack.enter_context(Zram(self._size, self._budget))
            if self._uses_page_cache:
                self._group = stack.enter_context(MemoryLimit(self._budget - self._expected_cost))
            super().__enter__()
            stack.push(super().__exit__)
            if self._group:
                self._group.add(self.pid)
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *details: object) -> None:
        self._resources.close()

    def rebalance(self) -> None:
        if self._group:
            self._group.set_limit(max(LEAST_PAGE_CACHE, self._budget - self.disk.usage().cost))

    def held_bytes(self) -> int:
        own = self._group.used_bytes() if self._group else proc.held_bytes(self.pid, memfd_prefix="nbdkit")
        return self.disk.usage().cost + own


class NbdkitZstd(Paged):
    """nbdkit's memory plugin with its compressing allocator, for machines without zram. It knows no limit."""

    def __init__(self, name: str, size: int) -> None:
        def argv(directory: Path) -> list[str]:
            return ["nbdkit", "-f", "-U", str(socket_in(directory)), "memory", str(size), "allocator=zstd"]

        super().__init__(name, argv)

    def held_bytes(self) -> int:
        return proc.held_bytes(self.pid, memfd_prefix="nbdkit")


class Watch:
    """The most that each server holds while the block runs, sampled from outside."""

    def __init__(self, servers: Sequence[Paged]) -> None:
        self.most = {server.name: 0 for server in servers}
        self._servers = servers
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(_SAMPLE_S):
            for server in self._servers:
                with suppress(OSError):  # it has ended; whoever uses it will say so
                    self.most[server.name] = max(self.most[server.name], server.held_bytes())


def copy_in(content: Path, uri: str, *, sparse: bool = False) -> None:
    """Write a file to a device, 256 KiB a request and 16 at a time, and flush; without zeros if `sparse`."""
    command = ["nbdcopy", "--connections=1", "--requests=16", "--request-size=262144", "--flush"]
    command += ["--destination-is-zero"] if sparse else ["--no-extents", "--sparse=0"]
    try:
        done = subprocess.run([*command, content, uri], capture_output=True, text=True, timeout=_COPY_TIMEOUT_S)
    except FileNotFoundError:
        raise BenchError("nbdcopy is not installed") from None
    except subprocess.TimeoutExpired:
        raise BenchError(f"nbdcopy did not finish within {_COPY_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        raise BenchError(f"nbdcopy failed (code {done.returncode}): {done.stderr.strip()[-1000:]}")
