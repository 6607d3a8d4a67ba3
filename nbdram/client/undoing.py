"""Several steps that are done all or not at all, whoever interrupts.

A signal becomes a KeyboardInterrupt at once, except in `uninterrupted`. A child is started there, because else one
could be running that nobody knows of. Only the first signal does: all that may follow is the way back, and that is
not interrupted, not by a signal that waited for the end of a step either.
"""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

from nbdram.errors import NbdramError

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_Handler = Callable[[int, FrameType | None], Any] | int | None


class Steps:
    """What was done, and how to undo it. An undo is registered before its step, so it must find out what there is."""

    def __init__(self) -> None:
        self._undos: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        self.deferring = False
        self.deaf = False
        self._interrupted = False

    def undo_with(self, undo: Callable[..., object], *arguments: Any) -> None:
        self._undos.append((undo, arguments))

    def undo_all(self) -> None:
        """The last first; one that fails is told, and does not keep the others from being tried."""
        for undo, arguments in reversed(self._undos):
            try:
                undo(*arguments)
            except (NbdramError, OSError) as error:
                print(f"nbdram: could not undo all of it: {error}", file=sys.stderr)

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """A signal's handler."""
        self._interrupted = True
        if not self.deferring:
            self.heed()

    def heed(self) -> None:
        """KeyboardInterrupt if there was a signal, but once only."""
        if self._interrupted and not self.deaf:
            self.deaf = True
            raise KeyboardInterrupt


_current: Steps | None = None


@contextmanager
def uninterrupted() -> Iterator[None]:
    """For a step of which one can't tell afterwards how far it came: signals wait for its end."""
    steps = _current
    if steps is None:
        yield
        return
    steps.deferring = True
    try:
        yield
    finally:
        steps.deferring = False
    steps.heed()


@contextmanager
def all_or_nothing() -> Iterator[Steps]:
    """Steps that are undone if the block is left by an error or a signal.

    Signals are ignored while that is done. They stay so when all is done: what comes then comes too late.
    """
    global _current
    _current = steps = Steps()
    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # not so under nohup
    before = {number: signal.signal(number, steps.interrupt) for number in heard}
    try:
        try:
            yield steps
        finally:  # a signal just here goes to the undoing below as well, and no other can follow it
            steps.deaf = True
    except BaseException:
        steps.undo_all()
        _heard_by(before)
        raise
    else:
        _heard_by(dict.fromkeys(before, signal.SIG_IGN))
    finally:
        _current = None


def _heard_by(handlers: Mapping[signal.Signals, _Handler]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(argv: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Run a program without input; it is gone when this returns, however that is."""
    process = None
    try:
        with uninterrupted():
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        output, errors = process.communicate()
    except BaseException:
        if process:
            process.kill()
            process.wait()
        raise
    return subprocess.CompletedProcess(argv, process.returncode, output, errors)
