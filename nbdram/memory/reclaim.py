"""Keeps memory within its budget: cold clusters are compressed, and their pages given back.

Runs on the event loop in small steps; only compression itself, and sending images to a remote, is done elsewhere, a
batch at a time: by a process of its own, or where memory is too scarce for one by threads. Rules:

1. A victim is idle: its reference byte says so before it is compressed. Reads and writes always set it to touched;
   if that happened by the time the image is there, or the word changed, the image is thrown away.
2. Order: image stored in the free slot, word changed, `hot` punched, old slot dropped.
3. Clusters that hold no byte newer than their image need no compression: they are just punched.
4. Clusters of zeros become holes. Clusters that hardly compress go to disk, or to a remote, as they are; without
   either they are left alone until they are touched again.
5. When images take more than their share of the budget, or nothing is left to compress, those that were not read
   lately move on to disk or a remote, by the same rules: stored, then the word, then the old slot dropped. Images are
   sent there together: a batch takes one round trip, and the next one is made meanwhile.
6. Reclaim never ends before the server does. Whatever goes wrong concerns one cluster, which stays where it is, or
   this attempt; it is logged once, and tried again.
"""

import asyncio
import logging
import mmap
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Final

from nbdram.memory.budget import Budget
from nbdram.memory.clock import Clock
from nbdram.memory.codec import IntegrityError
from nbdram.memory.device import Device
from nbdram.memory.layout import (
    DIRTY_SHIFT,
    IDLE,
    LENGTH_MASK,
    LENGTH_SHIFT,
    PAGE,
    RAM,
    RESIDENT,
    TIER_MASK,
    TIER_SHIFT,
    Reference,
    Tier,
    cold_word,
)
from nbdram.memory.mailbox import Mailbox
from nbdram.memory.packer import LATE_S, Packer, Packers, WantedToSend
from nbdram.memory.packing import FAILED, INCOMPRESSIBLE, STUCK, ZEROS, content_of, free_slot, pack
from nbdram.memory.space import cold_reference
from nbdram.memory.verdict import Verdict

if TYPE_CHECKING:
    from nbdram.memory.tiers.remote import Handed

log = logging.getLogger("nbdram.reclaim")

BATCH: Final = 16  # clusters; also what is settled in one turn of the loop
_LARGE_BATCH: Final = 32  # where their images are a small part of the memory
_LARGE_FROM: Final = 256 << 20  # bytes for data
_BATCHES_AT_WORK: Final = 2
_BATCHES_TO_FAR: Final = 8  # of images on their way down
_MEASURE_S: Final = 0.25
_MEASURE_BUSY_S: Final = 0.05  # while memory comes and goes
_VERDICT_S: Final = 0.25  # how long "there is nothing left" is believed
# After this many rounds of the clocks' hands in which nothing was gained, touched or received, there is nothing
# left to reclaim: for either kind of victim, one round ages what was touched, and one takes it.
_HOPELESS_ROUNDS: Final = 5
_HOPELESS_S: Final = 5.0  # clients that touch everything all the time are waited for no longer than this
_PAUSE_S: Final = 0.0005  # after a round
# Where there is a disk or a remote, images in RAM may take this share of the budget.
_IMAGE_SHARE: Final = 0.5


class ReclaimCounters:
    """What reclaim has done, in clusters."""

    def __init__(self) -> None:
        self.compressed = 0
        self.dropped_clean = 0
        self.zeros = 0
        self.incompressible = 0
        self.demoted = 0
        self.moved_on = 0  # by `moving.py`
        self.made_denser = 0  # by `densifying.py`
        self.thrown_away = 0


@dataclass(slots=True)
class _Job:
    device: Device
    cluster: int
    word: int
    image: int = FAILED  # the word that describes the image that was stored
    handed: "Handed | None" = None  # the process may store it in a remote
    storing: "Future[None] | None" = None  # below RAM; until it is done, `image` is a hope
    error: Exception | None = None  # that nobody expects

    @property
    def is_near(self) -> bool:
        """Whether the process can make an image of it: of what is resident, over one in RAM at most."""
        return bool(self.word & RESIDENT) and self.word >> TIER_SHIFT & TIER_MASK <= RAM


