"""What broke other servers, said to this one over real sockets.

`served` checks what all of these have in common: nothing escapes the server, and no page is lost; `still_answers`,
that other clients are served as before. Rows that need no connection are in tests/protocol/test_handshake.py.
"""

import asyncio
import logging
import random
import tracemalloc
from pathlib import Path

import pytest

from nbdram.protocol.handshake import Failure, ReplyMode
from nbdram.protocol.wire import Command, CommandFlag, Option, OptionReply
from tests.helpers import (
    ALL_MODES,
    CHUNK_MODES,
    CLUSTER,
    GIB,
    KIB,
    MIB,
    PAGE,
    TIB,
    Client,
    Served,
    client_flags,
    eventually,
    go,
    info_payload,
    meta_payload,
    option,
    request,
    served,
    u32,
    u64,
)

EINVAL, ENOSPC = 22, 28
MODES = pytest.mark.parametrize("mode", ALL_MODES, ids=[mode.value for mode in ALL_MODES])
LAST = 2**64 - 1


async def greeted(here: Served) -> Client:
    client = await here.client()
    await client.greet()
    return client


# -- the handshake phase -----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [257, 1024, 4096])
async def test_cve_2017_15118_a_long_export_name_is_just_unknown(tmp_path: Path, length: int) -> None:
    async with served(tmp_path) as here, await greeted(here) as client:
        for number in (Option.INFO, Option.GO):
            (answer,) = await client.ask(number, info_payload("x" * length))
            assert answer.kind == OptionReply.ERR_UNKNOWN
        await client.send(option(Option.EXPORT_NAME, b"x" * length))
        assert await client.rest() == b""
        await here.still_answers()


async def test_cve_2017_15119_an_option_of_4_gib_sent_slowly_starves_nobody(tmp_path: Path) -> None:
    async with served(tmp_path) as here, await greeted(here) as slow:
        await slow.send(option(Option.LIST, length=0xFFFFFFFF))
        tracemalloc.start()
        for _ in range(20):
            await slow.send(bytes(MIB))
            await here.still_answers()
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert held < 2 * MIB


def failures(here: Served) -> dict[str, int]:
    """How handshakes have failed so far, and how often."""
    return {failure: count for failure, count in here.server.service.counters.handshake_failures.items() if count}


WHOLE_HANDSHAKE = (
    client_flags()
    + option(Option.STRUCTURED_REPLY)
    + option(Option.SET_META_CONTEXT, meta_payload("ram", ["base:allocation"]))
    + option(Option.INFO, info_payload("ram"))
    + go("ram")
)


