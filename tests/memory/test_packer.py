"""A process of its own makes the images: the same as a thread would, and nothing is lost when it is."""

import asyncio
import os
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator, Container, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdram.memory import budget as budget_module
from nbdram.memory import packer as packer_module
from nbdram.memory import packing
from nbdram.memory.budget import Budget
from nbdram.memory.codec import Codec, IntegrityError
from nbdram.memory.device import Device
from nbdram.memory.layout import CLUSTER_SHIFT, RESIDENT, SLOT_SHIFT
from nbdram.memory.packer import Packer, Packers, WantedToSend
from nbdram.memory.reclaim import Reclaimer, anonymous_bytes
from tests.helpers import CLUSTER, MIB, PAGE, eventually, running

LIMIT = 192 * MIB
COUNT = 2 * LIMIT // CLUSTER  # clusters; half of them fit


def text(cluster: int, generation: int = 0) -> bytes:
    """Compresses to a quarter."""
    chance = random.Random(cluster << 8 | generation)
    return (chance.randbytes(1024) + bytes(3 * 1024)) * 16


@pytest.fixture(params=[Codec(), Codec.dense()], ids=["blocks", "dense"])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    made = Device("paged", 2 * COUNT * CLUSTER, Budget(LIMIT), request.param)
    yield made
    made.close()


@asynccontextmanager
async def started() -> AsyncIterator[Packer]:
    packer = Packer()
    try:
        await ready(packer)
        yield packer
    finally:
        await packer.stop()


async def ready(packer: Packer, other_than: Container[int | None] = ()) -> None:
    """Reclaim starts the next process when it has a batch for it, which may be after the last one was lost."""

    def is_ready() -> bool:
        packer.start()
        return packer.is_ready and packer.pid not in other_than

    await eventually(is_ready)


@asynccontextmanager
async def reclaiming(device: Device, most: int = 1) -> AsyncIterator[Packers]:
    packers = Packers(most=most)
    reclaimer = Reclaimer(device.budget, lambda: [device], packers)
    reclaimer.start()
    device.budget.set_limit(LIMIT + device.budget.overhead_pages * PAGE)
    try:
        yield packers
    finally:
        await reclaimer.stop()


async def fill(device: Device, first: int, generation: int = 0) -> None:
    """Like a client that waits for memory."""
    async with asyncio.timeout(60):
        for cluster in range(first, COUNT):
            while True:
                try:
                    device.write(cluster * CLUSTER, text(cluster, generation))
                    break
                except OSError:
                    await asyncio.sleep(0.001)
            if not cluster % 16:
                await asyncio.sleep(0)


def image_of(device: Device, cluster: int, word: int) -> bytes:
    pieces = device.decode_quietly(cluster, word, 0, CLUSTER, device.load_image(cluster, word))
    return b"".join(pieces)


async def test_all_kinds_of_clusters_are_packed_as_a_thread_would(device: Device) -> None:
    noise = random.Random(1).randbytes(CLUSTER)
    contents = {0: text(0), 1: noise, 2: bytes(CLUSTER), 3: text(3)[: 5 * PAGE] + bytes(11 * PAGE)}
    for cluster, content in contents.items():
        device.write(cluster * CLUSTER, content)
    list(device.trim(3 * CLUSTER + 5 * PAGE, 4 * CLUSTER))
    async with started() as packer:
        wanted = [(device, cluster, device.words[cluster]) for cluster in contents]
        whole, noisy, zeros, part = await packer.pack(wanted)
        assert (noisy, zeros) == (packing.INCOMPRESSIBLE, packing.ZEROS)
        assert image_of(device, 0, whole) == contents[0]
        assert image_of(device, 3, part) == contents[3]
        # A page over an image: the image's other pages are in the next one, which is in the other slot.
        device.take_images(0, [whole])
        device.write(7 * PAGE, b"n" * PAGE)
        merged = contents[0][: 7 * PAGE] + b"n" * PAGE + contents[0][8 * PAGE :]
        assert device.words[0] & RESIDENT == 1 << 7
        (over,) = await packer.pack([(device, 0, device.words[0])])
        assert over >> SLOT_SHIFT & 1 != whole >> SLOT_SHIFT & 1
        assert image_of(device, 0, over) == merged == device.read(0, CLUSTER)
        device.take_images(0, [over])
        device.take_images(3, [part])


