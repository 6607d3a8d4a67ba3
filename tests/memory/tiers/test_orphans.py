"""`nbdram gc-remote` on a real cluster: what is whose, and what it removes."""

from pathlib import Path

import pytest

from nbdram.cli import main
from nbdram.memory.budget import Budget
from nbdram.memory.tiers.remote import DEVICE_PREFIX, Remote
from nbdram.server.exports import Exports
from tests.helpers import GIB, MIB
from tests.memory.tiers.redis_cluster import Cluster
from tests.memory.tiers.rigs import RemoteRig, remote_rig

Captured = pytest.CaptureFixture[str]


def url(servers: Cluster) -> str:
    return "redis://" + ",".join(node.address for node in servers.nodes)


def test_what_a_device_without_record_has_left_is_listed_and_removed(redis_cluster: Cluster, capsys: Captured) -> None:
    with remote_rig(Path(), redis_cluster) as rig:
        assert rig.first.remote
        assert rig.second.remote
        for at in range(50):
            rig.store(rig.first, at, 0, b"mine")
            rig.store(rig.second, at, 0, b"somebody's")
        dead, alive = rig.first.remote.identity, rig.second.remote.identity
        key = DEVICE_PREFIX + dead.hex.encode()
        redis_cluster.owner(key).call("DEL", key)  # as it expires when a server is gone
        assert main(["gc-remote", url(redis_cluster)]) == 0
        told = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
        assert told[str(dead)].split()[1] == "50"
        assert "nobody's" in told[str(dead)]
        assert "'second' on " in told[str(alive)]
        assert main(["gc-remote", url(redis_cluster), "--remove"]) == 0
        assert capsys.readouterr().out == f"removed 50 images of {dead}\n"
        assert rig.load(rig.second, 7, 0, 10) == b"somebody's"
        assert all(alive.hex.encode() in key for key in redis_cluster.keys("*"))
        assert main(["gc-remote", url(redis_cluster), "--remove", "--device", str(dead)]) == 1
        assert main(["gc-remote", url(redis_cluster), "--device", str(dead)]) == 2
        assert main(["gc-remote", url(redis_cluster), "--remove", "--device", str(alive)]) == 0
        assert redis_cluster.keys() == []


def test_what_can_not_be_dropped_at_once_is_dropped_later(
    redis_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbdram.memory.recovery import sweep_remote
    from nbdram.memory.tiers import remote

    with remote_rig(Path(), redis_cluster) as rig:
        tier = rig.first.remote
        assert tier
        for at in range(600):  # more than a page of generations
            rig.store(rig.first, at, at & 1, b"image")
        monkeypatch.setattr(remote, "_MOST_DROPS", 0)
        for at in range(600):
            rig.drop(rig.first, at, at & 1, 5)
        assert tier.put_off
        assert len(redis_cluster.keys("nbdram:image:*")) == 600
        monkeypatch.undo()
        rig.first.reclaiming.add(3)
        for _ in sweep_remote(rig.first):
            rig.settle()
        assert len(redis_cluster.keys("nbdram:image:*")) == 1
        assert tier.put_off, "one was being stored just now"
        rig.first.reclaiming.clear()
        for _ in sweep_remote(rig.first):
            rig.settle()
        assert redis_cluster.keys("nbdram:image:*") == []
        assert not tier.put_off
        assert rig.used_bytes() == tier.generations.allocated_bytes() == 0


def test_an_export_that_is_removed_takes_its_images_with_it(redis_cluster: Cluster) -> None:
    redis_cluster.empty()
    remote = Remote(redis_cluster.settings)
    exports = Exports(Budget(64 * MIB), remote=remote)
    rig = RemoteRig(exports, remote, redis_cluster)
    rig.store(rig.first, 1, 0, b"image")
    rig.store(rig.second, 1, 0, b"image")
    exports.dispose(exports.detach("first"))
    rig.wait_for_keys(2)  # the other one's image and record
    assert exports.create("first", GIB).device.remote
    exports.close()
    remote.close()
    assert redis_cluster.keys() == []
