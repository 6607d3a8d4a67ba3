"""`nbdram check` and `nbdram rm` of a state directory whose devices have images in a remote."""

from pathlib import Path

import pytest

from nbdram.cli import main
from nbdram.memory.budget import Budget
from nbdram.memory.layout import CLUSTER, Tier, cold_word
from nbdram.memory.statedir import StateDirectory
from nbdram.memory.tiers import engine
from nbdram.memory.tiers.remote import Remote
from nbdram.server.exports import Exports
from tests.helpers import GIB, MIB
from tests.memory.tiers.redis_cluster import Cluster
from tests.memory.tiers.test_orphans import url

Captured = pytest.CaptureFixture[str]
COUNT = 100  # more than are fetched at once
NOWHERE = "redis://127.0.0.1:1"


@pytest.fixture
def state(redis_cluster: Cluster, shm: Path) -> Path:
    """Of a server that is gone, with two devices, one of which has images in the remote, and one in RAM."""
    redis_cluster.empty()
    path = shm / "state"
    directory = StateDirectory(path)
    remote = Remote(redis_cluster.settings, directory.manifest.secret)
    exports = Exports(Budget(64 * MIB), state=directory, remote=remote)
    exports.create("other", GIB)
    device = exports.create("ram", GIB).device
    directory.use_remote(str(remote.settings))
    assert device.remote
    for at in range(COUNT):
        device.write(at * CLUSTER, b"%05d" % at * 13107 + b"!")
        device.remote.store(at, 0, bytes(device.hot_view[at * CLUSTER : (at + 1) * CLUSTER]))
        device.take_images(at, [cold_word(CLUSTER, 0, Tier.REMOTE)])
    device.write(COUNT * CLUSTER, b"resident")
    exports.close()
    remote.close()
    directory.close()
    return path


def images(servers: Cluster) -> list[bytes]:
    return servers.keys("nbdram:image:*")


def test_images_in_the_remote_are_checked_and_nothing_is_changed(
    redis_cluster: Cluster, state: Path, capsys: Captured
) -> None:
    before = sorted(redis_cluster.keys())
    assert main(["check", str(state)]) == 0
    told = capsys.readouterr().out
    assert "other: 1 GiB, 0 bytes resident" in told
    assert "6.2 MiB in a remote, 100 images" in told
    assert told.endswith("2 exports, all whole\n")
    assert sorted(redis_cluster.keys()) == before

    (gone,), (wrong,) = (
        [key for key in images(redis_cluster) if key.split(b":")[3] == number] for number in (b"7", b"40")
    )
    redis_cluster.owner(gone).call("DEL", gone)
    redis_cluster.owner(wrong).call("SETRANGE", wrong, 1000, b"other bytes")
    assert main(["check", str(state), "--swap", url(redis_cluster)]) == 1
    told = capsys.readouterr().out
    assert f"the data at offset {7 * CLUSTER} is lost: an image is missing in the remote" in told
    assert f"the data at offset {0x40 * CLUSTER} is lost: an image in the remote is not what was stored" in told
    assert told.count("is lost") == 2
    assert told.endswith("2 exports, damaged: ram\n")

    redis_cluster.empty()
    assert main(["check", str(state)]) == 1
    assert "has nothing of it, and 100 clusters need it" in capsys.readouterr().out


def test_a_remote_that_can_not_be_reached_leaves_its_images_unchecked(
    redis_cluster: Cluster, state: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_START_S", 0.2)
    assert main(["check", str(state), "--swap", NOWHERE]) == 1
    told = capsys.readouterr().out
    assert f"100 images in a remote are unchecked: can't use {NOWHERE} for swap: " in told
    assert told.endswith("all whole, as far as they could be checked: 100 images in a remote could not\n")

    generations = next(file for file in state.glob("*.remote") if file.stat().st_blocks)
    generations.unlink()
    assert main(["check", str(state)]) == 1
    assert f"{generations} is missing or too short, and there is data in a remote" in capsys.readouterr().out


def test_a_remote_that_goes_away_amid_a_check_is_not_taken_for_damage(
    redis_cluster: Cluster, state: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    for node in redis_cluster.masters:  # what nobody may read is not there for now
        node.call("ACL", "SETUSER", "default", "-get")
    monkeypatch.setattr(Remote, "knows", lambda *_: True)
    try:
        assert main(["check", str(state)]) == 1
    finally:
        for node in redis_cluster.masters:
            node.call("ACL", "SETUSER", "default", "+get")
    told = capsys.readouterr().out
    assert "100 images in a remote are unchecked: the remote says: this user has no permissions" in told.replace(
        "NOPERM ", ""
    )
    assert "is lost" not in told


def test_a_directory_that_is_removed_takes_its_images_with_it(
    redis_cluster: Cluster, state: Path, capsys: Captured
) -> None:
    assert main(["rm", f"{state}/"]) == 0
    assert capsys.readouterr().out == f"removed {state} with 2 exports\n"
    assert redis_cluster.keys() == []
    assert not state.exists()


def test_images_that_can_not_be_removed_are_told_of_with_the_command_that_does(
    redis_cluster: Cluster, state: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_START_S", 0.2)
    assert main(["rm", f"{state}/", "--swap", NOWHERE]) == 0
    told = capsys.readouterr().err
    assert told.startswith(f"nbdram: can't use {NOWHERE} for swap: ")
    assert not state.exists()
    command = told.partition("goes with: nbdram ")[2].replace(NOWHERE, url(redis_cluster)).split()
    assert len(images(redis_cluster)) == COUNT
    assert main(command) == 0
    assert images(redis_cluster) == []
