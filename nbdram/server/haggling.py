"""Connections in the handshake phase: there is room for so many, and who makes room when there is none.

Honest clients get on within milliseconds, those that only take places do not. So it is the one that has got no further
for longest; of the newcomer's own address, if that has its share of the places already. A crowd that keeps coming thus
pushes out its own.
"""

from collections.abc import Hashable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdram.server.connection import Connection


class Haggling:
    """In the order in which they have last got further, the one that has not for longest first."""

    def __init__(self) -> None:
        self._all: dict[Connection, Hashable] = {}  # with where it is from
        self._from: dict[Hashable, dict[Connection, None]] = {}

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, connection: "Connection") -> bool:
        return connection in self._all

    def add(self, connection: "Connection", origin: Hashable) -> None:
        self._all[connection] = origin
        self._from.setdefault(origin, {})[connection] = None

    def discard(self, connection: "Connection") -> None:
        if connection in self._all:
            origin = self._all.pop(connection)
            of = self._from[origin]
            del of[connection]
            if not of:
                del self._from[origin]

    def got_further(self, connection: "Connection") -> None:
        if connection in self._all:
            origin = self._all[connection]
            self.discard(connection)
            self.add(connection, origin)

    def makes_room_for(self, origin: Hashable) -> "Connection":
        """Who is to go when one from there comes; there must be somebody."""
        of = self._from.get(origin, {})
        has_its_share = of and len(of) * len(self._from) >= len(self._all)
        return next(iter(of if has_its_share else self._all))