async def test_images_are_stored_through_maps_once_the_device_has_dropped_some(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = []
    send = socket.send_fds

    def sent(line: socket.socket, parts: list[bytes], files: list[int]) -> int:
        kinds.append(parts[0][:1])
        return send(line, parts, files)

    monkeypatch.setattr(socket, "send_fds", sent)
    async with started() as packer:
        for generation in range(2):
            device.write(0, text(0, generation))  # drops the image that there is
            (image,) = await packer.pack([(device, 0, device.words[0])])
            assert image_of(device, 0, image) == text(0, generation)
            device.take_images(0, [image])
            assert device.read(0, CLUSTER) == text(0, generation)
    assert kinds == [b"P", b"M"]


async def test_an_old_image_that_is_damaged_is_left_to_a_thread_to_tell(device: Device) -> None:
    device.write(0, text(0))
    async with started() as packer:
        (image,) = await packer.pack([(device, 0, device.words[0])])
        device.take_images(0, [image])
        os.pwrite(device.ram.fd, b"?" * 64, 0)
        device.write(PAGE, b"n" * PAGE)
        assert await packer.pack([(device, 0, device.words[0])]) == [packing.FAILED]


def test_blocks_of_which_nothing_is_resident_are_taken_as_they_are_with_their_damage() -> None:
    device = Device("paged", MIB, Budget(8 * MIB))
    device.write(0, text(0))
    device.take_images(0, [pack(device, 0)])
    device.write(7 * PAGE, b"n" * PAGE)
    device.write(8 * PAGE, b"m" * (4 * PAGE))  # a whole block, another one in part
    before = device.load_image(0, device.words[0])
    damaged = bytearray(before)
    damaged[-1] ^= 1  # of the last block
    os.pwrite(device.ram.fd, damaged, (device.words[0] >> SLOT_SHIFT & 1) * CLUSTER)
    device.take_images(0, [pack(device, 0)])
    expected = text(0)[: 7 * PAGE] + b"n" * PAGE + b"m" * (4 * PAGE)
    assert device.read(0, 12 * PAGE) == expected
    with pytest.raises(IntegrityError, match="checksum"):
        device.read(12 * PAGE, PAGE)
    device.close()


def test_an_old_image_that_is_gone_or_whose_header_is_damaged_is_not_built_upon() -> None:
    device = Device("paged", MIB, Budget(8 * MIB))
    device.write(0, text(0))
    device.take_images(0, [pack(device, 0)])
    device.write(PAGE, b"n" * PAGE)
    whole = device.load_image(0, device.words[0])
    for damaged in (bytes(len(whole)), whole[:12] + b"\x01" + whole[13:]):
        os.pwrite(device.ram.fd, damaged, (device.words[0] >> SLOT_SHIFT & 1) * CLUSTER)
        with pytest.raises(IntegrityError):
            pack(device, 0)
    device.close()


def pack(device: Device, cluster: int) -> int:
    return packing.pack(device.backing.hot_fd, device.ram, device.codec, cluster, device.words[cluster])


async def test_under_load_the_process_does_the_work_and_its_memory_counts(device: Device) -> None:
    async with reclaiming(device) as packers:
        packer = packers.first
        await fill(device, 0)
        await eventually(lambda: packer.is_ready)
        await fill(device, 0, 1)
        pid = packer.pid
        assert pid
        assert anonymous_bytes(pid) > MIB
        await eventually(lambda: device.budget.overhead_pages * PAGE >= anonymous_bytes() + anonymous_bytes(pid) - MIB)
        await eventually(lambda: not device.reclaiming)
        assert device.cold_clusters > COUNT // 4
        assert device.cold_pages * PAGE == device.ram.allocated_bytes()
        for cluster in range(COUNT):
            assert device.read(cluster * CLUSTER, CLUSTER) == text(cluster, 1)
    assert not Path(f"/proc/{pid}").exists()


async def test_a_second_process_comes_when_one_can_t_keep_up_and_both_go_when_nobody_needs_them(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packer_module, "_MEMORY_EACH", LIMIT * 2 // 5)
    monkeypatch.setattr(budget_module, "_SOON_S", 0.0)  # no other reason calls for it
    async with reclaiming(device, most=3) as packers:
        first, second, third = packers
        await fill(device, 0)
        await eventually(lambda: first.is_ready)
        for generation in range(1, 20):
            await fill(device, 0, generation)
            if second.is_ready and second.batches:
                break
        assert first.pid
        assert second.pid
        assert first.pid != second.pid
        assert third.pid is None, "there is no memory for it"
        both = anonymous_bytes(first.pid) + anonymous_bytes(second.pid)
        await eventually(lambda: device.budget.overhead_pages * PAGE >= anonymous_bytes() + both - MIB)
        await eventually(lambda: not device.reclaiming and not first.batches and not second.batches)
        os.kill(second.pid, signal.SIGSTOP)  # it has to go all the same
        monkeypatch.setattr(packer_module, "_IDLE_S", 0.0)
        pids = first.pid, second.pid
        await eventually(lambda: first.pid is None and second.pid is None)
        await eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
        await fill(device, 0, 100)
        await eventually(lambda: not device.reclaiming)
        for cluster in range(COUNT):
            assert device.read(cluster * CLUSTER, CLUSTER) == text(cluster, 100)
        assert device.cold_pages * PAGE == device.ram.allocated_bytes()


async def test_all_that_there_may_be_come_when_memory_will_be_short_soon(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packer_module, "_MEMORY_EACH", LIMIT * 2 // 5)
    monkeypatch.setattr(budget_module, "_AHEAD_S", 0.0)  # reclaim itself has nothing to do yet
    async with reclaiming(device, most=3) as packers:
        first, second, third = packers
        await asyncio.sleep(0.6)
        assert first.pid is None, "nobody writes"
        for cluster in range(COUNT * 2 // 5):
            device.write(cluster * CLUSTER, text(cluster))
        await eventually(lambda: first.is_ready and second.is_ready)
        assert third.pid is None, "there is no memory for it"
        assert not device.cold_clusters
        assert not device.reclaiming


@pytest.mark.parametrize(
    ("sent", "told"), [(signal.SIGKILL, "has gone"), (signal.SIGSTOP, "has not answered for 0.3 s")]
)
async def test_nothing_is_lost_with_the_process_and_another_one_comes(
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    sent: signal.Signals,
    told: str,
) -> None:
    monkeypatch.setattr(packer_module, "_AGAIN_S", 0.0)
    monkeypatch.setattr(packer_module, "_PATIENCE_S", 0.3)
    async with reclaiming(device) as packers:
        packer = packers.first
        await fill(device, 0)
        killed: set[int | None] = set()
        for generation in range(1, 6):
            await ready(packer, killed)
            assert packer.pid
            os.kill(packer.pid, sent)
            killed.add(packer.pid)
            await fill(device, 0, generation)
        assert len(killed) == 5
        await eventually(lambda: not device.reclaiming)
        assert device.cold_pages * PAGE == device.ram.allocated_bytes()
        for cluster in range(COUNT):
            assert device.read(cluster * CLUSTER, CLUSTER) == text(cluster, 5)
    assert f"the process that compresses {told}" in caplog.text
    assert "reclaim had an error" not in caplog.text


async def test_threads_go_on_where_others_leave_the_process_no_time(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packer_module, "_PATIENCE_S", 600.0)
    async with reclaiming(device) as packers:
        packer = packers.first
        await fill(device, 0)
        await ready(packer)
        assert packer.pid
        os.kill(packer.pid, signal.SIGSTOP)
        try:
            for generation in range(1, 4):
                await fill(device, 0, generation)
            assert packer.is_late
            assert packer.batches
        finally:
            os.kill(packer.pid, signal.SIGCONT)
        await eventually(lambda: not device.reclaiming)
        assert not packer.is_late
        for cluster in range(COUNT):
            assert device.read(cluster * CLUSTER, CLUSTER) == text(cluster, 3)
        assert device.cold_pages * PAGE == device.ram.allocated_bytes()


async def test_what_the_process_answered_before_it_was_lost_is_kept(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packer_module, "_AGAIN_S", 0.0)
    pack_all = Packer.pack
    lost: list[int | None] = []

    async def pack_and_go(packer: Packer, wanted: Sequence[packer_module.Wanted]) -> list[int]:
        images = await pack_all(packer, wanted)
        if packer.is_ready and len(lost) < 5:
            lost.append(packer.pid)
            packer._forget()
        return images

    monkeypatch.setattr(Packer, "pack", pack_and_go)
    async with reclaiming(device) as packers:
        packer = packers.first
        for generation in range(6):
            await fill(device, 0, generation)
            await eventually(lambda: not device.reclaiming)
            for cluster in range(COUNT):
                assert device.read(cluster * CLUSTER, CLUSTER) == text(cluster, generation)
            await ready(packer)
        assert len(lost) == 5
        assert not device.integrity_errors


async def test_of_the_processes_that_have_sent_to_a_remote_the_first_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Device("small", MIB, Budget(MIB))
    made.write(0, random.Random(1).randbytes(CLUSTER))
    packers = Packers(most=2)
    pids = []
    for packer in packers:
        await ready(packer)
        with socket.socket() as line:
            packer.give_line(1, 0, bytes(32), line.fileno())
        unknown_line = WantedToSend(made, 0, made.words[0], 2, bytes(16), 1)
        assert await packer.send([unknown_line]) == [packing.FAILED]
        pids.append(packer.pid)
    monkeypatch.setattr(packer_module, "_IDLE_S", 0.0)
    await packers.end_idle()
    assert [packer.pid for packer in packers] == [pids[0], None]
    await packers.stop()
    made.close()


async def test_the_process_goes_last_in_its_session_and_its_session_among_others() -> None:
    async with started() as packer:
        assert packer.pid
        assert os.getpriority(os.PRIO_PROCESS, packer.pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 19)
        group = Path(f"/proc/{packer.pid}/autogroup")
        assert os.getsid(packer.pid) == packer.pid
        assert not group.exists() or group.read_text().endswith("nice 19\n")


async def test_the_process_loads_no_more_than_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = f"""open({str(tmp_path / "compress")!r}, "w").write(" ".join(sys.modules))
    import nbdram.memory.tiers.sending
    open({str(tmp_path / "send")!r}, "w").write(" ".join(sys.modules))
    serve("""
    monkeypatch.setattr(packer_module, "_PROGRAM", packer_module._PROGRAM.replace("serve(", look))
    async with started():
        to_compress, to_send = (set((tmp_path / name).read_text().split()) for name in ("compress", "send"))
    assert to_compress & {"site", "typing", "re", "pathlib", "dataclasses", "asyncio", "cryptography"} == set()
    assert to_send & {"site", "pathlib", "dataclasses", "asyncio", "secrets", "redis"} == set()
    assert "cryptography" in to_send


async def test_signals_to_all_of_a_group_do_not_end_the_process() -> None:
    async with started() as packer:
        assert packer.pid
        assert Path(f"/proc/{packer.pid}/comm").read_text() == "nbdram-compress\n"
        os.kill(packer.pid, signal.SIGTERM)
        os.kill(packer.pid, signal.SIGINT)
        made = Device("small", MIB, Budget(MIB))
        made.write(0, text(0))
        assert (await packer.pack([(made, 0, made.words[0])]))[0] > 0
        made.release_stray(0)
        made.close()


async def test_where_no_process_can_be_started_a_thread_compresses(
    device: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    async with reclaiming(device) as packers:
        packer = packers.first
        await fill(device, 0)
        assert not packer.is_ready
        assert device.cold_clusters > COUNT // 4
    assert caplog.text.count("no process can be started to compress in, a thread does it: No such file") == 1


async def test_a_server_that_is_killed_takes_the_process_with_it_and_the_directory_is_free(tmp_path: Path) -> None:
    arguments = ("--export", "ram=1G", "--memory", "192M", "--state-dir", str(tmp_path / "state"))
    (tmp_path / "sockets").mkdir()
    async with running(tmp_path / "sockets", *arguments) as server, await server.entered() as client:
        for at in range(0, 384 * MIB, MIB):
            await client.write(at, b"".join(text(at + n >> CLUSTER_SHIFT) for n in range(0, MIB, CLUSTER)))
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        await eventually(lambda: children.read_text().strip() != "")
        child = int(children.read_text())
        server.process.kill()
        await server.process.wait()
        await eventually(lambda: not Path(f"/proc/{child}").exists())
    async with running(tmp_path / "sockets", *arguments) as server, await server.entered() as client:
        for at in range(0, 384 * MIB, MIB):
            assert await client.read(at, CLUSTER) == text(at >> CLUSTER_SHIFT)