async def test_cve_2017_7539_a_hang_up_after_any_byte_of_the_handshake_is_no_news(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(tmp_path) as here:
        for length in range(len(WHOLE_HANDSHAKE)):
            client = await here.client()
            await client.send(WHOLE_HANDSHAKE[:length])
            client.kill()
        await here.all_gone()
        assert failures(here) == {Failure.HUNG_UP: len(WHOLE_HANDSHAKE)}
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        await here.still_answers()


@pytest.mark.parametrize("seed", range(8))
async def test_cve_2017_9524_garbage_in_the_handshake_ends_that_connection_only(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    async with served(tmp_path) as here:
        for _ in range(20):
            at = chance.randrange(len(WHOLE_HANDSHAKE))
            async with await here.client() as client:
                await client.send(WHOLE_HANDSHAKE[:at] + chance.randbytes(40))
                client.writer.write_eof()
                await client.rest()
        await here.all_gone()
        assert sum(failures(here).values()) == 20
        await here.still_answers()


@MODES
async def test_cve_2017_7539_a_request_before_go_ends_the_connection(tmp_path: Path, mode: ReplyMode) -> None:
    async with served(tmp_path) as here, await greeted(here) as client:
        await client.send(request(mode, Command.READ, 0, PAGE))
        assert await client.rest() == b""


@pytest.mark.parametrize("number", [Option.INFO, Option.GO])
async def test_cve_2020_10761_an_unknown_name_of_4096_bytes_gets_a_short_error(tmp_path: Path, number: Option) -> None:
    async with served(tmp_path) as here, await greeted(here) as client:
        (answer,) = await client.ask(number, info_payload("x" * 4096))
        assert answer.kind == OptionReply.ERR_UNKNOWN
        assert len(answer.payload) < 100


async def test_cve_2024_7409_many_idle_half_handshakes_keep_nobody_out(tmp_path: Path) -> None:
    async with served(tmp_path) as here:
        idle = [await here.client() for _ in range(300)]
        await here.still_answers()
        assert len(here.connections) >= 300
        for client in idle:
            client.kill()
        await here.all_gone()


async def test_cve_2024_7409_a_half_handshake_does_not_keep_the_server_from_stopping(tmp_path: Path) -> None:
    async with served(tmp_path) as here, await here.client() as silent, await greeted(here) as halfway:
        await halfway.send(option(Option.GO, info_payload("ram"))[:10])
        await here.server.stop()
        assert not here.connections
        assert await halfway.rest() == b""
        assert await silent.rest() != b""  # the greeting


@pytest.mark.parametrize("number", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
async def test_qemu_4843_bytes_behind_the_queries_are_not_taken_for_an_option(tmp_path: Path, number: Option) -> None:
    async with served(tmp_path) as here, await greeted(here) as client:
        await client.agree(ReplyMode.STRUCTURED)
        behind = option(Option.ABORT)
        (answer,) = await client.ask(number, meta_payload("ram", ["base:allocation"]) + behind)
        assert answer.kind == OptionReply.ERR_INVALID
        assert (await client.ask(Option.GO, info_payload("ram")))[-1].kind == OptionReply.ACK


async def test_cve_2019_14850_who_says_nothing_opens_no_export(tmp_path: Path) -> None:
    async with served(tmp_path) as here, await here.client() as silent:
        assert len(await silent.receive(18)) == 18
        export = here.server.exports.get("ram")
        assert export
        assert export.connections == 0
        assert here.connection().device is None


async def test_cve_2019_14851_options_may_come_twice_and_in_any_order(tmp_path: Path) -> None:
    async with served(tmp_path) as here, await greeted(here) as client:
        for _ in range(2):
            assert (await client.ask(Option.INFO, info_payload("ram")))[-1].kind == OptionReply.ACK
        for number in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):  # before structured replies
            (answer,) = await client.ask(number, meta_payload("ram", []))
            assert answer.kind == OptionReply.ERR_INVALID
        await client.agree(ReplyMode.STRUCTURED)
        await client.agree(ReplyMode.STRUCTURED)
        await client.send(option(Option.EXPORT_NAME, b"ram"))
        assert len(await client.receive(10)) == 10
        await client.write(0, b"served")
        assert await client.read(0, 6) == b"served"


@pytest.mark.parametrize("number", [Option.INFO, Option.GO])
async def test_cve_2022_26495_a_name_length_of_4_gib_is_invalid(tmp_path: Path, number: Option) -> None:
    async with served(tmp_path) as here, await greeted(here) as client:
        (answer,) = await client.ask(number, u32(0xFFFFFFFF) + b"ram\0\0")
        assert answer.kind == OptionReply.ERR_INVALID
        assert (await client.ask(Option.GO, info_payload("ram")))[-1].kind == OptionReply.ACK


async def test_cve_2022_26496_export_name_of_4_gib_is_never_answered(tmp_path: Path) -> None:
    async with served(tmp_path) as here, await greeted(here) as client:
        await client.send(option(Option.EXPORT_NAME, b"ram" * 100, length=0xFFFFFFFF))
        await client.send(go("ram"))
        client.writer.write_eof()
        assert await client.rest() == b""


async def test_cve_2013_7441_unknown_names_and_hang_ups_do_not_end_the_server(tmp_path: Path) -> None:
    async with served(tmp_path) as here:
        for number in range(50):
            async with await greeted(here) as client:
                await client.send(option(Option.EXPORT_NAME, b"nobody"))
                if number % 2:
                    assert await client.rest() == b""
        await here.all_gone()
        await here.still_answers()


# -- requests that lie -------------------------------------------------------------------------------

RANGED = (Command.READ, Command.TRIM, Command.CACHE, Command.WRITE_ZEROES, Command.BLOCK_STATUS)


@MODES
@pytest.mark.parametrize("offset", [LAST, LAST - PAGE + 1, LAST - 0xFFFFFFFF, TIB, TIB - 1, 1 << 63])
async def test_offset_and_length_never_wrap_around(tmp_path: Path, mode: ReplyMode, offset: int) -> None:
    async with served(tmp_path) as here:
        async with await here.entered("ram", mode, ["base:allocation"] if mode in CHUNK_MODES else []) as client:
            for command in RANGED:
                for length in (2, PAGE, MIB):
                    answer = await client.call(command, offset, length)
                    assert answer.error == (ENOSPC if command == Command.WRITE_ZEROES else EINVAL), command
            assert (await client.call(Command.WRITE, offset, payload=bytes(PAGE))).error == ENOSPC
            assert await client.read(0, 10) == bytes(10)
        assert here.device().resident_pages == 0


async def test_64_bit_lengths_never_wrap_around_either(tmp_path: Path) -> None:
    async with served(tmp_path) as here, await here.entered("ram", ReplyMode.EXTENDED, ["base:allocation"]) as client:
        for offset, length in ((0, LAST), (1, LAST), (PAGE, LAST - PAGE + 1), (TIB - PAGE, 1 << 63), (LAST, LAST)):
            for command in RANGED:
                answer = await client.call(command, offset, length)
                assert answer.error == (ENOSPC if command == Command.WRITE_ZEROES else EINVAL), command
        assert await client.read(0, 10) == bytes(10)


@MODES
@pytest.mark.parametrize("length", [32 * MIB + 1, 0xFFFFFFFF])
async def test_cve_2005_3534_a_read_beyond_any_buffer_is_refused(tmp_path: Path, mode: ReplyMode, length: int) -> None:
    async with served(tmp_path) as here, await here.entered("ram", mode) as client:
        assert (await client.call(Command.READ, 0, length)).error == EINVAL
        assert await client.read(0, 10) == bytes(10)


@pytest.mark.parametrize("mode", [ReplyMode.SIMPLE, ReplyMode.STRUCTURED])
async def test_cve_2011_0530_a_write_beyond_any_buffer_is_passed_over(tmp_path: Path, mode: ReplyMode) -> None:
    async with served(tmp_path) as here, await here.entered("ram", mode) as client:
        assert (await client.call(Command.WRITE, 0, payload=b"x" * (33 * MIB))).error == EINVAL
        assert await client.read(0, 10) == bytes(10)
        await client.send(client.request(Command.WRITE, 0, 0xFFFFFFFF, payload=b"x" * MIB))
        client.kill()
        await here.all_gone()
        assert here.device().resident_pages == 0


@pytest.mark.parametrize("command", [Command.WRITE, Command.BLOCK_STATUS, Command.READ])
@pytest.mark.parametrize("length", [32 * MIB + 1, LAST])
async def test_a_payload_beyond_the_maximum_ends_an_extended_connection(
    tmp_path: Path, command: Command, length: int
) -> None:
    async with served(tmp_path) as here:
        async with await here.entered("ram", ReplyMode.EXTENDED) as client:
            await client.send(client.request(command, 0, length, flags=CommandFlag.PAYLOAD_LEN))
            assert await client.rest() == b""
        await here.still_answers()


@MODES
async def test_a_request_without_its_magic_ends_that_connection_only(tmp_path: Path, mode: ReplyMode) -> None:
    async with served(tmp_path) as here:
        async with await here.entered("ram", mode) as client:
            await client.write(0, b"before")
            await client.send(bytes(64))
            assert await client.rest() == b""
        assert here.server.service.counters.protocol_errors == 1
        await here.still_answers()


@pytest.mark.parametrize("mode", CHUNK_MODES)
async def test_cve_2025_47711_block_status_of_4_gib_of_a_larger_hole(tmp_path: Path, mode: ReplyMode) -> None:
    async with served(tmp_path) as here, await here.entered("ram", mode, ["base:allocation"]) as client:
        answer = await client.call(Command.BLOCK_STATUS, 0, 0xFFFFFFFF)
        ((length, flags),) = answer.status[client.contexts["base:allocation"]]
        assert 0 < length <= 0xFFFFFFFF
        assert flags == 3
        assert (await client.call(Command.BLOCK_STATUS, PAGE - 1, 1)).status


async def test_cve_2025_47712_block_status_rounds_no_length_to_32_bits(tmp_path: Path) -> None:
    async with served(tmp_path) as here, await here.entered("ram", ReplyMode.EXTENDED, ["base:allocation"]) as client:
        await client.write(8 * GIB, bytes(range(256)))
        answer = await client.call(Command.BLOCK_STATUS, 0, TIB)
        assert answer.status[client.contexts["base:allocation"]] == [
            (8 * GIB, 3),
            (PAGE, 0),
            (TIB - 8 * GIB - PAGE, 3),
        ]


@pytest.mark.parametrize("ids", [(), (1, 1), (1, 2, 1), (3,)], ids=["none", "twice", "again", "unknown"])
async def test_a_status_payload_names_negotiated_contexts_each_once_or_is_refused(
    tmp_path: Path, ids: tuple[int, ...]
) -> None:
    contexts = ["base:allocation", "x-nbdram:tier"]
    async with served(tmp_path) as here, await here.entered("ram", ReplyMode.EXTENDED, contexts) as client:
        assert sorted(client.contexts.values()) == [1, 2]
        payload = u64(PAGE) + b"".join(map(u32, ids))
        flags = CommandFlag.PAYLOAD_LEN
        answer = await client.call(Command.BLOCK_STATUS, 0, len(payload), flags=flags, payload=payload)
        assert (answer.error, answer.status) == (EINVAL, {})
        payload = u64(PAGE) + u32(2)
        answer = await client.call(Command.BLOCK_STATUS, 0, len(payload), flags=flags, payload=payload)
        assert answer.status == {2: [(PAGE, 0)]}


@MODES
@pytest.mark.parametrize("length", [128 * MIB, 4 * GIB - PAGE])
@pytest.mark.parametrize("flags", [0, CommandFlag.FAST_ZERO])
async def test_write_zeroes_over_64_mib_leaves_nothing_stale(
    tmp_path: Path, mode: ReplyMode, length: int, flags: int
) -> None:
    async with served(tmp_path) as here, await here.entered("ram", mode) as client:
        marks = [0, 64 * MIB - 1, 64 * MIB, 128 * MIB - PAGE, length - CLUSTER, length - 1]
        for offset in (*marks, length):
            await client.write(offset, b"x")
        assert (await client.call(Command.WRITE_ZEROES, 0, length, flags=flags)).error == 0
        for offset in marks:
            assert await client.read(offset, 1) == b"\0", offset
        assert await client.read(length, 1) == b"x"
        assert here.device().resident_pages == 1


# -- clients with bad manners ------------------------------------------------------------------------


@MODES
async def test_a_cookie_that_is_used_twice_is_answered_twice(tmp_path: Path, mode: ReplyMode) -> None:
    async with served(tmp_path) as here, await here.entered("ram", mode) as client:
        again = client.request(Command.TRIM, 0, PAGE, cookie=7) * 2
        await client.send(again)
        assert {(await client.chunk()).cookie for _ in range(2)} == {7}


@MODES
async def test_disc_is_obeyed_when_what_came_before_is_answered(tmp_path: Path, mode: ReplyMode) -> None:
    async with served(tmp_path) as here, await here.entered("ram", mode) as client:
        for number in range(64):
            await client.write(number * GIB, b"x" * 100)
        requests = [client.request(Command.TRIM, 0, GIB * 3), client.request(Command.READ, GIB * 4 - 5, 30 * MIB)]
        requests += [client.request(Command.READ, number * GIB, 100) for number in range(8, 64)]
        await client.send(b"".join(requests) + request(mode, Command.DISC) + request(mode, Command.READ, 0, PAGE))
        answers = await client.replies(len(requests))
        assert all(answer.error == 0 for answer in answers.values())
        assert await client.rest() == b""


@MODES
async def test_half_close_is_answered_in_full(tmp_path: Path, mode: ReplyMode) -> None:
    async with served(tmp_path) as here, await here.entered("ram", mode) as client:
        await client.send(client.request(Command.WRITE, 0, payload=b"x" * MIB))
        for _ in range(4):
            await client.send(client.request(Command.READ, 0, 8 * MIB))
        client.writer.write_eof()
        answers = await client.replies(5)
        assert [len(answer.data) for _, answer in sorted(answers.items())] == [0] + 4 * [8 * MIB]
        assert await client.rest() == b""


@MODES
async def test_half_close_in_the_middle_of_a_request_forgets_that_one(tmp_path: Path, mode: ReplyMode) -> None:
    for payload in (100, MIB):
        (tmp_path / str(payload)).mkdir()
        async with served(tmp_path / str(payload)) as here, await here.entered("ram", mode) as client:
            whole = client.request(Command.READ, 0, 10)
            await client.send(whole + client.request(Command.WRITE, 0, payload=b"x" * payload)[:-1])
            client.writer.write_eof()
            assert len(await client.replies(1)) == 1
            assert await client.rest() == b""


@MODES
async def test_one_byte_at_a_time_is_understood(tmp_path: Path, mode: ReplyMode) -> None:
    async with served(tmp_path) as here, await here.client() as client:
        opening = {ReplyMode.STRUCTURED: Option.STRUCTURED_REPLY, ReplyMode.EXTENDED: Option.EXTENDED_HEADERS}
        handshake = client_flags() + (option(opening[mode]) if mode in opening else b"") + go("ram")
        await client.send_in_pieces(handshake, range(1, len(handshake)))
        await client.receive(18)
        for _ in range(1 + (mode in opening)):
            await client.answers()
        client.mode = mode
        data = bytes(range(200))
        stream = client.request(Command.WRITE, PAGE - 100, payload=data) + client.request(Command.READ, PAGE - 100, 200)
        await client.send_in_pieces(stream, range(1, len(stream)))
        assert (await client.replies(2))[2].data == data


def _pages_of_data(here: Served) -> int:
    """What counts besides this process itself, which takes now more, now less."""
    budget = here.device().budget
    return budget.used_pages - budget.overhead_pages


@MODES
async def test_a_client_killed_in_a_large_write_harms_nothing_else(tmp_path: Path, mode: ReplyMode) -> None:
    """What arrived may stay, page by page; its neighbours are untouched, and what never came costs nothing."""
    async with served(tmp_path) as here:
        async with await here.entered("ram", mode) as client:
            await client.write(0, b"a" * CLUSTER)
            await client.write(CLUSTER + 16 * MIB, b"b" * CLUSTER)
            before = _pages_of_data(here)
            await client.send(client.request(Command.WRITE, CLUSTER, payload=b"x" * (16 * MIB))[: 5 * MIB + 777])
            await eventually(lambda: bool(here.device().incoming))
        await here.all_gone()
        device = here.device()
        assert device.read(0, CLUSTER) == b"a" * CLUSTER
        assert device.read(CLUSTER + 16 * MIB, CLUSTER) == b"b" * CLUSTER
        middle = device.read(CLUSTER, 16 * MIB)
        assert {middle[at : at + PAGE] for at in range(0, 16 * MIB, PAGE)} <= {b"x" * PAGE, bytes(PAGE)}
        list(device.trim(CLUSTER, CLUSTER + 16 * MIB))
        assert _pages_of_data(here) == before
        assert not device.incoming


async def test_connections_that_come_and_go_leave_nothing_behind(tmp_path: Path) -> None:
    chance = random.Random(1)

    async def visit(here: Served) -> None:
        for _ in range(20):
            async with await here.entered("ram", chance.choice(ALL_MODES)) as client:
                stream = client.request(Command.WRITE, chance.randrange(64) * KIB, payload=bytes(chance.randrange(MIB)))
                stream += client.request(Command.READ, 0, MIB)
                await client.send(stream[: chance.randrange(len(stream))])
                await asyncio.sleep(0)

    async with served(tmp_path) as here:
        async with asyncio.TaskGroup() as visits:
            for _ in range(10):
                visits.create_task(visit(here))
        await here.all_gone()
        export = here.server.exports.get("ram")
        assert export
        assert export.connections == 0
        assert not here.device().senders
        assert not here.device().incoming
