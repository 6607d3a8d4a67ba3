"""What is fuzzed: for each target, the modules whose branches count as progress, and its share of the time."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SEEDS: Final = Path(__file__).parent / "seeds"


@dataclass(frozen=True)
class Target:
    """`tests/fuzz/NAME.py` has `one(data)`, which is an execution; `longest`: how many bytes it makes sense of."""

    name: str
    modules: tuple[str, ...]
    share: int
    longest: int

    def one(self) -> Callable[[bytes], None]:
        """The function to call; it raises if anything is wrong."""
        function: Callable[[bytes], None] = importlib.import_module(f"tests.fuzz.{self.name}").one
        return function

    @property
    def seeds(self) -> Path:
        return SEEDS / self.name


TARGETS: Final = {
    target.name: target
    for target in (
        Target("haggling", ("nbdram.protocol.handshake", "nbdram.protocol.wire"), 3, 1200),
        Target("dialing", ("nbdram.protocol.client_handshake", "nbdram.protocol.wire"), 1, 600),
        Target("words", ("nbdram.config", "nbdram.config_remote", "nbdram.access"), 1, 120),
        Target("serving", ("nbdram.server", "nbdram.protocol.replies", "nbdram.memory"), 7, 600),
    )
}

# What inputs can reach: of the server the transmission phase, of memory what it does at the same time.
REACHABLE: Final = (
    "nbdram.protocol.handshake",
    "nbdram.protocol.client_handshake",
    "nbdram.protocol.replies",
    "nbdram.protocol.wire",
    "nbdram.config",
    "nbdram.config_remote",
    "nbdram.access",
    "nbdram.server.connection",
    "nbdram.server.commands",
    "nbdram.server.pace",
    "nbdram.server.views",
    "nbdram.memory.budget",
    "nbdram.memory.codec",
    "nbdram.memory.device",
    "nbdram.memory.incoming",
    "nbdram.memory.space",
    "nbdram.memory.tiers.ram",
)
