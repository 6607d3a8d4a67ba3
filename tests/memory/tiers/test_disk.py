"""The disk tier on real file systems that are missing, full, read-only, faulty, or changed by others."""

import errno
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from nbdram.errors import NbdramError
from nbdram.memory.budget import Budget
from nbdram.memory.codec import IntegrityError
from nbdram.memory.tiers import disk
from nbdram.memory.tiers.disk import SwapArea
from nbdram.server.exports import Exports
from tests.helpers import CLUSTER, GIB, MIB, PAGE, TIB
from tests.memory.tiers.mounts import mounted
from tests.memory.tiers.rigs import DiskRig, swap_files

NOISE = random.Random(1).randbytes(CLUSTER)
SLOT_BYTES = CLUSTER + PAGE


@contextmanager
def disk_rig(directory: Path, max_bytes: int = 0) -> Iterator[DiskRig]:
    area = SwapArea(directory, max_bytes)
    exports = Exports(Budget(64 * MIB), [area])
    try:
        yield DiskRig(exports, area)
    finally:
        exports.close()
        area.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[DiskRig]:
    with disk_rig(tmp_path / "swap") as made:
        yield made


# -- at the start ------------------------------------------------------------------------------------


def test_a_directory_is_made_but_not_its_parents(tmp_path: Path) -> None:
    SwapArea(tmp_path / "new", 0).close()
    with pytest.raises(NbdramError, match=r"can't use .*/no/swap for swap: there is no .*/no: mount or make it$"):
        SwapArea(tmp_path / "no/swap", 0)


def test_a_file_is_no_swap_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", Path("/dev/null")):
        with pytest.raises(NbdramError, match=f"can't use {path} for swap: it is not a directory, name one"):
            SwapArea(path, 0)


def test_a_read_only_file_system_is_refused(tmp_path: Path) -> None:
    message = r"can't use .* for swap: Read-only file system"
    with mounted(tmp_path, "tmpfs", "ro") as point, pytest.raises(NbdramError, match=message):
        SwapArea(point, 0)


def test_a_directory_that_one_may_not_write_is_refused(tmp_path: Path) -> None:
    """As a user without privileges: root may write everywhere."""
    code = (
        "import os, sys; from pathlib import Path; from nbdram.memory.tiers import disk, seal\n"
        "os.chdir(sys.argv[1]); os.setgid(65534); os.setuid(65534); disk.SwapArea(Path('.'), 0)"
    )
    tmp_path.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert "NbdramError: can't use . for swap: Permission denied" in done.stderr


def test_a_file_system_that_cannot_punch_is_refused(tmp_path: Path) -> None:
    message = "no sparse files that can be punched: use one on ext4, xfs or btrfs"
    with mounted(tmp_path, "ramfs") as point, pytest.raises(NbdramError, match=message):
        SwapArea(point, 0)


def test_swap_on_tmpfs_is_used_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with mounted(tmp_path, "tmpfs") as point:
        SwapArea(point, 0).close()
    assert "is on tmpfs: what is swapped there stays in RAM" in caplog.text


def test_a_directory_that_another_server_uses_is_refused_until_that_has_ended(tmp_path: Path) -> None:
    first = SwapArea(tmp_path, 0)
    with pytest.raises(NbdramError, match="is in use by another server: give each its own directory"):
        SwapArea(tmp_path, 0)
    first.close()
    SwapArea(tmp_path, 0).close()


def test_an_export_that_is_too_large_for_the_files_of_the_file_system_is_refused(tmp_path: Path) -> None:
    with mounted(tmp_path, "ext4", size_bytes=32 * MIB) as point:
        area = SwapArea(point, 0)
        exports = Exports(Budget(64 * MIB), [area])
        exports.create("small", TIB)
        with pytest.raises(NbdramError, match="too small files for an export of 65536 GiB"):
            exports.create("huge", 64 * TIB)
        exports.close()
        area.close()


# -- while running -----------------------------------------------------------------------------------


def test_nothing_readable_is_on_the_disk_and_nothing_is_left_behind(tmp_path: Path) -> None:
    with disk_rig(tmp_path / "swap") as rig:
        rig.store(rig.first, 0, 0, b"a very secret thing " * 3000)
        (fd,) = (fd for fd in swap_files(rig.area.path) if os.fstat(fd).st_blocks)
        on_disk = os.pread(fd, SLOT_BYTES, 0)
        assert len(on_disk) > 60000
        assert b"secret" not in on_disk
    assert [path.name for path in (tmp_path / "swap").iterdir()] == ["lock"]


def test_the_same_image_is_never_sealed_the_same_way_twice(rig: DiskRig) -> None:
    assert len({rig.area.seal(b"image", b"identity") for _ in range(1000)}) == 1000


def test_an_image_in_the_place_of_another_is_refused(rig: DiskRig) -> None:
    for device in (rig.first, rig.second):
        for cluster in (0, 1):
            for slot in (0, 1):
                rig.store(device, cluster, slot, NOISE)
    first, second = sorted(swap_files(rig.area.path))
    good = os.pread(first, SLOT_BYTES, 0)
    for fd, place in ((first, 1), (first, 2), (second, 0)):
        os.pwrite(fd, good, place * SLOT_BYTES)
    for device, cluster, slot in ((rig.first, 0, 1), (rig.first, 1, 0), (rig.second, 0, 0)):
        with pytest.raises(IntegrityError):
            rig.load(device, cluster, slot, CLUSTER)
    assert rig.load(rig.first, 0, 0, CLUSTER) == NOISE


