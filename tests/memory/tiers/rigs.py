"""The tiers as the contract suite sees them: under a device, and with a way to damage what they hold."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from nbdram.memory.budget import Budget
from nbdram.memory.device import Device
from nbdram.memory.layout import SEAL_BYTES, Tier
from nbdram.memory.tiers.disk import SwapArea
from nbdram.memory.tiers.ram import MappedRamTier
from nbdram.memory.tiers.remote import Remote
from nbdram.server.exports import Exports
from tests.helpers import GIB, MIB, PAGE
from tests.memory.tiers.redis_cluster import Cluster, until


class Rig(Protocol):
    """One tier of two devices, "first" and "second"."""

    tier: Tier
    first: Device
    second: Device

    def store(self, device: Device, cluster: int, slot: int, image: bytes) -> None:
        """Blocks until the image is there."""

    def load(self, device: Device, cluster: int, slot: int, length: int) -> bytes: ...

    def drop(self, device: Device, cluster: int, slot: int, length: int) -> None:
        """Blocks until the image is gone."""

    def used_bytes(self) -> int:
        """What the kernel says that the tier of both devices takes; block maps of the file system not counted."""

    def flip_a_bit(self, device: Device, cluster: int, slot: int) -> None:
        """Behind the tier's back, in the middle of an image."""


class RamRig:
    tier = Tier.RAM

    def __init__(self, exports: Exports) -> None:
        self.first = exports.create("first", GIB).device
        self.second = exports.create("second", GIB).device

    def store(self, device: Device, cluster: int, slot: int, image: bytes) -> None:
        device.ram.store(cluster, slot, [image[:5], image[5:]])

    def load(self, device: Device, cluster: int, slot: int, length: int) -> bytes:
        return bytes(device.ram.load(cluster, slot, length))

    def drop(self, device: Device, cluster: int, slot: int, length: int) -> None:
        device.ram.drop(cluster, slot, length)

    def used_bytes(self) -> int:
        return self.first.ram.allocated_bytes() + self.second.ram.allocated_bytes()

    def flip_a_bit(self, device: Device, cluster: int, slot: int) -> None:
        _flip(device.ram.fd, (2 * cluster + slot) * 65536 + 1000)


class MappedRamRig(RamRig):
    """As the process that compresses stores it."""

    def store(self, device: Device, cluster: int, slot: int, image: bytes) -> None:
        ram = MappedRamTier(device.ram.fd)
        ram.store(cluster, slot, [image[:5], image[5:]])
        ram.close()


class DiskRig:
    tier = Tier.DISK

    def __init__(self, exports: Exports, area: SwapArea) -> None:
        self.area = area
        self.first = exports.create("first", GIB).device
        self.second = exports.create("second", GIB).device

    def store(self, device: Device, cluster: int, slot: int, image: bytes) -> None:
        assert device.disk
        device.disk.writer.submit(device.disk.store, cluster, slot, image).result()

    def load(self, device: Device, cluster: int, slot: int, length: int) -> bytes:
        assert device.disk
        return device.disk.load(cluster, slot, length)

    def drop(self, device: Device, cluster: int, slot: int, length: int) -> None:
        assert device.disk
        device.disk.drop(cluster, slot, length)
        device.disk.writer.submit(int).result()  # it comes after

    def used_bytes(self) -> int:
        used = sum(_data_bytes(fd) for fd in swap_files(self.area.path))
        assert self.area.used_bytes == used, "the tier counts something else"
        return used

    def flip_a_bit(self, device: Device, cluster: int, slot: int) -> None:
        files = sorted(swap_files(self.area.path))
        _flip(files[0 if device is self.first else 1], (2 * cluster + slot) * (65536 + PAGE) + 1000)


