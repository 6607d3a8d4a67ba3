"""State directories and recovery: what is refused, what is rebuilt, what is given back."""

import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from nbdram.errors import NbdramError
from nbdram.memory.backing import allocated_bytes
from nbdram.memory.budget import Budget
from nbdram.memory.device import Device
from nbdram.memory.incoming import Incoming
from nbdram.memory.layout import LENGTH_SHIFT, Reference, Tier, cold_word
from nbdram.memory.recovery import _Words, punch_stray_pages, recount, sweep
from nbdram.memory.statedir import MANIFEST, StateDirectory, StoredDevice, _checksum
from nbdram.memory.tiers.disk import DiskTier, SwapArea
from nbdram.memory.tiers.ram import image_pages
from tests.helpers import CLUSTER, GIB, MIB, PAGE, TIB, hot_pages, index_pages
from tests.memory.evicting import evict

SIZE = 64 * MIB
PAGES = 10_000


@pytest.fixture(autouse=True)
def _no_file_stays_open() -> Iterator[None]:
    before = os.listdir("/proc/self/fd")
    yield
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.fixture
def path(shm: Path) -> Path:
    return shm / "state"


def make(path: Path, size: int = SIZE) -> tuple[StateDirectory, Device, UUID]:
    """A directory with one device in it, called "disk"."""
    state, identity = StateDirectory(path), uuid4()
    state.begin(identity)
    device = Device("disk", size, Budget(PAGES * PAGE), None, state.opener(identity, new=True))
    state.put(StoredDevice(identity, "disk", size))
    return state, device, identity


def leave(state: StateDirectory, device: Device) -> None:
    """The end of the process: nothing of it is tidied up, but the kernel takes its maps and locks."""
    device.close()
    state.close()


@contextmanager
def taken_up(path: Path, budget_pages: int = PAGES) -> Iterator[Device]:
    """The directory's only device, as the next process finds it."""
    state = StateDirectory(path, make=False)
    (stored,) = state.manifest.devices.values()
    device = Device(stored.name, stored.size, Budget(budget_pages * PAGE), None, state.opener(stored.identity))
    try:
        recount(device, "index")
        punch_stray_pages(device)
        yield device
    finally:
        leave(state, device)


def counts(device: Device) -> tuple[int, ...]:
    return (
        device.resident_pages,
        device.cold_pages,
        device.cold_clusters,
        device.index_pages,
        device.stored_bytes,
        device.budget.free_pages,
    )


# -- what is there again -----------------------------------------------------------------------------