def test_a_full_disk_refuses_an_image_says_so_once_and_keeps_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with mounted(tmp_path, "ext4", size_bytes=8 * MIB) as point, disk_rig(point) as rig:
        stored = 0
        while not rig.area.failing:
            with suppress(OSError):
                rig.store(rig.first, stored, 0, NOISE)
                stored += 1
        assert not rig.area.has_room()
        for cluster in range(stored, stored + 5):
            with pytest.raises(OSError, match="No space left"):
                rig.store(rig.first, cluster, 0, NOISE)
        assert caplog.text.count("can't write swap: No space left on device") == 1
        assert all(rig.load(rig.first, cluster, 0, CLUSTER) == NOISE for cluster in range(stored))
        for cluster in range(10):
            rig.drop(rig.first, cluster, 0, CLUSTER)
        assert rig.area.has_room()
        rig.store(rig.first, 0, 1, NOISE)
        assert not rig.area.failing
        assert rig.used_bytes() == (stored - 10 + 1) * SLOT_BYTES


def fill_up(path: Path) -> None:
    """Write a file until its file system has no block left: what it still finds after a flush, too."""
    with path.open("wb", buffering=0) as file:
        for block in (256 * 1024, 4096, 4096):
            with suppress(OSError):
                while True:
                    file.write(bytes(block))
                    os.fsync(file.fileno())


def test_a_disk_that_others_have_filled_is_asked_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mounted(tmp_path, "ext4", size_bytes=8 * MIB) as point, disk_rig(point) as rig:
        filler = point / "filler"
        fill_up(filler)
        with pytest.raises(OSError, match="No space left"):
            rig.store(rig.first, 0, 0, NOISE)
        filler.unlink()
        assert not rig.area.has_room()
        monkeypatch.setattr(disk, "_RETRY_S", 0.0)
        rig.area.refused(OSError(errno.ENOSPC, "still"))
        assert rig.area.has_room()
        rig.store(rig.first, 0, 0, NOISE)
        assert not rig.area.failing


def test_no_more_is_stored_than_was_allowed(tmp_path: Path) -> None:
    with disk_rig(tmp_path / "swap", max_bytes=3 * SLOT_BYTES) as rig:
        for cluster in range(3):
            assert rig.area.has_room()
            rig.store(rig.first, cluster, 0, NOISE)
        assert not rig.area.has_room()
        rig.drop(rig.first, 1, 0, CLUSTER)
        assert rig.area.has_room()


def test_a_file_that_others_have_cut_off_is_an_error_and_can_be_used_again(rig: DiskRig) -> None:
    for cluster in (1, 2):
        rig.store(rig.first, cluster, 0, NOISE)
    with open(f"/proc/self/fd/{sorted(swap_files(rig.area.path))[0]}", "r+b") as file:
        file.truncate(3 * SLOT_BYTES)
    assert rig.load(rig.first, 1, 0, CLUSTER) == NOISE
    with pytest.raises(OSError, match="short read"):
        rig.load(rig.first, 2, 0, CLUSTER)
    rig.store(rig.first, 2, 1, NOISE)
    assert rig.load(rig.first, 2, 1, CLUSTER) == NOISE


@pytest.mark.parametrize("failures", [1, 2])
@pytest.mark.parametrize("how", ["error", "short", "damaged"])
def test_a_read_that_fails_once_is_repeated_and_one_that_fails_twice_is_an_error(
    rig: DiskRig, monkeypatch: pytest.MonkeyPatch, how: str, failures: int
) -> None:
    rig.store(rig.first, 0, 0, NOISE)
    messages = {"error": "Input/output error", "short": "short read", "damaged": "not what was stored"}
    reads = []

    def pread(fd: int, length: int, offset: int) -> bytes:
        reads.append(offset)
        if len(reads) > failures:
            return real(fd, length, offset)
        if how == "error":
            raise OSError(errno.EIO, "Input/output error")
        content = real(fd, length, offset)
        return content[:-1] + (b"" if how == "short" else bytes((content[-1] ^ 1,)))

    real = os.pread
    monkeypatch.setattr(os, "pread", pread)
    if failures == 1:
        assert rig.load(rig.first, 0, 0, CLUSTER) == NOISE
    else:
        with pytest.raises(IntegrityError if how == "damaged" else OSError, match=messages[how]) as caught:
            rig.load(rig.first, 0, 0, CLUSTER)
        assert caught.value.errno == errno.EIO
    assert len(reads) == 2


def test_closing_a_device_gives_its_part_of_the_area_back(tmp_path: Path) -> None:
    area = SwapArea(tmp_path, 0)
    exports = Exports(Budget(64 * MIB), [area])
    rig = DiskRig(exports, area)
    for cluster in range(100):
        rig.store(rig.first, 1000 * cluster % (GIB // CLUSTER), 0, NOISE)
    exports.close()
    assert area.used_bytes == 0
    area.close()
