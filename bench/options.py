"""What the command line asks of a section, and what the section returns."""

from collections.abc import Mapping
from dataclasses import dataclass

Found = Mapping[str, object]  # the figures of a section, ready for JSON


@dataclass(frozen=True)
class Options:
    rounds: int
    seconds: float
    only: str  # a regular expression: names of jobs (serving) or parts (scale)
    peers: tuple[str, ...]
    patience: float  # seconds to wait, in all, for other processes to leave the machine alone
    budget: int  # bytes of RAM for each server (paging)
