"""Major faults: images that must be read from disk or a remote, one read per image however many wait.

What the kernel has in its page cache is read from disk at once, the rest in worker threads of ours: a hop to one and
back takes longer than all else together. A remote has its own.
"""

import asyncio
import errno
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from nbdram.memory.codec import IntegrityError
from nbdram.memory.device import Device, FarPage, Images, Piece
from nbdram.memory.histogram import Histogram
from nbdram.memory.holding import Holding, Turns
from nbdram.memory.layout import (
    CLUSTER_SHIFT,
    LENGTH_MASK,
    LENGTH_SHIFT,
    RAM,
    SLOT_SHIFT,
    TIER_MASK,
    TIER_SHIFT,
    Tier,
    far_slot,
)
from nbdram.memory.mailbox import Mailbox, Told
from nbdram.memory.readahead import KEPT
from nbdram.memory.recent import Recent
from nbdram.memory.space import FarImage

_DISK: Final = int(Tier.DISK)
_READERS: Final = 4
_TURNS: Final = 6
_SHORT_TURNS: Final = 24


Came = Callable[[OSError | None], None]


class Fetcher:
    """Reads images for all devices of a server."""

    def __init__(self) -> None:
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="nbdram-fetch")
        self._mailbox = Mailbox()
        # What is being read, for whom, and who waits for it: they are told of an error, if there was one.
        self._under_way: dict[FarImage, tuple[Device, list[Came]]] = {}
        # What is read is held in memory until it is sent: who reads much takes one of these for each part.
        self.turns = Turns(_TURNS)
        self.short_turns = Turns(_SHORT_TURNS)  # for reads within one cluster
        self.holding = Holding()
        self._kept: deque[FarImage] = deque(maxlen=KEPT)  # what was read ahead, until it is the oldest
        self.fetched = 0
        self.times = Recent()
        self.seconds = Histogram()
        self.fetched_from_remote = 0
        self.remote_times = Recent()
        self.remote_seconds = Histogram()

    async def gather(self, device: Device, start: int, end: int) -> list[Piece]:
        """What `Device.gather` gives, with what is not in RAM fetched. OSError as the disk or the remote gave it."""
        while True:
            clusters = device.far_clusters(start, end)
            images: Images
            if len(clusters) == 1:
                images = {clusters[0]: await self.fetch(device, clusters[0])}
            else:
                fetched = await asyncio.gather(*(self.fetch(device, cluster) for cluster in clusters))
                images = dict(zip(clusters, fetched, strict=True))
            try:
                return device.gather(start, end, images)
            except FarPage:  # what was fetched is not the cluster's any more
                continue

    def at_hand(self, device: Device, start: int, end: int) -> Images | None:
        """The images that `Device.gather` needs, if each has been read already, or can be without waiting."""
        images: Images = {}
        for cluster in device.far_clusters(start, end):
            image = device.far_images.get(cluster)
            if image is None:
                word = device.words[cluster]
                if word >> TIER_SHIFT & TIER_MASK != _DISK or (image := self._read_now(device, cluster, word)) is None:
                    return None
            if not image.content:
                return None
            images[cluster] = image
        return images

    async def check(self, device: Device, start: int, end: int) -> None:
        """OSError if [start, end) can't be read now: a disk that fails, a damaged image."""
        for cluster in device.check_images(start, end):
            await self.fetch(device, cluster)

    async def fetch_edges(self, device: Device, start: int, end: int) -> None:
        """Make the pages resident that a write of [start, end) covers only in part; ENOSPC if there is no room."""
        for page in device.edge_pages(start, end):
            cluster = page >> CLUSTER_SHIFT
            if cluster in device.far_clusters(page, page + 1):
                device.install(page, await self.fetch(device, cluster))

    async def fetch(self, device: Device, cluster: int) -> FarImage:
        """The image of a cluster, not current if it is gone from there by the time it was read."""
        image = self._begin(device, cluster)
        reading = self._under_way.get(image)
        if reading is not None:
            waiter: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()
            reading[1].append(lambda error: None if waiter.done() else waiter.set_result(error))
            error = await waiter
            if error is not None and image.is_current:
                if isinstance(error, IntegrityError):
                    device.note_damage(cluster, error)
                raise error.with_traceback(None)  # they all get this one, and each would add to where it has been
        return image

    def tell(self, device: Device, cluster: int, came: Came) -> FarImage | None:
        """The image of a cluster, which is not there before `came` is called; None if it need not be waited for."""
        image = self._begin(device, cluster)
        reading = self._under_way.get(image)
        if reading is None:
            return None
        reading[1].append(came)
        return image

    def fetch_ahead(self, device: Device, cluster: int) -> None:
        """Begin to read an image that will probably be wanted soon, if it is on disk or in a remote."""
        image = self._begin(device, cluster)
        if image.is_current and image not in self._kept:
            self._kept.append(image)

    def _begin(self, device: Device, cluster: int) -> FarImage:
        """The image of a cluster, which is being read if it was not there yet; not current if there is none to read."""
        image = device.far_images.get(cluster)
        if image is None:
            image = FarImage()
            word = device.word(cluster)
            tier = word >> TIER_SHIFT & TIER_MASK
            if tier <= RAM:
                image.is_current = False
                return image
            if tier == _DISK and (there := self._read_now(device, cluster, word)):
                return there
            device.far_images[cluster] = image
            self._read(device, cluster, word, image)
        return image

    def _read_now(self, device: Device, cluster: int, word: int) -> FarImage | None:
        """The image on disk that a word points at, if that has not to be waited for."""
        begun = time.perf_counter()
        assert device.disk
        content = device.disk.load_now(cluster, far_slot(word), word >> LENGTH_SHIFT & LENGTH_MASK)
        if content is None:
            return None
        image = device.far_images[cluster] = FarImage()
        image.content = content
        self._count(device, time.perf_counter() - begun, from_remote=False)
        return image

    def _read(self, device: Device, cluster: int, word: int, image: FarImage) -> None:
        begun = time.perf_counter()
        from_remote = word >> TIER_SHIFT & TIER_MASK != _DISK
        waiters: list[Came] = []
        self._under_way[image] = device, waiters

        def told(content: bytes, error: OSError | None) -> None:
            del self._under_way[image]
            if error is None:
                image.content = content
            elif device.far_images.get(cluster) is image:  # whoever comes next reads it again
                del device.far_images[cluster]
            self._count(device, time.perf_counter() - begun, from_remote=from_remote)
            for came in waiters:
                came(error)

        slot, length = word >> SLOT_SHIFT & 1, word >> LENGTH_SHIFT & LENGTH_MASK
        if from_remote:
            assert device.remote
            device.budget.may_have_grown(length)  # it is received where there is room already
            device.remote.ask(cluster, slot, length, self._mailbox.callback(told), on_loop=True)
        else:
            device.budget.may_have_grown(2 * length)  # sealed, and open
            self._readers.submit(_load, device, cluster, word, self._mailbox.callback(told))

    def _count(self, device: Device, seconds: float, *, from_remote: bool) -> None:
        if from_remote:
            self.fetched_from_remote += 1
            device.remote_faults += 1
            self.remote_times.add(seconds)
            self.remote_seconds.observe(seconds)
        else:
            self.fetched += 1
            device.disk_faults += 1
            self.times.add(seconds)
            self.seconds.observe(seconds)

    def is_reading(self, device: Device) -> bool:
        """Whether a worker looks at a device's files just now."""
        return any(reader is device for reader, _ in self._under_way.values())

    def close(self) -> None:
        self._readers.shutdown()


def _load(device: Device, cluster: int, word: int, tell: Told[bytes]) -> None:
    try:
        image = device.load_image(cluster, word)
    except Exception as error:
        tell(b"", error if isinstance(error, OSError) else OSError(errno.EIO, repr(error)))
    else:
        tell(image, None)
