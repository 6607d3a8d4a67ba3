"""How the process that compresses stores images: the server does not wait for it, a full file system kills nobody."""

import errno
import os
from pathlib import Path

import pytest

from nbdram.memory.tiers import ram
from nbdram.memory.tiers.ram import MappedRamTier
from tests.helpers import CLUSTER, MIB, PAGE
from tests.memory.tiers.mounts import mounted

IMAGE = [b"head", b"i" * (5 * PAGE)]


def test_the_file_is_not_written_to_which_would_keep_the_server_from_punching_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "cold").open("w+b") as file:
        file.truncate(MIB)
        monkeypatch.setattr(os, "pwritev", None)
        tier = MappedRamTier(file.fileno())
        tier.store(3, 1, IMAGE)
        tier.close()
        assert os.pread(file.fileno(), MIB, 7 * CLUSTER).rstrip(b"\0") == b"".join(IMAGE)


def test_a_kernel_that_can_t_promise_pages_has_the_file_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ram, "_MADV_POPULATE_WRITE", 1000)
    with (tmp_path / "cold").open("w+b") as file:
        file.truncate(MIB)
        tier = MappedRamTier(file.fileno())
        tier.store(0, 0, IMAGE)
        assert tier.fetch(0, 0, 6 * PAGE).rstrip(b"\0") == b"".join(IMAGE)
        tier.close()


def test_a_full_file_system_is_enospc_and_keeps_nothing_of_the_image(tmp_path: Path) -> None:
    with mounted(tmp_path, "tmpfs", "size=1m") as point, (point / "cold").open("w+b") as file:
        file.truncate(MIB)
        tier = MappedRamTier(file.fileno())
        tier.store(0, 0, IMAGE)
        before = tier.allocated_bytes()
        with (point / "other").open("wb", buffering=0) as other:
            while os.statvfs(point).f_bavail > 3:
                other.write(bytes(PAGE))
        with pytest.raises(OSError, match="No space") as refused:
            tier.store(1, 0, IMAGE)
        assert refused.value.errno == errno.ENOSPC
        assert tier.allocated_bytes() == before
        assert tier.fetch(0, 0, 6 * PAGE).rstrip(b"\0") == b"".join(IMAGE)
        (point / "other").unlink()
        tier.store(1, 0, IMAGE)
        assert tier.fetch(1, 0, 6 * PAGE).rstrip(b"\0") == b"".join(IMAGE)
        tier.close()