def test_a_device_that_is_taken_up_reads_and_counts_as_before(path: Path) -> None:
    state, device, _ = make(path)
    content = random.Random(1)
    for cluster in range(0, SIZE // CLUSTER, 37):
        device.write(cluster * CLUSTER, content.randbytes(64) * content.randrange(1, 1024))
        if cluster % 2:
            evict(device, cluster)
        if cluster % 3 == 0:
            device.write(cluster * CLUSTER + PAGE, b"newer than the image")
    before, counted = device.read(0, SIZE), counts(device)
    leave(state, device)
    with taken_up(path) as device:
        assert counts(device) == counted
        assert device.read(0, SIZE) == before
        assert hot_pages(device) == device.resident_pages


def test_words_at_both_ends_of_a_large_device_are_found(path: Path) -> None:
    state, device, _ = make(path, TIB)
    for offset in (0, TIB // 2, TIB - PAGE):
        device.write(offset, b"here")
    leave(state, device)
    with taken_up(path) as device:
        assert [device.read(offset, 4) for offset in (0, TIB // 2, TIB - PAGE)] == [b"here"] * 3
        assert (device.resident_pages, device.index_pages) == (3, 3)


def test_reference_bytes_say_idle_cold_and_hole_again(path: Path) -> None:
    state, device, _ = make(path)
    device.write(0, b"resident")
    device.write(CLUSTER, b"cold")
    evict(device, 1)
    leave(state, device)
    with taken_up(path) as device:
        assert device.references[:3] == bytes((Reference.IDLE, Reference.COLD, Reference.HOLE))


def test_a_smaller_budget_than_what_is_there_is_overdrawn(path: Path) -> None:
    state, device, _ = make(path)
    device.write(0, b"x" * MIB)
    leave(state, device)
    with taken_up(path, budget_pages=100) as device:
        assert device.budget.free_pages == 100 - 256 - 1
        with pytest.raises(OSError, match="used up"):
            device.write(2 * MIB, b"more")


def legal_word(content: random.Random) -> int:
    resident = content.choice([0, 0xFFFF, content.getrandbits(16)])
    length = content.choice([0, 1, 4095, 4096, 4097, 57344, CLUSTER, content.randrange(1, 57344)])
    if not length:
        return resident * 0x10001
    tier = content.choice([Tier.RAM, Tier.DISK])
    slot = content.randrange(2 if tier == Tier.RAM else 256)
    return resident | (resident & content.getrandbits(16)) << 16 | cold_word(length, slot, tier)


def test_sums_over_many_words_are_those_of_each() -> None:
    content = random.Random(7)
    words = [content.choice([0, legal_word(content)]) for _ in range(4096)]
    many = _Words(b"".join(word.to_bytes(8, "little") for word in words))
    assert many.make_sense()
    assert many.resident_pages() == sum((word & 0xFFFF).bit_count() for word in words)
    for tier in (Tier.RAM, Tier.DISK):
        lengths = [word >> LENGTH_SHIFT & 0x1FFFF for word in words if word >> 50 & 7 == tier]
        assert many.images(tier) == (len(lengths), sum(map(image_pages, lengths)))
    kinds = {0: Reference.HOLE, Tier.RAM: Reference.COLD, Tier.DISK: Reference.FAR}
    assert list(many.references()) == [Reference.IDLE if word & 0xFFFF else kinds[word >> 50 & 7] for word in words]


@pytest.mark.parametrize(
    "word",
    [
        1 << 16,  # dirty, but not resident
        1 << 52,  # a bit that means nothing
        1 << 63,
        cold_word(0, 0, Tier.RAM),  # an image of no bytes
        cold_word(100, 0, 0),  # an image in no tier
        cold_word(100, 0, Tier.RESIDENT),
        cold_word(CLUSTER + 1, 0, Tier.RAM),
        1 << 49,  # a slot without an image
        cold_word(100, 2, Tier.RAM),  # further on, where there is no disk
    ],
)
def test_a_word_that_makes_no_sense_is_refused(path: Path, word: int) -> None:
    state, device, _ = make(path)
    device.write(5 * CLUSTER, b"data")
    device.words[6] = word
    leave(state, device)
    with pytest.raises(NbdramError, match="no sense"), taken_up(path):
        pass


def test_a_word_behind_the_end_is_refused(path: Path) -> None:
    state, device, _ = make(path)
    device.words[SIZE // CLUSTER] = 0x10001
    leave(state, device)
    with pytest.raises(NbdramError, match="behind the end"), taken_up(path):
        pass


# -- what is left over -------------------------------------------------------------------------------


def test_pages_without_a_bit_are_given_back_before_anybody_writes_beside_them(path: Path) -> None:
    state, device, _ = make(path)
    device.write(0, b"a" * CLUSTER)
    device.write(CLUSTER + PAGE, b"b" * PAGE)
    for stray in (CLUSTER, CLUSTER + 3 * PAGE, 40 * MIB):
        device.hot[stray : stray + PAGE] = b"!" * PAGE
    leave(state, device)
    with taken_up(path) as device:
        assert hot_pages(device) == device.resident_pages == 17
        device.write(CLUSTER + 7, b"c")
        assert device.read(CLUSTER, PAGE) == bytes(7) + b"c" + bytes(PAGE - 8)
        assert device.read(40 * MIB, PAGE) == bytes(PAGE)


def test_an_index_page_without_words_is_given_back(path: Path) -> None:
    state, device, _ = make(path)
    device.words[0] = 0
    device.words[SIZE // CLUSTER // 2] = 0
    leave(state, device)
    with taken_up(path) as device:
        assert index_pages(device) == device.index_pages == 0


def test_images_without_a_word_are_swept_and_others_are_not(path: Path) -> None:
    state, device, _ = make(path)
    for cluster in (3, 4):
        device.write(cluster * CLUSTER, b"%d" % cluster * CLUSTER)
        evict(device, cluster)
    device.ram.store(3, 1, [b"never became true"])
    os.pwrite(device.backing.cold_fd, b"!" * PAGE, 8 * CLUSTER + 2 * PAGE)  # behind the image of cluster 4
    device.ram.store(700, 0, [b"!" * CLUSTER])
    leave(state, device)
    with taken_up(path) as device:
        free = device.budget.free_pages
        for _ in sweep(device):
            pass
        assert allocated_bytes(device.backing.cold_fd) == device.cold_pages * PAGE == 2 * PAGE
        assert device.budget.free_pages == free
        assert device.read(3 * CLUSTER, 2 * CLUSTER) == b"3" * CLUSTER + b"4" * CLUSTER


def test_a_slot_that_is_being_stored_into_is_not_swept(path: Path) -> None:
    state, device, _ = make(path)
    device.reclaiming.add(9)
    device.ram.store(9, 0, [b"on its way"])
    for _ in sweep(device):
        pass
    assert allocated_bytes(device.backing.cold_fd) == PAGE
    leave(state, device)


def test_swap_files_survive_under_their_name_and_stray_slots_are_punched(path: Path, tmp_path: Path) -> None:
    state, device, identity = make(path)
    with ThreadPoolExecutor(1) as writer:
        area = SwapArea(tmp_path / "swap", 0, state.manifest.secret)
        disk = device.disk = DiskTier([area], writer, identity, kept=True)
        device.write(0, b"far" * 100)
        image = b"".join(device.codec.encode(memoryview(device.hot)[:CLUSTER]) or ())
        disk.store(0, 1, image)
        device.take_images(0, [cold_word(len(image), 1, Tier.DISK)])
        disk.store(0, 0, b"never became true")
        area.close()
        leave(state, device)
    with taken_up(path) as device, ThreadPoolExecutor(1) as writer:
        state_again = json.loads((path / MANIFEST).read_text())
        area = SwapArea(tmp_path / "swap", 0, bytes.fromhex(state_again["secret"]))
        device.disk = DiskTier([area], writer, identity, kept=True)
        assert (device.disk_clusters, device.disk_pages) == (1, 1)
        for _ in sweep(device):
            pass
        assert device.read(0, 300) == b"far" * 100
        writer.submit(lambda: None).result()
        assert area.used_bytes == allocated_bytes(device.disk.files[0]) == PAGE
        area.close()


def test_an_image_is_found_in_the_area_where_it_was_put_and_what_is_in_its_own_is_punched(
    path: Path, tmp_path: Path
) -> None:
    state, device, identity = make(path)
    areas = [SwapArea(tmp_path / name, 0, state.manifest.secret) for name in ("one", "other")]
    with ThreadPoolExecutor(1) as writer:
        disk = device.disk = DiskTier(areas, writer, identity, kept=True)
        areas[0].refused(OSError("full"))
        assert (disk.place(0), disk.place(1)) == (1, 0)
        device.write(0, b"far" * 100)
        image = b"".join(device.codec.encode(memoryview(device.hot)[:CLUSTER]) or ())
        disk.store(0, 3, image)
        device.take_images(0, [cold_word(len(image), 3, Tier.DISK)])
        disk.store(0, 1, b"never became true")
        leave(state, device)
    with taken_up(path) as device, ThreadPoolExecutor(1) as writer:
        disk = device.disk = DiskTier(areas, writer, identity, kept=True)
        for _ in sweep(device):
            pass
        assert device.read(0, 300) == b"far" * 100
        writer.submit(lambda: None).result()
        assert [area.used_bytes for area in areas] == [allocated_bytes(fd) for fd in disk.files] == [0, PAGE]
    for area in areas:
        area.close()


def test_images_of_two_starts_are_sealed_with_different_keys(tmp_path: Path) -> None:
    secret = os.urandom(32)
    sealed = []
    for _ in range(2):
        area = SwapArea(tmp_path / "swap", 0, secret)
        sealed.append(area.seal(b"the same", b"label"))
        for image in sealed:
            assert area.open_sealed(image, b"label") == b"the same"
        area.close()
    assert sealed[0][:16] != sealed[1][:16]
    assert sealed[0][16:28] == sealed[1][16:28] == (1).to_bytes(12, "big")


@pytest.mark.parametrize("length", [10, 2 * CLUSTER])
def test_a_clean_page_is_dirty_before_a_write_changes_it(path: Path, length: int) -> None:
    """Else a crash in between would leave a page that is dropped later, and turns back into the old one."""
    state, device, _ = make(path)
    device.write(0, b"old" * 1000)
    evict(device, 0)
    for _ in range(3):
        device.read(0, 3000)
    assert device.words[0] & 0x10001 == 1, "the page is not clean and resident"
    incoming = Incoming(device, 0, length, memoryview(bytearray(CLUSTER)))
    incoming.write(memoryview(b"newer"))  # and the process ends here
    assert device.words[0] & 0x10001 == 0x10001
    device.incoming.clear()
    leave(state, device)
    with taken_up(path) as device:
        evict(device, 0)
        assert device.read(0, 5) == b"newer"


# -- growing -----------------------------------------------------------------------------------------


def test_a_device_grows_under_its_readers_and_is_taken_up_larger(path: Path) -> None:
    state, device, identity = make(path)
    device.write(SIZE - PAGE, b"at the old end")
    view = device.hot_view[SIZE - PAGE : SIZE]
    device.resize(4 * GIB)
    device.write(4 * GIB - PAGE, b"at the new end")
    device.write(SIZE - PAGE, b"AT")
    assert bytes(view[:14]) == b"AT the old end"
    del view
    state.put(StoredDevice(identity, "disk", 4 * GIB))
    leave(state, device)
    with taken_up(path) as device:
        assert device.size == 4 * GIB
        assert device.read(4 * GIB - PAGE, 14) == b"at the new end"


def test_a_device_grows_after_paging_and_pages_go_on(path: Path) -> None:
    state, device, _ = make(path)
    device.write(SIZE - CLUSTER, b"old" * 1000)
    evict(device, SIZE // CLUSTER - 1)
    device.resize(2 * SIZE)
    device.write(2 * SIZE - CLUSTER, b"new" * 1000)
    evict(device, 2 * SIZE // CLUSTER - 1)
    assert device.read(SIZE - CLUSTER, 3000) == b"old" * 1000
    assert device.read(2 * SIZE - CLUSTER, 3000) == b"new" * 1000
    assert device.last_cluster() == 2 * SIZE // CLUSTER - 1
    leave(state, device)


# -- what is refused, and stays as it is -------------------------------------------------------------


def listing(path: Path) -> dict[str, tuple[int, bytes]]:
    """All files of a directory, with the beginnings of their contents."""
    return {
        file.name: (file.stat().st_size, file.read_bytes() if file.stat().st_size < MIB else b"")
        for file in path.iterdir()
    }


def refused(path: Path, *, make: bool = True) -> str:
    """Why a directory is not opened; it must stay as it is."""
    before = listing(path)
    with pytest.raises(NbdramError) as refusal:
        StateDirectory(path, make=make)
    assert listing(path) == before
    return str(refusal.value)


def kept(path: Path) -> UUID:
    """A directory with a device in it, that nobody uses."""
    state, device, identity = make(path)
    leave(state, device)
    return identity


def test_a_newer_format_is_refused(path: Path) -> None:
    kept(path)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"format": 3, "more": "of it"}))
    assert "newer nbdram (format 3, this one knows 2)" in refused(path)


def test_an_older_format_is_read_and_is_ours_when_it_was_taken_up(path: Path) -> None:
    identity = kept(path)
    body = json.loads((path / MANIFEST).read_text())
    del body["checksum"]
    body["format"] = 1
    older = json.dumps(body | {"checksum": _checksum(body)})
    (path / MANIFEST).write_text(older)
    state = StateDirectory(path)
    assert list(state.manifest.devices) == [identity]
    assert (path / MANIFEST).read_text() == older
    state.sweep()
    state.close()
    assert json.loads((path / MANIFEST).read_text())["format"] == 2


@pytest.mark.parametrize("length", [0, 1, 100, 300])
def test_a_truncated_manifest_is_refused(path: Path, length: int) -> None:
    kept(path)
    os.truncate(path / MANIFEST, length)
    assert f"{path / MANIFEST} is damaged" in refused(path)


def test_any_damaged_character_of_the_manifest_is_noticed(path: Path) -> None:
    kept(path)
    text = (path / MANIFEST).read_text()
    content = random.Random(3)
    for at in content.sample([at for at, character in enumerate(text) if not character.isspace()], 40):
        (path / MANIFEST).write_text(text[:at] + ("x" if text[at] != "x" else "y") + text[at + 1 :])
        assert MANIFEST in refused(path)


def test_a_missing_manifest_beside_device_files_is_refused(path: Path) -> None:
    kept(path)
    (path / MANIFEST).unlink()
    assert f"{path / MANIFEST} is missing" in refused(path)


@pytest.mark.parametrize("kind", ["hot", "cold", "index"])
def test_a_file_that_is_missing_or_too_short_is_named(path: Path, kind: str) -> None:
    file = path / f"{kept(path)}.{kind}"
    os.truncate(file, 2 * MIB)
    assert str(file) in refused(path)
    file.unlink()
    assert str(file) in refused(path)


def test_a_directory_of_somebody_else_is_not_touched(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("do not lose this")
    assert "not empty (there is thesis.tex)" in refused(path)


def test_a_file_in_place_of_the_directory_is_refused(path: Path) -> None:
    path.write_text("a file")
    with pytest.raises(NbdramError, match=r"can't use .*: it is not a directory"):
        StateDirectory(path)


def test_a_directory_in_use_is_refused(path: Path) -> None:
    state, device, _ = make(path)
    assert "in use by another server" in refused(path)
    leave(state, device)


def test_a_directory_that_does_not_exist_is_not_made_to_be_checked(path: Path) -> None:
    with pytest.raises(NbdramError, match="No such file"):
        StateDirectory(path, make=False)
    assert not path.exists()


# -- devices that come and go ------------------------------------------------------------------------


def test_a_device_that_was_never_finished_is_swept_at_the_next_start(path: Path) -> None:
    state = StateDirectory(path)
    identity = uuid4()
    state.begin(identity)
    os.close(state.opener(identity, new=True)("hot", SIZE))
    state.close()
    state = StateDirectory(path)
    state.sweep()
    assert os.listdir(path) == [MANIFEST]
    state.close()


def test_a_removed_device_is_swept_and_other_files_are_not(path: Path, tmp_path: Path) -> None:
    state, device, identity = make(path)
    state.use_swap([tmp_path])
    (path / "notes.txt").touch()
    stranger = path / f"{uuid4()}.hot"
    stranger.touch()
    (tmp_path / f"{identity}.swap").touch()
    (tmp_path / f"{uuid4()}.swap").touch()
    state.forget(identity)
    state.sweep()
    assert set(os.listdir(path)) == {MANIFEST, "notes.txt", stranger.name}
    assert len(os.listdir(tmp_path)) == 1
    leave(state, device)


def test_a_manifest_is_kept_from_others(path: Path) -> None:
    kept(path)
    assert path.stat().st_mode & 0o777 == 0o700
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in path.iterdir())
