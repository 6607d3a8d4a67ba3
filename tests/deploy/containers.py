"""Images and containers of a test's own: buildah and podman with storage in a directory that goes with the test."""

import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.observe.tools import tool

ROOT: Final = Path(__file__).parents[2]
BASE: Final = "localhost/base"
IMAGE: Final = "localhost/nbdram"
PROGRAM: Final = "nbdram"
PATIENCE_S: Final = 60.0

# Podman's defaults for them take a privilege to set that not every machine gives us.
_LIMITS: Final = ("--ulimit", "nofile=20000:20000", "--ulimit", "nproc=1000:1000")
# What a sidecar is to run with.
LOCKED: Final = ("--read-only", "--read-only-tmpfs=false", "--cap-drop", "all", "--security-opt", "no-new-privileges")


@dataclass(frozen=True)
class Box:
    """Container storage below `directory`, which is best on tmpfs: files are copied a lot, and synced."""

    directory: Path

    def podman(self, *arguments: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
        apart = [f"--tmpdir={self.directory}/libpod", "--cgroup-manager=cgroupfs", "--runtime=runc"]
        return self._run("podman", *self._storage, *apart, *arguments, ok=ok)

    @property
    def _storage(self) -> list[str]:
        return ["--root", f"{self.directory}/root", "--runroot", f"{self.directory}/run", "--storage-driver", "vfs"]

    def _run(self, program: str, *arguments: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
        settings = self.directory / "containers.conf"
        settings.write_text('[engine]\nlock_type = "file"\n')  # else every podman of this host shares one set of locks
        environment = {**os.environ, "TMPDIR": str(self.directory), "CONTAINERS_CONF": str(settings)}
        command = [tool(program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
        assert not ok or done.returncode == 0, f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        return done

    def make_base(self) -> None:
        """The image that ours is built on, from Debian's packages: a stand-in for the one of a registry."""
        archive = self.directory / "base.tar"
        options = ["--quiet", "--variant=apt", '--aptopt=Acquire::Languages "none"', "--include=python3-venv"]
        self._run("mmdebstrap", *options, "bookworm", str(archive))
        self.podman("import", "--quiet", str(archive), BASE)
        archive.unlink()

    def build(self) -> None:
        """Our image, from deploy/Dockerfile, with libraries that were fetched before."""
        wheels = self.directory / "wheels"
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"], "wheel"]
        # By Debian's own Python, which is the image's: some libraries ask for others, depending on its version.
        for_debian = ["--python=/usr/bin/python3", "download", "--quiet", "--only-binary=:all:", f"--dest={wheels}"]
        self._run(sys.executable, "-m", "pip", *for_debian, *wanted)
        arguments = {"BASE": BASE, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels"}
        options = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
        options += ["--isolation", "chroot", "--format", "docker", "--pull-never", "--volume", f"{wheels}:/wheels:ro"]
        options += ["--ignorefile", str(ROOT / "deploy/Dockerfile.dockerignore")]
        file = str(ROOT / "deploy/Dockerfile")
        self._run("buildah", *self._storage, "bud", *options, "-f", file, "-t", IMAGE, str(ROOT))

    def start(self, name: str, *options: str, command: Sequence[str] = ()) -> None:
        """Our image as a sidecar, without a network."""
        self.podman("run", "--detach", "--name", name, "--network=none", *_LIMITS, *LOCKED, *options, IMAGE, *command)

    def beside(self, *command: str, volumes: Sequence[str]) -> str:
        """Run a program of this host in another container, as the user that the socket belongs to; what it prints."""
        shared = [f"--volume={volume}" for volume in ("/usr:/usr:ro", *volumes)]
        options = ["--network=none", "--user=10809:10809", "--cap-drop=all", *_LIMITS, *shared]
        return self.podman("run", *options, BASE, *command).stdout

    def healthy(self, name: str) -> None:
        """Wait until the image's own health check succeeds."""
        deadline = time.monotonic() + PATIENCE_S
        while (check := self.podman("healthcheck", "run", name, ok=False)).returncode:
            assert time.monotonic() < deadline, check.stdout + check.stderr + self.logs(name)
            time.sleep(0.1)

    def logs(self, name: str) -> str:
        answer = self.podman("logs", name, ok=False)
        return answer.stdout + answer.stderr

    def remove_all(self) -> None:
        self.podman("rm", "--all", "--force", "--time=0", ok=False)
        self.podman("rmi", "--all", "--force", ok=False)
