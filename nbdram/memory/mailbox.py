"""What worker threads have done, told to the event loop: it is woken once for all that is there by then."""

import asyncio
import threading
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class Mailbox:
    """For one event loop, the one that runs when it is first used."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread = 0  # the loop's
        self._loop: asyncio.AbstractEventLoop | None = None
        self._done: list[tuple[asyncio.Future[object], Future[object]]] = []

    def future(self, work: "Future[T]") -> "asyncio.Future[T]":
        """A future of the loop for one of a worker; who loses interest in it does not stop the work."""
        if self._loop is None:
            self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        waiting: asyncio.Future[T] = self._loop.create_future()
        work.add_done_callback(lambda done: self._put(waiting, done))  # type: ignore[arg-type]
        return waiting

    def _put(self, waiting: "asyncio.Future[object]", done: "Future[object]") -> None:
        if threading.get_ident() == self._thread:  # the loop has done it itself
            _tell(waiting, done)
            return
        with self._lock:
            self._done.append((waiting, done))
            wake = len(self._done) == 1
        if wake and self._loop and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            delivered, self._done = self._done, []
        for waiting, done in delivered:
            _tell(waiting, done)


def _tell(waiting: "asyncio.Future[object]", done: "Future[object]") -> None:
    if waiting.done():
        return
    error = done.exception()
    if error:
        waiting.set_exception(error)
    else:
        waiting.set_result(done.result())
