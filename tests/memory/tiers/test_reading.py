"""What the loop's connection to a node makes of the bytes that arrive, in whatever pieces they come."""

import random
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from nbdram.memory.tiers.engine import Command, Engine
from nbdram.memory.tiers.reading import _Line
from nbdram.memory.tiers.remote_settings import RemoteSettings

ADDRESS = ("127.0.0.1", 1)


@dataclass
class LeftTo:
    """An engine that only notes what it gets."""

    settings: RemoteSettings = field(default_factory=lambda: RemoteSettings((ADDRESS,)))
    sent: list[Command] = field(default_factory=list)

    def send(self, command: Command) -> None:
        self.sent.append(command)


class Received:
    """A connection on which so many values are asked for."""

    def __init__(self, asked: int) -> None:
        self.engine = LeftTo()
        self.line = _Line(cast(Engine, self.engine), ADDRESS)
        self.values: list[bytes | None] = []

        def finish(value: Any, error: OSError | None) -> None:
            assert error is None
            self.values.append(None if value is None else bytes(value))

        for number in range(asked):
            key = b"%d" % number
            self.line._sent.append(Command(key, (b"GET", key), 0.0, finish))

    def receive(self, content: bytes, most: int = 1 << 20) -> None:
        at = 0
        while at < len(content):
            room = len(self.line._buffer) - self.line._end
            assert room > 0, "nothing more can be received"
            piece = content[at : at + min(room, most)]
            self.line._view[self.line._end : self.line._end + len(piece)] = piece
            self.line._end += len(piece)
            self.line._parse()
            at += len(piece)


def value(content: bytes | None) -> bytes:
    return b"$-1\r\n" if content is None else b"$%d\r\n%s\r\n" % (len(content), content)


@pytest.mark.parametrize("most", [1, 7, 1460, 65536, 1 << 20])
async def test_values_are_whole_in_whatever_pieces_they_arrive(most: int) -> None:
    chance = random.Random(most)
    sizes = [0, 1, 2, 100] if most < 100 else [0, 1, 30_000, 65_580, 65_580, 1024, 65_580, 12] * 8
    values = [None, b"\r\n$5\r\n", *(chance.randbytes(size) for size in sizes), None]
    here = Received(len(values))
    here.receive(b"".join(map(value, values)), most)
    assert here.values == values
    assert here.line._start == here.line._end == 0


async def test_an_error_is_the_engines_and_the_values_around_it_are_not() -> None:
    here = Received(3)
    here.receive(value(b"one") + b"-MOVED 7 127.0.0.1:2\r\n" + value(b"three"), 5)
    assert here.values == [b"one", b"three"]
    assert [command.key for command in here.engine.sent] == [b"1"]


@pytest.mark.parametrize(
    "nonsense",
    [b"+OK\r\n", b"*1\r\n", b"$\r\n", b"$x\r\n", b"$99999999\r\n", b"$" + b"1" * 2000, b"\r\n", value(b"") * 2],
)
async def test_what_was_not_asked_for_is_no_answer(nonsense: bytes) -> None:
    here = Received(1)
    with pytest.raises(ValueError, match=r"no answer|invalid literal"):
        here.receive(nonsense)
