"""Who makes room when there are too many in the handshake phase."""

from typing import cast

from nbdram.server.connection import Connection
from nbdram.server.haggling import Haggling


def one() -> Connection:
    return cast(Connection, object())


def crowd(haggling: Haggling, origin: str, count: int) -> list[Connection]:
    connections = [one() for _ in range(count)]
    for connection in connections:
        haggling.add(connection, origin)
    return connections


def test_the_one_that_has_got_no_further_for_longest_makes_room() -> None:
    haggling = Haggling()
    first, second, third = crowd(haggling, "here", 3)
    haggling.got_further(first)
    for goes in (second, third, first):
        assert haggling.makes_room_for("elsewhere") is goes
        haggling.discard(goes)
    assert not haggling


def test_a_crowd_at_one_address_pushes_out_its_own() -> None:
    haggling = Haggling()
    (slow,) = crowd(haggling, "good", 1)
    for goes in [*crowd(haggling, "bad", 5), *crowd(haggling, "bad", 5)]:
        assert haggling.makes_room_for("bad") is goes
        haggling.discard(goes)
        crowd(haggling, "bad", 1)
    assert slow in haggling


def test_who_comes_from_where_few_are_pushes_out_the_slowest_of_all() -> None:
    haggling = Haggling()
    slowest, *_ = crowd(haggling, "bad", 5)
    crowd(haggling, "good", 1)
    assert haggling.makes_room_for("good") is slowest


def test_who_has_gone_can_get_no_further() -> None:
    haggling = Haggling()
    (gone,) = crowd(haggling, "here", 1)
    haggling.discard(gone)
    haggling.got_further(gone)
    haggling.discard(gone)
    assert gone not in haggling
    assert not haggling
