"""Keeps memory within its budget: cold clusters are compressed, and their pages given back.

Runs on the event loop in small steps; only compression itself is done by worker threads, a batch at a time
(lz4 gives the interpreter lock away). Rules:

1. A victim is idle: its reference byte says so before it is compressed. Reads and writes always set it to touched;
   if that happened by the time the image is there, or the word changed, the image is thrown away.
2. Order: image stored in the free slot, word changed, `hot` punched, old slot dropped.
3. Clusters that hold no byte newer than their image need no compression: they are just punched.
4. Clusters of zeros become holes. Clusters that hardly compress are left alone until they are touched again.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from nbdram.memory.budget import Budget
from nbdram.memory.clock import Clock
from nbdram.memory.codec import INCOMPRESSIBLE_BYTES
from nbdram.memory.device import Device
from nbdram.memory.layout import (
    CLUSTER,
    CLUSTER_SHIFT,
    DIRTY_SHIFT,
    LENGTH_SHIFT,
    PAGE,
    RESIDENT,
    SLOT_SHIFT,
    Reference,
    page_runs,
)

log = logging.getLogger("nbdram.reclaim")

BATCH: Final = 16
_BATCHES_AT_WORK: Final = 2
_MEASURE_S: Final = 0.25
_VERDICT_S: Final = 0.25  # how long "there is nothing left" is believed
# After this many rounds of the clock's hand without a page freed there is nothing left to reclaim: one ages what
# was touched, one takes it.
_HOPELESS_ROUNDS: Final = 3

_ZEROS: Final = 0
_STUCK: Final = -1


class ReclaimCounters:
    """What reclaim has done, in clusters."""

    def __init__(self) -> None:
        self.compressed = 0
        self.dropped_clean = 0
        self.zeros = 0
        self.incompressible = 0
        self.thrown_away = 0
        self.refaults = 0
        self.integrity_errors = 0


@dataclass(slots=True)
class _Job:
    device: Device
    cluster: int
    word: int
    slot: int
    length: int = 0  # of the image that was stored, or _ZEROS or _STUCK


class Reclaimer:
    """Watches one budget over the devices that `devices()` returns."""

    def __init__(self, budget: Budget, devices: Callable[[], Sequence[Device]]) -> None:
        self.counters = ReclaimCounters()
        self._budget = budget
        self._devices = devices
        self._clock = Clock(Reference.IDLE, ages=True)
        self._workers = ThreadPoolExecutor(1, thread_name_prefix="nbdram-compress")
        self._wanted = asyncio.Event()
        self._complained = False
        self._tasks: list[asyncio.Task[None]] = []
        self._at_work: set[asyncio.Future[list[_Job]]] = set()

    def start(self) -> None:
        self._measure()
        self._budget.attach(self._wanted.set)
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._watch())]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._at_work:
            await asyncio.wait(self._at_work)
        self._workers.shutdown()

    async def _watch(self) -> None:
        """What the process itself takes counts too."""
        while True:
            await asyncio.sleep(_MEASURE_S)
            self._measure()
            if self._budget.free_pages < self._budget.wake_below:
                self._wanted.set()

    def _measure(self) -> None:
        self._budget.set_overhead(anonymous_bytes() // PAGE)

    async def _run(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            if await self._balance():
                self._complained = False
                self._budget.freed()
                continue
            if not self._complained:
                log.warning("the memory budget is used up, and nothing more can be compressed")
            self._complained = True
            self._budget.hopeful = False  # those who wait, and those who come now, get ENOSPC
            self._budget.freed()
            await asyncio.sleep(_VERDICT_S)
            self._budget.hopeful = True

    async def _balance(self) -> bool:
        """Reclaim until enough is free; False if there is nothing left that could be."""
        budget = self._budget
        rounds = 0
        while budget.free_pages < budget.stop_above:
            before = budget.free_pages
            jobs, came_round = self._pick()
            if jobs:
                self._submit(jobs)
            while len(self._at_work) >= (_BATCHES_AT_WORK if jobs else 1):
                await self._collect()
            if budget.free_pages > before or jobs:
                rounds = 0
            elif came_round:
                rounds += 1
                if rounds >= _HOPELESS_ROUNDS:
                    return False
            await asyncio.sleep(0)
        while self._at_work:
            await self._collect()
        return True

    def _pick(self) -> tuple[list[_Job], bool]:
        """The next victims that need compression (the others are dealt with), and whether the hand came round."""
        jobs: list[_Job] = []
        for _ in range(BATCH):
            victims, came_round = self._clock.take(self._devices(), BATCH - len(jobs))
            for device, cluster in victims:
                if cluster in device.reclaiming or any(i.covers(cluster) for i in device.incoming):
                    continue
                word = device.words[cluster]
                if word >> DIRTY_SHIFT & RESIDENT:
                    has_image = word >> LENGTH_SHIFT != 0
                    slot = 1 - (word >> SLOT_SHIFT & 1) if has_image else 0
                    jobs.append(_Job(device, cluster, word, slot))
                    device.reclaiming.add(cluster)
                else:
                    device.drop_resident(cluster)
                    self.counters.dropped_clean += 1
            if came_round or len(jobs) == BATCH:
                return jobs, came_round
        return jobs, False

    def _submit(self, jobs: list[_Job]) -> None:
        loop = asyncio.get_running_loop()
        self._at_work.add(loop.run_in_executor(self._workers, _compress, jobs))

    async def _collect(self) -> None:
        done, self._at_work = await asyncio.wait(self._at_work, return_when=asyncio.FIRST_COMPLETED)
        for batch in done:
            for job in batch.result():
                self._settle(job)

    def _settle(self, job: _Job) -> None:
        """Let the image take the cluster's place, if nobody has touched it meanwhile (rule 1)."""
        device, cluster = job.device, job.cluster
        device.reclaiming.discard(cluster)
        unchanged = device.references[cluster] == Reference.IDLE and device.words[cluster] == job.word
        if not unchanged or any(i.covers(cluster) for i in device.incoming):
            self.counters.thrown_away += 1
            if job.length > 0:
                device.ram.drop(cluster, job.slot, job.length)
            device.release_stray(cluster)
        elif job.length == _ZEROS:
            self.counters.zeros += 1
            device.clear(cluster)
        elif job.length == _STUCK:
            self.counters.incompressible += 1
            device.references[cluster] = Reference.STUCK
        else:
            self.counters.compressed += 1
            device.take_image(cluster, job.slot, job.length)


