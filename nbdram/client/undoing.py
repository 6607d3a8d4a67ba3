"""Several steps that are done all or not at all, whoever interrupts.

A signal becomes a KeyboardInterrupt at once, except in `uninterrupted`. A child is started there, because else one
could be running that nobody knows of.
"""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

from nbdram.errors import NbdramError

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Steps:
    """What was done, and how to undo it. An undo is registered before its step, so it must find out what there is."""

    def __init__(self) -> None:
        self._undos: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        self.deferring = False
        self.interrupted = False

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
        if self.deferring:
            self.interrupted = True
            return
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
    if steps.interrupted:
        raise KeyboardInterrupt


@contextmanager
def all_or_nothing() -> Iterator[Steps]:
    """Steps that are undone if the block is left by an error or a signal; signals while that is done are ignored."""
    global _current
    _current = steps = Steps()
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
        _current = None
        for number, handler in before.items():
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
