"""What the libnbd scripts of the tests find in scope: `h`, `connect`, and short ways to ask and to check.

Runs under Debian's Python, because libnbd's module is built for it: nothing of nbdram is importable here.
"""

import errno
import random
import sys
from collections.abc import Callable, Iterable
from typing import Any

try:
    import nbd  # type: ignore[import-not-found]
except ImportError:
    sys.exit("libnbd's Python module is not installed: apt-get install python3-libnbd")

__all__ = ["MIB", "PAGE", "Any", "chunks", "connect", "errno", "extents", "finish", "h", "nbd", "noise"]
__all__ += ["random", "refused", "sys", "unconnected", "uri"]

PAGE = 4096
MIB = 1 << 20
uri = sys.argv[1]


def unconnected(*contexts: str, structured: bool = True, strict: bool = True) -> Any:
    handle = nbd.NBD()
    handle.set_request_structured_replies(structured)
    if not strict:
        handle.set_strict_mode(0)
    for context in contexts:
        handle.add_meta_context(context)
    return handle


def connect(*contexts: str, structured: bool = True, strict: bool = True) -> Any:
    """One more connection to the export."""
    handle = unconnected(*contexts, structured=structured, strict=strict)
    handle.connect_uri(uri)
    return handle


def noise(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


def extents(handle: Any, length: int, offset: int, context: str = "base:allocation", flags: int = 0) -> Any:
    """One BLOCK_STATUS: [(length, status), ...] of `context`."""
    found: dict[str, list[int]] = {}

    def received(name: str, _offset: int, entries: list[int], _error: int) -> None:
        found[name] = list(entries)

    handle.block_status(length, offset, received, flags)
    entries = found[context]
    return list(zip(entries[::2], entries[1::2], strict=True))


def chunks(handle: Any, length: int, offset: int, flags: int = 0) -> tuple[bytes, list[tuple[str, int, int]]]:
    """One READ: its bytes, and its chunks in the order of their offsets."""
    seen = []
    kinds = {nbd.READ_DATA: "data", nbd.READ_HOLE: "hole", nbd.READ_ERROR: "error"}

    def received(piece: bytes, at: int, status: int, _error: int) -> None:
        seen.append((kinds[status], at, len(piece)))

    data = handle.pread_structured(length, offset, received, flags)
    return bytes(data), sorted(seen, key=lambda chunk: chunk[1])


def refused(number: int, command: Callable[..., Any], *arguments: Any) -> None:
    """The server answers `command` with this errno."""
    outcome = "success"
    try:
        command(*arguments)
    except nbd.Error as error:
        if error.errnum == number:
            return
        outcome = str(error)
    raise AssertionError(f"{command.__name__} ended with {outcome}, not {errno.errorcode[number]}")


def finish(handle: Any, cookies: Iterable[int]) -> None:
    """Wait for requests in flight; the first that failed raises."""
    while handle.aio_in_flight():
        handle.poll(-1)
    for cookie in cookies:
        assert handle.aio_command_completed(cookie)


h = connect()
