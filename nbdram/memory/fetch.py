"""Major faults: images that must be read from disk, in worker threads, one read per image however many wait."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from nbdram.memory.codec import IntegrityError
from nbdram.memory.device import Device, FarPage, Image, Images, Piece
from nbdram.memory.histogram import Histogram
from nbdram.memory.layout import CLUSTER_SHIFT, LENGTH_SHIFT
from nbdram.memory.recent import Recent

_READERS: Final = 4


class Fetcher:
    """Reads images for all devices of a server."""

    def __init__(self) -> None:
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="nbdram-fetch")
        self._under_way: dict[tuple[Device, int, int], asyncio.Future[bytes]] = {}
        self.fetched = 0
        self.times = Recent()
        self.seconds = Histogram()

    async def gather(self, device: Device, start: int, end: int) -> list[Piece]:
        """What `Device.gather` gives, with everything that is on disk fetched. OSError as the disk gave it."""
        images: Images = {}
        while True:
            try:
                return device.gather(start, end, images)
            except FarPage:
                clusters = device.far_clusters(start, end)
                fetched = await asyncio.gather(*(self.fetch(device, cluster) for cluster in clusters))
                images = dict(zip(clusters, fetched, strict=True))

    async def fetch_edges(self, device: Device, start: int, end: int) -> None:
        """Make the pages resident that a write of [start, end) covers only in part; ENOSPC if there is no room."""
        for page in device.edge_pages(start, end):
            cluster = page >> CLUSTER_SHIFT
            if cluster in device.far_clusters(page, page + 1):
                device.install(page, await self.fetch(device, cluster))

    async def fetch(self, device: Device, cluster: int) -> Image:
        """The image of a cluster; (0, b"") if it is gone from the disk by the time it was read."""
        word = device.word(cluster)
        key = (device, cluster, word >> LENGTH_SHIFT)
        under_way = self._under_way.get(key)
        if under_way is None:
            loop = asyncio.get_running_loop()
            under_way = loop.run_in_executor(self._readers, device.load_image, cluster, word)
            self._under_way[key] = under_way
            under_way.add_done_callback(lambda _: self._under_way.pop(key))
        begun = time.perf_counter()
        try:
            image = await asyncio.shield(under_way)
        except OSError as error:
            if device.word(cluster) >> LENGTH_SHIFT == word >> LENGTH_SHIFT:
                if isinstance(error, IntegrityError):
                    device.note_damage(cluster, error)
                raise
            return 0, b""
        self.fetched += 1
        device.disk_faults += 1
        seconds = time.perf_counter() - begun
        self.times.add(seconds)
        self.seconds.observe(seconds)
        return word, image

    def close(self) -> None:
        self._readers.shutdown()
