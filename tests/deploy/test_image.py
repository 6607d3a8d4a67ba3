"""The image, built from the Dockerfile and run as a sidecar: a container that has only a socket for its clients."""

import json
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import MIB

from .containers import IMAGE, PROGRAM, Box
from .systemd import seccomp_profile

pytestmark = pytest.mark.timeout(400)  # the first test builds

USER = 10809
URI = "nbd+unix:///scratch?socket=/run/nbd/nbdram.sock"
SERVE = ("serve", "--state-dir", "/state", "--export", "scratch=64M", "--log-format", "json")
SOCKETS = ("--listen", "unix:/run/nbd/nbdram.sock", "--control", "/run/nbd/nbdram.control")


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    """With our image in it."""
    with tempfile.TemporaryDirectory(prefix="nbdram-", dir="/dev/shm") as directory:
        box = Box(Path(directory))
        box.make_base()
        box.build()
        yield box
        box.remove_all()


@pytest.fixture
def volumes(box: Box, shm: Path) -> Iterator[list[str]]:
    """The state, on tmpfs as an emptyDir of medium Memory is, and the socket's directory."""
    mounts = []
    for name, place in (("state", "/state"), ("socket", "/run/nbd")):
        (shm / name).mkdir(mode=0o700)
        os.chown(shm / name, USER, USER)
        mounts.append(f"{shm / name}:{place}")
    yield mounts
    box.podman("rm", "--all", "--force", "--time=0", ok=False)


def stats(box: Box) -> Any:
    asked = box.podman("exec", "server", PROGRAM, "stats", "--json", "--control", "/run/nbd/nbdram.control")
    return json.loads(asked.stdout)


def test_a_sidecar_that_is_killed_and_started_again_has_its_data(box: Box, volumes: list[str], tmp_path: Path) -> None:
    content = random.Random(1).randbytes(8 * MIB) + b"compresses well" * MIB
    (tmp_path / "original").write_bytes(content)
    tmp_path.chmod(0o777)
    files = [volumes[1], f"{tmp_path}:/files"]
    filtered = tmp_path / "filter.json"  # the system calls that the systemd unit allows are enough
    filtered.write_text(seccomp_profile("nbdram.service"))
    options = [f"--volume={volume}" for volume in volumes] + [f"--security-opt=seccomp={filtered}"]
    box.start("server", "--memory=256m", *options, command=[*SERVE, *SOCKETS])
    box.healthy("server")
    assert stats(box)["budget"]["limit"] == 128 * MIB, "half of what the control group allows"
    box.beside("nbdcopy", "--flush", "/files/original", URI, volumes=files)

    box.podman("kill", "--signal=KILL", "server")
    box.podman("wait", "server")
    box.podman("start", "server")
    box.healthy("server")
    assert stats(box)["budget"]["limit"] == 128 * MIB
    box.beside("nbdcopy", URI, "/files/copy", volumes=files)
    copy = (tmp_path / "copy").read_bytes()
    assert copy[: len(content)] == content
    assert not any(copy[len(content) :])

    box.podman("stop", "--time=60", "server")
    assert box.podman("inspect", "--format={{.State.ExitCode}}", "server").stdout == "0\n", box.logs("server")


def test_the_image_serves_as_it_is_and_has_neither_a_shell_nor_privileges(box: Box, volumes: list[str]) -> None:
    box.start("server", *(f"--volume={volume}" for volume in volumes))
    box.healthy("server")
    assert [export["name"] for export in stats(box)["exports"]] == ["ram"]
    shell = box.podman("exec", "server", "/bin/sh", "-c", "true", ok=False)
    assert "no such file or directory" in shell.stderr
    (image,) = json.loads(box.podman("inspect", IMAGE).stdout)
    assert image["User"] == f"{USER}:{USER}"
    assert image["Healthcheck"]["Test"] == ["CMD", PROGRAM, "health"]
