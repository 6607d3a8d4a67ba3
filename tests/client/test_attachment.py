"""The notes that a keeper leaves for the next one."""

from pathlib import Path

import pytest

from nbdram.client import sysfs
from nbdram.client.attachment import Attachment, Notes

KEPT = Attachment("nbd://host/disk", index=3, connections=4, size=1 << 20, flags=0x16D, identity="one", server=["x"])


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /sys/block with nbd3, connected as `KEPT` says."""
    monkeypatch.setattr(sysfs, "SYSTEM", tmp_path / "sys")
    device = tmp_path / "sys/nbd3"
    device.mkdir(parents=True)
    (device / "pid").write_text("1\n")
    (device / "backend").write_text("nbdram:nbd://host/disk\n")
    (device / "size").write_text(f"{(1 << 20) // 512}\n")
    return device


def test_what_was_noted_is_found_again(system: Path, tmp_path: Path) -> None:
    notes = Notes(tmp_path)
    notes.write(KEPT)
    assert notes.find() == [KEPT]


def test_a_device_without_a_note_is_known_by_its_identifier(system: Path, tmp_path: Path) -> None:
    assert Notes(tmp_path).find() == [Attachment("nbd://host/disk", index=3, size=1 << 20)]


def test_the_size_is_the_kernels(system: Path, tmp_path: Path) -> None:
    notes = Notes(tmp_path)
    notes.write(KEPT)
    (system / "size").write_text("4096\n")
    assert notes.find()[0].size == 2 << 20


@pytest.mark.parametrize("identifier", ["", "nbd://host/disk", "nbdram:nonsense"])
def test_devices_of_others_are_left_alone(system: Path, tmp_path: Path, identifier: str) -> None:
    (system / "backend").write_text(identifier)
    assert Notes(tmp_path).find() == []


def test_a_note_of_a_device_that_is_gone_or_is_another_now_is_not_followed(system: Path, tmp_path: Path) -> None:
    notes = Notes(tmp_path)
    notes.write(KEPT)
    (system / "backend").write_text("somebody's")
    assert notes.find() == []
    (system / "pid").unlink()
    assert notes.find() == []


def test_a_spoilt_note_is_like_none(system: Path, tmp_path: Path) -> None:
    (tmp_path / "nbd3.json").write_text('{"uri": 1')
    assert Notes(tmp_path).find() == [Attachment("nbd://host/disk", index=3, size=1 << 20)]
