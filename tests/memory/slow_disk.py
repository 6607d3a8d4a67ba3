"""A disk that is as slow as a test wants."""

import asyncio
import threading

import pytest

from nbdram.memory.device import Device
from nbdram.memory.layout import Tier, cold_word
from tests.helpers import CLUSTER


class SlowDisk:
    """A device on a disk that reads when it is let, and that fails if it is told to."""

    def __init__(self, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
        assert device.disk
        self.device = device
        self.loads = 0
        self.may_go = threading.Event()
        self.may_go.set()
        self.after_reading = True  # it waits with the old bytes in its hands, else before it reads
        self.error: OSError | None = None
        self._load = device.disk.load
        monkeypatch.setattr(device.disk, "load", self._slow_load)
        self.load_now = device.disk.load_now
        monkeypatch.setattr(device.disk, "load_now", lambda *_: None)

    def _slow_load(self, cluster: int, slot: int, length: int) -> bytes:
        self.loads += 1
        if self.error:
            self.may_go.wait(10)
            raise self.error
        image = self._load(cluster, slot, length) if self.after_reading else b""
        self.may_go.wait(10)
        return image or self._load(cluster, slot, length)

    def put(self, cluster: int, content: bytes) -> None:
        """Write a cluster that does not compress, and let it go to disk, into the first slot."""
        self.device.write(cluster * CLUSTER, content)
        assert self.device.disk
        self.device.disk.writer.submit(self.device.disk.store, cluster, 0, content).result()
        self.device.take_images(cluster, [cold_word(CLUSTER, 0, Tier.DISK)])


async def begun(slow: SlowDisk, loads: int) -> None:
    while slow.loads < loads:
        await asyncio.sleep(0.001)