def _compress(jobs: list[_Job]) -> list[_Job]:
    """In a worker thread: store the images of a batch. The loop may change the clusters meanwhile."""
    for job in jobs:
        try:
            image = job.device.codec.encode(_content(job))
        except OSError as error:  # a damaged old image: keep what is resident
            log.error("%s: cluster %d can't be reclaimed: %s", job.device.name, job.cluster, error)
            job.length = _STUCK
            continue
        if image is None:
            job.length = _ZEROS
            continue
        length = sum(map(len, image))
        if length > INCOMPRESSIBLE_BYTES:
            job.length = _STUCK
        else:
            job.device.ram.store(job.cluster, job.slot, image)
            job.length = length
    return jobs


def _content(job: _Job) -> memoryview:
    """The cluster's 64 KiB: what is resident, over what its old image holds."""
    device, word = job.device, job.word
    base = job.cluster << CLUSTER_SHIFT
    if word & RESIDENT == RESIDENT:
        return device.hot_view[base : base + CLUSTER]
    content = bytearray(CLUSTER)
    if word >> LENGTH_SHIFT:
        at = 0
        for piece in device.decode(job.cluster, word, 0, CLUSTER):
            content[at : at + len(piece)] = piece
            at += len(piece)
    for first, after in page_runs(word & RESIDENT):
        start, end = first * PAGE, after * PAGE
        content[start:end] = device.hot_view[base + start : base + end]
    return memoryview(content)


def anonymous_bytes() -> int:
    """This process's private memory (RssAnon), in bytes."""
    with open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0