class RemoteRig:
    tier = Tier.REMOTE

    def __init__(self, exports: Exports, remote: Remote, servers: Cluster) -> None:
        self.remote = remote
        self.servers = servers
        self.first = exports.create("first", GIB).device
        self.second = exports.create("second", GIB).device

    def store(self, device: Device, cluster: int, slot: int, image: bytes) -> None:
        assert device.remote
        device.remote.store(cluster, slot, image)

    def load(self, device: Device, cluster: int, slot: int, length: int) -> bytes:
        assert device.remote
        return device.remote.load(cluster, slot, length)

    def drop(self, device: Device, cluster: int, slot: int, length: int) -> None:
        assert device.remote
        device.remote.drop(cluster, slot, length)
        self.settle()

    def settle(self) -> None:
        """Until nothing is to be dropped any more."""
        until(lambda: not self.remote.drops_waiting, "images are not dropped")

    def wait_for_keys(self, count: int) -> None:
        until(lambda: len(self.servers.keys()) == count, "images are not removed")

    def used_bytes(self) -> int:
        lengths = [self.servers.owner(key).call("STRLEN", key) for key in self.servers.keys("nbdram:image:*")]
        assert self.remote.used_bytes == sum(-(-(length - SEAL_BYTES) // PAGE) * PAGE for length in lengths)
        return sum(lengths)

    def value(self, key: bytes) -> bytes:
        found: bytes = self.servers.owner(key).call("GET", key)
        return found

    def put(self, key: bytes, value: bytes) -> None:
        self.servers.owner(key).call("SET", key, value)

    def key(self, device: Device, cluster: int) -> bytes:
        """Of the only image of a cluster."""
        assert device.remote
        (key,) = self.servers.keys(f"nbdram:image:{device.remote.identity.hex}:{cluster:x}:*")
        return key

    def flip_a_bit(self, device: Device, cluster: int, slot: int) -> None:
        key = self.key(device, cluster)
        node = self.servers.owner(key)
        byte = node.call("GETRANGE", key, 1000, 1000)
        node.call("SETRANGE", key, 1000, bytes((byte[0] ^ 1,)))


@contextmanager
def ram_rig(_: Path, __: None, kind: type[RamRig] = RamRig) -> Iterator[Rig]:
    exports = Exports(Budget(64 * MIB))
    try:
        yield kind(exports)
    finally:
        exports.close()


@contextmanager
def disk_rig(directory: Path, _: None) -> Iterator[Rig]:
    with ExitStack() as stack:
        area = SwapArea(directory / "swap", 0)
        stack.callback(area.close)
        exports = Exports(Budget(64 * MIB), [area])
        stack.callback(exports.close)
        yield DiskRig(exports, area)


@contextmanager
def remote_rig(_: Path, servers: Cluster, **wanted: Any) -> Iterator["RemoteRig"]:
    with ExitStack() as stack:
        servers.empty()
        remote = Remote(replace(servers.settings, **wanted))
        stack.callback(remote.close)
        exports = Exports(Budget(64 * MIB), remote=remote)
        stack.callback(exports.close)
        yield RemoteRig(exports, remote, servers)


RIGS: dict[str, Callable[..., AbstractContextManager[Rig]]] = {
    "ram": ram_rig,
    "ram, mapped": partial(ram_rig, kind=MappedRamRig),
    "disk": disk_rig,
    "remote": remote_rig,
}


def swap_files(directory: Path, process: str | int = "self") -> list[int]:
    """The descriptors of a process's open files in a swap directory, except its lock."""
    found = []
    for entry in os.listdir(f"/proc/{process}/fd"):
        try:
            target = os.readlink(f"/proc/{process}/fd/{entry}")
        except FileNotFoundError:
            continue
        if target.startswith(str(directory) + "/") and not target.endswith("/lock"):
            found.append(int(entry))
    return found


def _data_bytes(fd: int) -> int:
    """The pages of a sparse file that hold data."""
    at = total = 0
    size = os.fstat(fd).st_size
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # no more data
            break
        end = os.lseek(fd, at, os.SEEK_HOLE)
        total += -(-end // PAGE) * PAGE - at
        at = end
    return total


def _flip(fd: int, offset: int) -> None:
    byte = os.pread(fd, 1, offset)
    os.pwrite(fd, bytes((byte[0] ^ 1,)), offset)
