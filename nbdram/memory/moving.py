"""Keeps disks below their share where a remote comes after them: their coldest images move on.

Rules:

1. An image is cold if nobody has read it since the clock's hand went by; one that was is left alone, this time.
2. Order, as in reclaim: stored in the remote and acknowledged there, then the word, then the disk's slot dropped. If
   the cluster was touched meanwhile, or its word changed, what was stored is dropped.
3. A batch at a time, and none while the remote takes nothing: then images stay on the disk, and what finds no room
   there goes to the remote right from RAM, when it can.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from nbdram.memory.clock import Clock
from nbdram.memory.device import Device
from nbdram.memory.layout import LENGTH_MASK, LENGTH_SHIFT, Reference, Tier, cold_word, far_slot
from nbdram.memory.mailbox import Mailbox
from nbdram.memory.reclaim import ReclaimCounters

log = logging.getLogger("nbdram.reclaim")

_LOOK_S: Final = 0.25
_BATCH: Final = 16
# Of what may be stored on a disk: moving begins above the first, and ends below the second.
_BEGIN_SHARE: Final = 0.9
_END_SHARE: Final = 0.85
_AGES: Final[dict[int, int]] = {Reference.FAR_TOUCHED: Reference.FAR, Reference.FAR_TWICE: Reference.FAR}
_HOPELESS_ROUNDS: Final = 2  # of the hand: one ages what was read, one takes it


@dataclass(slots=True)
class _Job:
    device: Device
    cluster: int
    word: int
    storing: "Future[None] | None" = None  # in the remote

    @property
    def length(self) -> int:
        return self.word >> LENGTH_SHIFT & LENGTH_MASK


class Mover:
    """Watches the disks of the devices that `devices()` returns."""

    def __init__(self, devices: Callable[[], Sequence[Device]], counters: ReclaimCounters) -> None:
        self._devices = devices
        self._counters = counters
        self._clock = Clock(Reference.FAR, ages=_AGES)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="nbdram-move")
        self._mailbox = Mailbox()
        self._ending = False
        self._surprise: type[Exception] | None = None  # the last that was logged
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """A batch that is under way is seen to its end."""
        self._ending = True
        if self._task:
            await self._task
        self._reader.shutdown()

    async def _run(self) -> None:
        while not self._ending:
            try:
                await self._relieve()
            except Exception as error:
                if type(error) is not self._surprise:
                    log.exception("reclaim had an error and goes on: %r", error)
                self._surprise = type(error)
            await asyncio.sleep(_LOOK_S)

    async def _relieve(self) -> None:
        """Move images on until no disk is above its share, or nothing more can be moved."""
        full = self._full(_BEGIN_SHARE)
        rounds = 0
        while full and rounds < _HOPELESS_ROUNDS and not self._ending:
            jobs, came_round = self._pick(full)
            rounds += came_round
            if jobs:
                await self._move(jobs)
                rounds = 0
            full &= self._full(_END_SHARE)
            await asyncio.sleep(0)

    def _full(self, share: float) -> set[int]:
        """Which disks have more than this share of what they may have; none if there is nowhere to go from there."""
        for device in self._devices():
            if device.disk and device.remote and not device.remote_first and device.remote.has_room():
                areas = device.disk.areas  # the same for all
                return {n for n, area in enumerate(areas) if area.used_bytes > share * area.size_bytes()}
        return set()

    def _pick(self, full: set[int]) -> tuple[list[_Job], bool]:
        """The next victims, and whether the hand came round."""
        victims, came_round = self._clock.take(self._devices(), _BATCH)
        jobs = []
        for device, cluster in victims:
            assert device.disk
            word = device.words[cluster]
            if device.disk.number(cluster, far_slot(word)) in full and cluster not in device.reclaiming:
                device.reclaiming.add(cluster)
                jobs.append(_Job(device, cluster, word))
        return jobs, came_round

    async def _move(self, jobs: list[_Job]) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._reader, _submit, jobs)
            waiting = [(job, self._mailbox.future(job.storing)) for job in jobs if job.storing]
            stored = await asyncio.gather(*(storing for _, storing in waiting), return_exceptions=True)
        finally:
            for job in jobs:
                job.device.reclaiming.discard(job.cluster)
        for (job, _), outcome in zip(waiting, stored, strict=True):
            if outcome is None:
                self._settle(job)
        disk = jobs[0].device.disk
        if disk:  # its writer drops in its turn what has moved: only then it is known what is left
            await self._mailbox.future(disk.writer.submit(_nothing))

    def _settle(self, job: _Job) -> None:
        """The image is in the remote: let the cluster live from there, if nobody has touched it meanwhile."""
        device, cluster = job.device, job.cluster
        image = cold_word(job.length, 0, Tier.REMOTE)
        if device.references[cluster] == Reference.FAR and device.words[cluster] == job.word:
            device.take_images(cluster, [image])
            self._counters.moved_on += 1
        else:
            device.discard_image(cluster, image)
            self._counters.thrown_away += 1


def _submit(jobs: list[_Job]) -> None:
    """In a worker thread: read the images of a batch, and send them off."""
    for job in jobs:
        device = job.device
        assert device.remote
        if not device.remote.has_room():
            return
        try:
            image = device.load_image(job.cluster, job.word)
        except OSError as error:  # it stays where it is, for its reader to find out
            log.debug("%s: cluster %d can't be moved on: %s", device.name, job.cluster, error)
            continue
        job.storing = device.remote.submit(job.cluster, 0, image)


def _nothing() -> None:
    pass