class Reclaimer:
    """Watches one budget over the devices that `devices()` returns."""

    def __init__(self, budget: Budget, devices: Callable[[], Sequence[Device]], packers: Packers | None = None) -> None:
        """`packers`: the processes that compress, if there may be any."""
        self.counters = ReclaimCounters()
        self._budget = budget
        self._devices = devices
        self._clock = Clock(Reference.FRESH, Reference.IDLE)
        self._image_clock = Clock(Reference.COLD)
        self._workers = ThreadPoolExecutor(1, thread_name_prefix="nbdram-compress")
        self._packers = packers
        self._wanted = asyncio.Event()
        self._complained = False
        self._verdict = Verdict()
        self._gains = 0  # clusters that were reclaimed, or that could have been if nobody had touched them
        self._surprises: set[type[BaseException]] = set()  # those that were logged since all went well
        self._mailbox = Mailbox()
        self._tasks: list[asyncio.Task[None]] = []
        self._at_work: dict[asyncio.Task[None], list[_Job]] = {}

    def start(self) -> None:
        self._budget.set_overhead(self._overhead_bytes() // PAGE)
        self._budget.attach(self._wanted.set, self._measure)
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._watch())]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._at_work:
            await asyncio.wait(self._at_work)
        self._workers.shutdown()
        if self._packers:
            await self._packers.stop()

    async def _watch(self) -> None:
        """What the process itself takes counts too; and how fast memory is going."""
        free, at = self._budget.free_pages, time.monotonic()
        pause_s = _MEASURE_S
        while True:
            await asyncio.sleep(pause_s)
            self._measure()
            pause_s = _MEASURE_S if free == self._budget.free_pages else _MEASURE_BUSY_S
            free, before, at = self._budget.free_pages, at, time.monotonic()
            self._budget.look_ahead(at - before)
            if self._packers:
                await self._packers.end_idle()
                if self._budget.is_soon_short:
                    self._packers.call_another(self._memory_for_data)
                self._connect(self._packers)

    def _connect(self, packers: Packers) -> None:
        """Let the processes have their connections to a remote by the time that something goes there."""
        tier = next((device.remote for device in self._devices() if device.remote), None)
        if tier:
            for packer in packers:
                tier.remote.writes.connect(packer)

    def _overhead_bytes(self) -> int:
        own = anonymous_bytes()
        for packer in self._packers or ():
            if packer.pid:
                with suppress(OSError):
                    own += anonymous_bytes(packer.pid)
        return own

    @property
    def done(self) -> int:
        """Grows with all that reclaim does for memory that is wanted."""
        return self._gains

    def idle_packer(self) -> "Packer | None":
        """A process that compresses, while reclaim has nothing for it to do."""
        if self._at_work or not self._packers:
            return None
        return self._packers.least_busy(self._memory_for_data)

    def _measure(self) -> None:
        budget = self._budget
        try:
            budget.set_overhead(self._overhead_bytes() // PAGE)
        except Exception as error:  # too many open files, say
            self._surprised(error)
        if budget.free_pages >= budget.wake_below:
            self._verdict.lift()
        elif not self._verdict.stands(budget.free_pages):
            self._wanted.set()

    async def _run(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                balanced = await self._balance()
                if balanced:
                    self._budget.satisfied()
                    while self._at_work and not self._budget.is_short:  # what is late
                        await self._collect()
            except Exception as error:
                self._surprised(error)
                await asyncio.sleep(_VERDICT_S)
                self._wanted.set()
                continue
            if balanced:
                self._complained = False
                self._verdict.lift()
                self._surprises.clear()
                continue
            if not self._budget.is_short:  # READs can do without
                await asyncio.sleep(_VERDICT_S)
                continue
            if not self._complained:
                log.warning("the memory budget is used up, and nothing more can be compressed")
            self._complained = True
            self._wanted.clear()  # whoever has wanted it up to now has the answer
            self._verdict.pass_on(self._budget.free_pages)
            self._budget.give_up()
            await asyncio.sleep(_VERDICT_S)
            self._budget.hope()

    def _surprised(self, error: BaseException) -> None:
        """Rule 6."""
        traceback.clear_frames(error.__traceback__)
        if type(error) not in self._surprises:
            self._surprises.add(type(error))
            log.error("reclaim had an error and goes on: %r", error, exc_info=error)

    async def _balance(self) -> bool:
        """Reclaim until enough is free; False if there is nothing left that could be."""
        budget = self._budget
        rounds = quiet = 0  # without a gain; and without anything that was touched meanwhile either
        gains, aged, since = self._gains, self._aged(), time.monotonic()
        while budget.free_pages < budget.goal_pages:
            # After a fruitless round, try the other kind of victim.
            images = self._images_above_share() != bool(rounds & 1)
            jobs, came_round = self._pick(images=images)
            if jobs:
                self._at_work[asyncio.create_task(self._work(jobs))] = jobs
            while len(self._at_work) > (self._late_batches() if came_round else self._most_batches() - 1):
                await self._collect()
            if self._gains != gains:
                rounds = quiet = 0
                gains, since = self._gains, time.monotonic()
            elif came_round:
                rounds += 1
                quiet = quiet + 1 if self._aged() == aged and not self._is_receiving() and not self._at_work else 0
                aged = self._aged()
                if quiet >= _HOPELESS_ROUNDS or time.monotonic() - since > _HOPELESS_S:
                    while self._at_work:
                        await self._collect()
                    return False
            await asyncio.sleep(_PAUSE_S if came_round else 0)
            if budget.free_pages >= budget.goal_pages and await self._is_done():
                break
        return True

    async def _is_done(self) -> bool:
        """Wait for what is at work; False if memory gets short before what is late is there."""
        while self._at_work:
            await self._collect()
            if self._budget.is_short and self._late_batches():
                return False
        return True

    def _late_batches(self) -> int:
        """Those that are not waited for."""
        return self._packers.late_batches if self._packers else 0

    def _most_batches(self) -> int:
        if any(device.remote for device in self._devices()):
            return _BATCHES_TO_FAR
        return self._packers.batches(self._memory_for_data) if self._packers else _BATCHES_AT_WORK

    @property
    def _memory_for_data(self) -> int:
        return self._budget.data_pages * PAGE

    def _is_receiving(self) -> bool:
        """Whether there is a large WRITE that goes on without more memory: what it has written is ours afterwards."""
        return any(not incoming.is_held_up for device in self._devices() for incoming in device.incoming)

    def _aged(self) -> int:
        return self._clock.aged + self._image_clock.aged

    def _images_above_share(self) -> bool:
        devices = self._devices()
        images = sum(device.cold_pages for device in devices if device.far_tiers())
        return images > self._budget.data_pages * _IMAGE_SHARE

    def _pick(self, *, images: bool) -> tuple[list[_Job], bool]:
        """The next victims that need a worker (the others are dealt with), and whether the hand came round."""
        jobs: list[_Job] = []
        devices = self._devices()
        # Of images there may be very many: those that have nowhere to go are not looked through.
        movable = [device for device in devices if device.roomy_tier()] if images else []
        count = _LARGE_BATCH if self._memory_for_data >= _LARGE_FROM else BATCH
        for _ in range(count):
            if images and not jobs:
                victims, came_round = self._image_clock.take(movable, count)
            else:
                victims, came_round = self._clock.take(devices, count - len(jobs))
            for device, cluster in victims:
                if cluster in device.reclaiming or device.is_receiving(cluster):
                    continue
                word = device.words[cluster]
                if word >> DIRTY_SHIFT & RESIDENT or not word & RESIDENT:
                    if not word & RESIDENT and not device.roomy_tier():
                        continue
                    jobs.append(_Job(device, cluster, word))
                    device.reclaiming.add(cluster)
                    if word & RESIDENT:
                        device.references[cluster] = IDLE
                else:
                    device.drop_resident(cluster)
                    self.counters.dropped_clean += 1
                    self._gains += 1
            if came_round or len(jobs) == count or self._budget.free_pages >= self._budget.goal_pages:
                return jobs, came_round
        return jobs, False

    async def _work(self, jobs: list[_Job]) -> None:
        """Have a batch stored. Those that would not be stay where they are."""
        try:
            if rest := await self._pack(jobs):
                await asyncio.get_running_loop().run_in_executor(self._workers, _store, rest)
        except BrokenExecutor:  # it will never do anything again
            self._workers = ThreadPoolExecutor(1, thread_name_prefix="nbdram-compress")
            raise
        finally:
            stored = [(job, self._mailbox.future(job.storing)) for job in jobs if job.storing]
            for job, storing in stored:
                try:
                    await storing
                except Exception as error:
                    _not_stored(job, error)

    async def _pack(self, jobs: list[_Job]) -> list[_Job]:
        """Have the process store what it can; returns what is left for a thread to do."""
        packers = self._packers
        packer = packers.least_busy(self._memory_for_data) if packers else None
        if packers is None or packer is None:
            return jobs
        for job in jobs:
            _hand_over(packer, job)
        near = [job for job in jobs if job.is_near and not job.handed]
        if near:
            images = await packer.pack([(job.device, job.cluster, job.word) for job in near])
            for job, image in zip(near, images, strict=True):
                stuck = image == INCOMPRESSIBLE and not job.device.roomy_tier()
                job.image = STUCK if stuck else image
                if image == FAILED:  # the process was lost, perhaps: in the middle of it
                    job.device.release_stray(job.cluster)
                elif image == INCOMPRESSIBLE:
                    _hand_over(packer, job)
        await _send(packer, [job for job in jobs if job.handed])
        return [job for job in jobs if job.image in (FAILED, INCOMPRESSIBLE)]

    async def _collect(self) -> None:
        done, _ = await asyncio.wait(self._at_work, timeout=LATE_S, return_when=asyncio.FIRST_COMPLETED)
        for batch in done:
            if error := batch.exception():
                self._surprised(error)
            jobs = self._at_work.pop(batch)
            for at in range(0, len(jobs), BATCH):
                await asyncio.sleep(0)  # it takes a quarter of a millisecond
                self._settle(jobs[at : at + BATCH])

    def _settle(self, jobs: list[_Job]) -> None:
        """Let images take the place of their clusters; those of neighbours together."""
        won = []
        for job in jobs:
            if job.error:
                self._surprised(job.error)
            try:
                if self._is_won(job):
                    won.append(job)
            except Exception as error:
                self._not_settled([job], error)
        for _, numbered in groupby(enumerate(won), lambda pair: (pair[1].device, pair[1].cluster - pair[0])):
            neighbours = [job for _, job in numbered]
            first = neighbours[0]
            try:
                first.device.take_images(first.cluster, [job.image for job in neighbours])
            except Exception as error:
                self._not_settled(neighbours, error)

    def _not_settled(self, jobs: list[_Job], error: Exception) -> None:
        self._surprised(error)
        for job in jobs:
            with suppress(Exception):
                job.device.release_stray(job.cluster)  # an image that is nobody's

    def _is_won(self, job: _Job) -> bool:
        """Whether there is an image, and nobody has touched the cluster meanwhile (rule 1)."""
        device, cluster = job.device, job.cluster
        device.reclaiming.discard(cluster)
        idle = IDLE if job.word & RESIDENT else cold_reference(job.word)
        unchanged = device.references[cluster] == idle and device.words[cluster] == job.word
        if not unchanged or device.is_receiving(cluster):
            self.counters.thrown_away += 1
            if job.image >= 0:
                self._gains += 1
            if job.image > 0:
                device.discard_image(cluster, job.image)
        elif job.image == ZEROS:
            self.counters.zeros += 1
            self._gains += 1
            device.clear(cluster)
        elif job.image == STUCK:
            if job.word & RESIDENT:
                self.counters.incompressible += 1
                device.references[cluster] = Reference.STUCK
        elif job.image > 0:
            if job.word & RESIDENT:
                self.counters.compressed += 1
            else:
                self.counters.demoted += 1
            self._gains += 1
            return True
        return False


async def _send(packer: Packer, jobs: list[_Job]) -> None:
    """Have the process send to a remote what it was handed; of that, what compresses after all is in RAM then."""
    going = [(job, job.handed) for job in jobs if job.handed]
    if not going:
        return
    wanted = [
        WantedToSend(job.device, job.cluster, job.word, handed.line, handed.identity, handed.generation)
        for job, handed in going
    ]
    images = await packer.send(wanted) if packer.is_ready else [FAILED] * len(wanted)
    for job, handed in going:
        if job.word & RESIDENT:
            handed.tier.is_likely = False
    for (job, handed), image in zip(going, images, strict=True):
        if image == FAILED:
            handed.failed()
            if job.word & RESIDENT:
                job.device.release_stray(job.cluster)
            continue
        job.image = image
        if image >> TIER_SHIFT & TIER_MASK == Tier.REMOTE:
            handed.stored(image >> LENGTH_SHIFT & LENGTH_MASK)
            handed.tier.is_likely |= bool(job.word & RESIDENT)
        else:
            handed.not_needed()


def _hand_over(packer: Packer, job: _Job) -> None:
    """An image in RAM, or what does not compress, or will hardly, if its way leads to a remote that the process is
    connected to.
    """
    remote = job.device.remote
    if remote is None or not packer.is_ready:
        return
    is_image = not job.word & RESIDENT and job.word >> TIER_SHIFT & TIER_MASK == Tier.RAM
    is_wanted = is_image or job.image == INCOMPRESSIBLE or (remote.is_likely and job.is_near)
    if is_wanted and job.device.roomy_tier() is remote:
        job.handed = remote.hand_over(packer, job.cluster, free_slot(job.word, Tier.REMOTE))


def _store(jobs: list[_Job]) -> None:
    """In a worker thread: store the images of a batch. The loop may change the clusters meanwhile."""
    for job in jobs:
        try:
            job.image = _store_image(job) if job.word & RESIDENT else _demote(job)
        except Exception as error:
            _not_stored(job, error)


def _not_stored(job: _Job, error: Exception) -> None:
    """All stays where it is: there is no room now, or the old image is damaged, or nobody knows why."""
    log.debug("%s: cluster %d can't be reclaimed: %s", job.device.name, job.cluster, error)
    job.image = STUCK if isinstance(error, IntegrityError) else FAILED
    traceback.clear_frames(error.__traceback__)
    if not isinstance(error, OSError):
        job.error = error


def _store_image(job: _Job) -> int:
    """Compress what is resident; the word of the image, or ZEROS or STUCK."""
    device, cluster, word = job.device, job.cluster, job.word
    hot, is_far = device.backing.hot_fd, word >> TIER_SHIFT & TIER_MASK > Tier.RAM
    old = device.load_image(cluster, word) if is_far and word & RESIDENT != RESIDENT else None
    image = job.image
    if image != INCOMPRESSIBLE:
        image = pack(hot, device.ram, device.codec, cluster, word, old)
    if image == INCOMPRESSIBLE:
        return _store_below(job, bytes(content_of(hot, device.ram, device.codec, cluster, word, old)))
    return image


def _demote(job: _Job) -> int:
    """Move an image on from RAM."""
    return _store_below(job, job.device.load_image(job.cluster, job.word))


def _store_below(job: _Job, image: bytes) -> int:
    """Have an image stored in the first tier below RAM that has room; the word of it, or STUCK."""
    tier = job.device.roomy_tier()
    if tier is None:
        return STUCK
    slot = free_slot(job.word, tier.tier) | tier.place(job.cluster) << 1
    job.storing = tier.submit(job.cluster, slot, image)
    return cold_word(len(image), slot, tier.tier)


def anonymous_bytes(pid: int | None = None) -> int:
    """The private memory (RssAnon) of a process, this one if none is said, in bytes."""
    with open(f"/proc/{pid or 'self'}/statm", "rb", buffering=0) as file:
        _, resident, shared, *_ = file.read().split()
    return (int(resident) - int(shared)) * mmap.PAGESIZE
