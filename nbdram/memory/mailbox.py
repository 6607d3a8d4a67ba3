"""What worker threads have done, told to the event loop: it is woken once for all that is there by then."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
Told = Callable[[T, OSError | None], None]  # what came of it, if there was no error


class Mailbox:
    """For one event loop, the one that runs when it is first used."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread = 0  # the loop's
        self._loop: asyncio.AbstractEventLoop | None = None
        self._done: list[Callable[[], None]] = []

    def future(self, work: "Future[T]") -> "asyncio.Future[T]":
        """A future of the loop for one of a worker; who loses interest in it does not stop the work."""
        waiting: asyncio.Future[T] = self._here().create_future()
        work.add_done_callback(lambda done: self._put(lambda: _tell(waiting, done)))
        return waiting

    def callback(self, told: "Told[T]") -> "Told[T]":
        """Calls `told` on the loop, whoever calls it."""
        self._here()

        def tell(result: T, error: OSError | None) -> None:
            if threading.get_ident() == self._thread:  # the loop has done it itself
                told(result, error)
            else:
                self._put(lambda: told(result, error))

        return tell

    def _here(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        return self._loop

    def _put(self, tell: Callable[[], None]) -> None:
        if threading.get_ident() == self._thread:  # the loop has done it itself
            tell()
            return
        with self._lock:
            self._done.append(tell)
            wake = len(self._done) == 1
        if wake and self._loop and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            delivered, self._done = self._done, []
        for tell in delivered:
            tell()


def _tell(waiting: "asyncio.Future[T]", done: "Future[T]") -> None:
    if waiting.done():
        return
    error = done.exception()
    if error:
        waiting.set_exception(error)
    else:
        waiting.set_result(done.result())
