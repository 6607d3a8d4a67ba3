"""An export that a client may not use is as if it did not exist, whatever is asked about it."""

import asyncio
import os
import socket
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdram.access import Client as Who
from nbdram.access import Rules
from nbdram.config import ExportSettings
from nbdram.errors import UsageError
from nbdram.observe.control import ask
from nbdram.protocol.handshake import ReplyMode
from nbdram.protocol.wire import Option, OptionReply
from nbdram.server.peers import peer_of
from tests.helpers import GIB, Served, info_payload, meta_payload, option, served

OURS = Rules(users=(os.getuid(),))
OTHERS = Rules(users=(os.getuid() + 1,))


def exports(**rules: Rules) -> tuple[ExportSettings, ...]:
    return tuple(ExportSettings(name, GIB, rules=rule) for name, rule in rules.items())


async def listed(here: Served) -> list[str]:
    async with await here.client() as client:
        await client.greet()
        answers = await client.ask(Option.LIST)
        return [answer.payload[4:].decode() for answer in answers if answer.kind == OptionReply.SERVER]


async def test_what_is_not_for_a_client_is_not_there(tmp_path: Path) -> None:
    async with served(tmp_path, exports=exports(secret=OTHERS, ram=OURS)) as here:
        assert await listed(here) == ["ram"]
        async with await here.client() as client:
            await client.greet()
            await client.agree(ReplyMode.STRUCTURED)
            for number in (Option.INFO, Option.GO):
                refused = await client.ask(number, info_payload("secret"))
                unknown = await client.ask(number, info_payload("nobody"))
                assert refused == unknown
                assert refused[-1].kind == OptionReply.ERR_UNKNOWN
            for number in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
                refused = await client.ask(number, meta_payload("secret", []))
                assert refused == await client.ask(number, meta_payload("nobody", []))
            answers = await client.ask(Option.GO, info_payload("", [1]))
            assert answers[1].payload[2:] == b"ram", "no name is the first that one may use"
        async with await here.client() as client:
            await client.greet()
            await client.send(option(Option.EXPORT_NAME, b"secret"))
            assert await client.rest() == b""


async def test_tcp_clients_are_known_by_their_address(tmp_path: Path) -> None:
    here = Rules.parse({"networks": ["127.0.0.0/8"]})
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert here.allow(peer_of(accepted))
            assert not OURS.allow(peer_of(accepted))


def test_local_clients_are_known_by_user_and_groups() -> None:
    one, other = socket.socketpair()
    with one, other:
        assert peer_of(one) == Who(uid=os.getuid(), gids=frozenset({os.getgid(), *os.getgroups()}))


class _Gone:
    """A socket whose client hung up before it was looked at, or has more groups than can be asked for."""

    def __init__(self, family: int) -> None:
        self.family = family

    def getpeername(self) -> Any:
        raise OSError("not connected")

    def getsockopt(self, level: int, number: int, length: int) -> bytes:
        if number == socket.SO_PEERCRED:
            return struct.pack("iII", 1, 1000, 1001)
        raise OSError("too many")


def test_who_is_gone_or_in_too_many_groups_is_taken_for_less_than_it_was() -> None:
    assert peer_of(_Gone(socket.AF_INET)) == Who()
    assert peer_of(_Gone(socket.AF_UNIX)) == Who(uid=1000, gids=frozenset({1001}))


async def test_rules_are_remembered_in_a_state_directory(tmp_path: Path, shm: Path) -> None:
    rules = replace(OTHERS, iops=1000)
    async with served(tmp_path, exports=exports(ram=OURS, secret=rules), state_dir=shm / "state"):
        pass
    async with served(tmp_path, exports=(), state_dir=shm / "state") as here:
        assert here.server.exports.at("secret").rules == rules
        assert await listed(here) == ["ram"]


async def test_exports_are_made_with_rules_through_the_control_api(tmp_path: Path) -> None:
    async with served(tmp_path) as here:

        def post(**body: Any) -> dict[str, Any]:
            return ask(tmp_path / "control", "exports", "POST", {"size": "1G", **body})

        made = await asyncio.to_thread(post, name="secret", users=[os.getuid() + 1], bandwidth="10M")
        assert (made["users"], made["bandwidth"]) == ([os.getuid() + 1], 10 << 20)
        assert await listed(here) == ["ram"]
        for wrong, told in (({"networks": ["x"]}, "networks: 'x' is not a network"), ({"users": True}, "wrong type")):
            with pytest.raises(UsageError, match=told):
                await asyncio.to_thread(post, name="wrong", **wrong)
