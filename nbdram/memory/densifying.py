"""Makes images in RAM smaller while there is nothing else to do: what is compressed in a hurry takes 8 % more.

Rules:

1. Only while reclaim has had nothing to do for a moment, and no more than half of the time of one processor, at the
   lowest priority. Where there is no process that compresses, it is not done.
2. Only images of clusters that nobody has touched since they were made, each once: a word says whether its image is as
   small as it gets.
3. Order, as in reclaim: stored in the free slot, then the word, then the old slot dropped. If the cluster was touched
   meanwhile, or its word changed, what was stored is dropped.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from nbdram.memory.device import Device
from nbdram.memory.layout import CLUSTER, DENSE, LENGTH_MASK, LENGTH_SHIFT, Reference
from nbdram.memory.packer import Packer, Wanted
from nbdram.memory.packing import FAILED, STUCK
from nbdram.memory.reclaim import Reclaimer

log = logging.getLogger("nbdram.reclaim")

_LOOK_S: Final = 0.25
_QUIET_LOOKS: Final = 4  # that reclaim has had nothing to do
_BATCH: Final = 8  # some 4 ms, that reclaim may have to wait
_SLICE: Final = 1 << 10  # clusters to look through in one go: a third of a millisecond at most
_PAUSE_S: Final = 0.0005  # after each
_COLD: Final = bytes((Reference.COLD,))


class Densifier:
    """Follows one reclaimer over the devices that `devices()` returns."""

    def __init__(self, reclaimer: Reclaimer, devices: Callable[[], Sequence[Device]]) -> None:
        self._reclaimer = reclaimer
        self._counters = reclaimer.counters
        self._devices = devices
        self._seen = 0  # clusters that had been compressed when this pass began
        self._surprise: type[Exception] | None = None  # the last that was logged
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        quiet, done = 0, -1
        while True:
            await asyncio.sleep(_LOOK_S)
            quiet = quiet + 1 if self._reclaimer.done == done else 0
            done = self._reclaimer.done
            if quiet < _QUIET_LOOKS or self._counters.compressed == self._seen:
                continue
            seen = self._counters.compressed
            try:
                if await self._pass():
                    self._seen = seen
            except Exception as error:
                if type(error) is not self._surprise:
                    log.exception("reclaim had an error and goes on: %r", error)
                self._surprise = type(error)

    async def _pass(self) -> bool:
        """Look at all images; False if reclaim had something to do in between."""
        done = self._reclaimer.done
        if self._reclaimer.idle_packer() is None:
            return False
        for device in self._devices():
            if device.codec.level:
                continue
            at = 0
            while device in self._devices() and (span := device.next_span(at, _SLICE)):
                first, at = span
                wanted = _coarse(device, first, at)
                for number in range(0, len(wanted), _BATCH):
                    if device not in self._devices():  # it was removed, and is closed
                        break
                    packer = self._reclaimer.idle_packer() if self._reclaimer.done == done else None
                    if packer is None:
                        return False
                    began = time.monotonic()
                    await self._make_denser(packer, wanted[number : number + _BATCH])
                    await asyncio.sleep(time.monotonic() - began)
                await asyncio.sleep(_PAUSE_S)
        return True

    async def _make_denser(self, packer: Packer, wanted: Sequence[Wanted]) -> None:
        wanted = [one for one in wanted if _is_idle(*one)]
        for device, cluster, _ in wanted:
            device.reclaiming.add(cluster)
        images = [FAILED] * len(wanted)
        try:
            if wanted:
                images = await packer.make_denser(wanted)
        finally:
            for (device, cluster, word), image in zip(wanted, images, strict=True):
                device.reclaiming.discard(cluster)
                self._settle(device, cluster, word, image)

    def _settle(self, device: Device, cluster: int, word: int, image: int) -> None:
        if image == FAILED:  # the image is damaged, say: who reads it will find out
            device.release_stray(cluster)
        elif not _is_idle(device, cluster, word):
            self._counters.thrown_away += 1
            if image > 0:
                device.discard_image(cluster, image)
        elif image == STUCK:
            device.words[cluster] = word | DENSE
        else:
            device.take_images(cluster, [image])
            self._counters.made_denser += 1


def _coarse(device: Device, first: int, after: int) -> list[Wanted]:
    """Of the clusters [first, after), those whose image could be smaller, for all that is known."""
    references = device.references[first:after]
    found: list[Wanted] = []
    at = references.find(_COLD)
    if at < 0:
        return found
    words = device.words[first:after].tolist()
    while at >= 0:
        word = words[at]
        if not word & DENSE and word >> LENGTH_SHIFT & LENGTH_MASK != CLUSTER and first + at not in device.reclaiming:
            found.append((device, first + at, word))
        at = references.find(_COLD, at + 1)
    return found


def _is_idle(device: Device, cluster: int, word: int) -> bool:
    """Whether a cluster has still this word, nobody has touched it, and it is nobody's at the moment."""
    return (
        device.references[cluster] == Reference.COLD
        and device.words[cluster] == word
        and cluster not in device.reclaiming
        and not device.is_receiving(cluster)
    )
