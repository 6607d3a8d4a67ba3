"""Several steps that are done all or not at all, whoever interrupts."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

from nbdram.errors import NbdramError

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Steps:
    """What was done, and how to undo it. An undo is registered before its step, so it must find out what there is."""

    def __init__(self) -> None:
        self._undos: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        self._deferring = False
        self._interrupted = False

    def undo_with(self, undo: Callable[..., object], *arguments: Any) -> None:
        self._undos.append((undo, arguments))

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """For a step of which one can't tell afterwards how far it came: signals wait for its end."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self._interrupted:
            raise KeyboardInterrupt

    def undo_all(self) -> None:
        """The last first; one that fails is told, and does not keep the others from being tried."""
        for undo, arguments in reversed(self._undos):
            try:
                undo(*arguments)
            except (NbdramError, OSError) as error:
                print(f"nbdram: could not undo all of it: {error}", file=sys.stderr)

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """A signal's handler."""
        if self._deferring:
            self._interrupted = True
            return
        raise KeyboardInterrupt


@contextmanager
def all_or_nothing() -> Iterator[Steps]:
    """Steps that are undone if the block is left by an error or a signal; signals while that is done are ignored."""
    steps = Steps()
    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # not so under nohup
    before = {number: signal.signal(number, steps.interrupt) for number in heard}
    try:
        yield steps
    except BaseException:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        steps.undo_all()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
