"""`nbdram resize --grow-fs` where there is nothing to grow, or what can't be."""

from pathlib import Path

import pytest

from nbdram import cli
from nbdram.cli import resize
from nbdram.client import attachment, growing
from nbdram.client.mount_notes import MountNote, Place
from nbdram.client.mountinfo import Mounted
from nbdram.errors import NbdramError
from nbdram.observe.control import default_path


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachment, "runtime_directory", lambda: tmp_path)


def test_without_a_keeper_no_device_has_grown() -> None:
    assert growing.tell_kernel("some-identity", 1 << 30) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["work"], (Place("work").control.name, "work")),
        (["work", "--control", "/x/own"], ("own", "work")),
        (["other"], (default_path().name, "other")),
    ],
)
def test_a_server_that_was_named_comes_before_a_mount_of_that_name(
    monkeypatch: pytest.MonkeyPatch, words: list[str], expected: tuple[str, str]
) -> None:
    Place("work").make()
    Place("work").write(MountNote("work", "/x", "nbd+unix:///work", server=("serve",)))
    asked: list[tuple[str, str]] = []

    def resized(control: Path, name: str, size: int, *, shrink: bool) -> dict[str, object]:
        asked.append((control.name, name))
        return {"name": name, "size": size, "identity": ""}

    monkeypatch.setattr(resize, "resize", resized)
    assert cli.main(["resize", words[0], "1G", *words[1:]]) == 0
    assert asked == [expected]


def test_where_nothing_is_mounted_nothing_is_resized(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["resize", str(tmp_path), "1G"]) == 1
    assert "has mounted anything at" in capsys.readouterr().err


def test_what_is_not_mounted_here_can_not_be_grown() -> None:
    with pytest.raises(NbdramError, match="no file system of it is mounted on this host"):
        growing.grow_file_systems([])


def test_a_device_that_stays_as_it_is_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [{"device": "/dev/nbd99999", "identity": "one"}, {"device": "/dev/nbd3", "identity": "other"}]
    monkeypatch.setattr(growing, "ask_if_running", lambda *_: {"devices": devices})
    monkeypatch.setattr(growing, "_TIMEOUT_S", 0.05)
    with pytest.raises(NbdramError, match="/dev/nbd99999 has not grown to 1 GiB"):
        growing.tell_kernel("one", 1 << 30)


def test_a_file_system_that_we_know_nothing_of_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "mounts", lambda: [Mounted("/dev/nbd3", Path("/x"), "reiserfs", 0)])
    with pytest.raises(NbdramError, match="nbdram can't grow reiserfs at /x"):
        growing.grow_file_systems([3])
