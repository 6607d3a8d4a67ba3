"""The handshake from the client's end: a server may say anything.

The first byte chooses what is asked; the rest is what the server sends.
"""

from contextlib import suppress
from typing import Any, Final

from nbdram.errors import NbdramError
from nbdram.protocol import client_handshake as ask
from nbdram.protocol.handshake import ReplyMode

_MODES: Final = (ReplyMode.EXTENDED, ReplyMode.STRUCTURED)
_LARGEST: Final = 64 << 10


def conversation(choice: int) -> "ask.Steps[Any]":
    yield from ask.greet()
    if choice & 1:
        yield from ask.agree_on_replies(_MODES)
    if choice & 2:
        yield from ask.list_exports()
    if choice & 4:
        yield from ask.set_contexts("ram", ["base:allocation", "x-nbdram:tier"])
    if choice & 8:
        yield from ask.identity("ram")
    if choice & 16:
        yield from ask.list_contexts("ram")
    if choice & 32:
        yield from ask.info("ram")
    if choice & 64:
        yield from ask.abort()
        return None
    return (yield from ask.go("ram"))


def one(data: bytes) -> None:
    """An execution; raises if anything is wrong."""
    if data:
        with suppress(NbdramError):
            _talk(conversation(data[0]), data)


def _talk(steps: "ask.Steps[Any]", data: bytes) -> None:
    at, wanted = 1, next(steps, b"")
    while at < len(data):
        if isinstance(wanted, bytes):
            assert wanted
            wanted = next(steps, 0)
        else:
            assert wanted <= _LARGEST, "a server decides how much memory its client takes"
            piece, at = data[at : at + wanted], at + wanted
            if not wanted or len(piece) < wanted:
                return
            try:
                wanted = steps.send(piece)
            except StopIteration:
                return
