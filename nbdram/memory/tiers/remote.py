"""The last tier: sealed images in the memory of other machines, one key each in a Redis or Valkey cluster.

    nbdram:image:DEVICE:CLUSTER:GENERATION    an image, sealed as `seal.py` tells
    nbdram:device:DEVICE                      whose they are: JSON, for people and for `nbdram gc-remote`

DEVICE is the device's UUID; CLUSTER and GENERATION (see `generations.py`) are hexadecimal. The device, the cluster and
the generation are authenticated with the image: a remote that lies, or mixes up values, is found out. It can lose
images, or refuse them, and can't do more harm than that.

The record of a device that lives in a state directory stays until the device is removed; any other's goes by itself
when its server is gone for a day.
"""

import json
import logging
import os
import socket
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Final
from uuid import UUID

from nbdram.errors import NbdramError
from nbdram.memory.codec import IntegrityError, MissingImage
from nbdram.memory.layout import CLUSTER, PAGE, SEAL_BYTES, Tier
from nbdram.memory.mailbox import Told
from nbdram.memory.packer import Packer
from nbdram.memory.tiers.engine import Command, Engine, Finish
from nbdram.memory.tiers.generations import GENERATIONS_BYTES, Generations
from nbdram.memory.tiers.ram import image_pages
from nbdram.memory.tiers.reading import Reads
from nbdram.memory.tiers.refusals import Refusals
from nbdram.memory.tiers.remote_settings import RemoteSettings
from nbdram.memory.tiers.seal import Seal
from nbdram.memory.tiers.sending import SEAL_PURPOSE, image_key, image_label
from nbdram.memory.tiers.writes import Writes

log = logging.getLogger("nbdram.remote")

DEVICE_PREFIX: Final = b"nbdram:device:"
_STORE_S: Final = 3.0  # how long an image is offered to a remote that is away
_RECLAIM_WAIT_S: Final = 1.0  # how long reclaim waits for an image that it needs back
_RECORD_S: Final = 24 * 3600
_RENEW_S: Final = 3600
_REGISTER_S: Final = 3.0
_CLOSE_S: Final = 10.0  # what a server that stops may take to remove its images
_MOST_DROPS: Final = 1 << 14  # that may wait; the others are put off until there is time


class Remote:
    """One remote, for all devices of a server."""

    def __init__(self, settings: RemoteSettings, secret: bytes | None = None) -> None:
        """Connects. NbdramError if it can't be used."""
        self.settings = settings
        self.max_bytes = settings.max_bytes
        self.used_bytes = 0
        self.stored_images = self.stored_bytes = 0
        self.fetched_images = 0
        self.drops_waiting = 0
        self.failures = 0
        self._lock = threading.Lock()
        self._seal = Seal(secret, SEAL_PURPOSE, "in the remote")
        self._closed = False
        self._forgetting: list[threading.Thread] = []
        self._records: dict[UUID, tuple[str, bool]] = {}
        self._renew_at = 0.0
        self.engine = Engine(settings)
        self.engine.start(self._renew)
        self.refusals = Refusals(self.engine.owners)
        self._reads = Reads(self.engine)
        self.seal: Final = self._seal.seal
        self.open_sealed: Final = self._seal.open
        self.writes = Writes(self.engine, self._seal.secret)

    def close(self) -> None:
        """Drops that are still to be made get some time; what is left then is for `nbdram gc-remote`."""
        deadline = time.monotonic() + _CLOSE_S
        for thread in self._forgetting:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._forgetting):
            log.warning("%s: not all data could be removed; nbdram gc-remote does the rest", self.settings)
        self._closed = True
        self._reads.close()
        self.writes.close()
        self.engine.close()
        for thread in self._forgetting:
            thread.join()

    @property
    def retries(self) -> int:
        """How many commands had to be sent again."""
        return self.engine.retries

    @property
    def failing(self) -> bool:
        """Whether a node has refused an image, and taken none since."""
        return bool(self.refusals)

    def has_room(self) -> bool:
        """Whether it is worth trying to store an image."""
        if not self.refusals.any_takes():
            return False
        return not self.max_bytes or self.used_bytes + SEAL_BYTES + (1 << 16) <= self.max_bytes

    def can_drop(self) -> bool:
        """Whether more drops can be asked for now; more than this are put off."""
        return self.drops_waiting < _MOST_DROPS // 2

    def use(self, pages: int) -> None:
        """Count pages of images that are, or are not any more, in the remote."""
        with self._lock:
            self.used_bytes += pages * PAGE

    # -- images --------------------------------------------------------------------------------------

    def store(self, key: bytes, sealed: bytes, finish: Finish) -> None:
        self.engine.send(Command(key, (b"SET", key, sealed), time.monotonic() + _STORE_S, finish, is_image=True))

    def fetch(self, key: bytes, wait_s: float, finish: Finish, *, on_loop: bool) -> None:
        send = self._reads.send if on_loop else self.engine.send
        send(Command(key, (b"GET", key), time.monotonic() + wait_s, finish))

    def drop(self, key: bytes, finish: Finish | None = None) -> bool:
        """Some time soon; False if too many wait already."""
        with self._lock:
            if self.drops_waiting >= _MOST_DROPS:
                return False
            self.drops_waiting += 1

        def dropped(reply: Any, error: OSError | None) -> None:
            with self._lock:
                self.drops_waiting -= 1
            if self.refusals and reply:
                self.refusals.made_room(self.engine.owner(key))
            if finish:
                finish(reply, error)

        self.engine.send(Command(key, (b"UNLINK", key), float("inf"), dropped))
        return True

    def takes(self, key: bytes) -> bool:
        """Whether the node for a key may take an image."""
        return self.refusals.takes(self.engine.owner(key))

    def stored(self, key: bytes, length: int) -> None:
        with self._lock:
            self.stored_images += 1
            self.stored_bytes += length
        if self.refusals and self.refusals.stored(self.engine.owner(key)):
            log.warning("%s: cold data can be stored again", self.settings)

    def refused(self, key: bytes, error: OSError) -> None:
        with self._lock:
            self.failures += 1
        if self.refusals.note(self.engine.owner(key), error):
            log.error(
                "%s: can't store cold data: %s; it goes to other nodes, or stays where it is",
                self.settings,
                error.strerror,
            )

    # -- whose images there are ----------------------------------------------------------------------

    def register(self, identity: UUID, name: str, *, kept: bool) -> None:
        """Say that a device is alive, before it has any image. NbdramError if that can't be said."""
        self._records[identity] = (name, kept)
        said: Future[Any] = Future()
        self._write_record(identity, time.monotonic() + _REGISTER_S, said)
        try:
            said.result()
        except OSError as error:
            del self._records[identity]
            raise NbdramError(f"can't use {self.settings} for swap: {error.strerror}") from error

    def unregister(self, identity: UUID) -> None:
        """Say that a device is no more: whatever it has left may go."""
        self._records.pop(identity, None)
        with suppress(OSError):  # the server stops
            self._ask(DEVICE_PREFIX + identity.hex.encode(), b"UNLINK")

    def forget(self, tier: "RemoteTier") -> None:
        """Remove all that a device has here, which is closed already, some time soon."""
        thread = threading.Thread(target=self._forget, args=(tier,), name="nbdram-remote-forget", daemon=True)
        self._forgetting = [other for other in self._forgetting if other.is_alive()]
        self._forgetting.append(thread)
        thread.start()

    def _forget(self, tier: "RemoteTier") -> None:
        try:
            for found in tier.generations.pages():
                for cluster, slot, generation in found:
                    while not self.can_drop() and not self._closed:
                        time.sleep(0.01)
                    tier.drop_leftover(cluster, slot, generation)
            while self.drops_waiting and not self._closed:
                time.sleep(0.01)
            if not self._closed:
                self.unregister(tier.identity)
        finally:
            tier.close()

    def knows(self, identity: UUID) -> bool:
        """Whether a device has a record here. OSError if the remote is away."""
        return self._ask(DEVICE_PREFIX + identity.hex.encode(), b"GET") is not None

    def _ask(self, key: bytes, word: bytes) -> Any:
        """One command, waited for. OSError if the remote is away."""
        answer: Future[Any] = Future()
        deadline = time.monotonic() + self.settings.wait_s
        self.engine.send(Command(key, (word, key), deadline, lambda reply, error: _settle(answer, reply, error)))
        return answer.result()

    def _renew(self) -> None:
        """Called each minute, in a thread of the engine."""
        if time.monotonic() >= self._renew_at:
            self._renew_at = time.monotonic() + _RENEW_S
            for identity in list(self._records):
                self._write_record(identity)

    def _write_record(self, identity: UUID, deadline: float = float("inf"), said: "Future[Any] | None" = None) -> None:
        name, kept = self._records[identity]
        key = DEVICE_PREFIX + identity.hex.encode()
        record = {"export": name, "host": socket.gethostname(), "kept": kept, "seen": int(time.time())}
        words: tuple[bytes, ...] = (b"SET", key, json.dumps(record).encode())
        if not kept:
            words += (b"EX", b"%d" % _RECORD_S)
        finish: Finish = (lambda reply, error: _settle(said, reply, error)) if said else (lambda *_: None)
        self.engine.send(Command(key, words, deadline, finish))


class RemoteTier:
    """The images of one device in a remote."""

    tier: Final = Tier.REMOTE

    def __init__(self, remote: Remote, identity: UUID, fd: int, *, kept: bool) -> None:
        """`fd`: of the file of generations. `kept`: the device lives on when the server has ended."""
        self.remote = remote
        self.identity = identity
        self._identity = identity.bytes
        self.kept = kept
        self.put_off = kept  # there may be images that no word points at
        self.is_likely = False  # for what is resident: the last of it did not compress, and came here
        self.generations = Generations(fd)

    def register(self, name: str) -> None:
        """To be done before the first image is stored. NbdramError if it can't be."""
        self.remote.register(self.identity, name, kept=self.kept)

    def close(self) -> None:
        self.generations.close()

    def has_room(self) -> bool:
        return self.remote.has_room()

    def place(self, _: int) -> int:
        """The engine knows."""
        return 0

    def submit(self, cluster: int, slot: int, image: bytes) -> "Future[None]":
        """Seal an image and send it off; done when it is stored, OSError if it is not."""
        generation, key = self._new(cluster, slot)
        pages = image_pages(len(image))
        self.remote.use(pages)

        storing: Future[None] = Future()

        def finish(_: Any, error: OSError | None) -> None:
            if error is None:
                self.remote.stored(key, len(image))
            else:
                self.remote.refused(key, error)
                self.discard(cluster, slot, generation, pages)  # it may have come through all the same
            _settle(storing, None, error)

        self.remote.store(key, self.remote.seal(image, self._label(cluster, generation)), finish)
        return storing

    def _new(self, cluster: int, slot: int) -> tuple[int, bytes]:
        """The generation and the key of an image that is going to be stored, at a node that takes images."""
        is_good = (lambda drawn: self.remote.takes(self._key(cluster, drawn))) if self.remote.refusals else None
        generation, left = self.generations.new(cluster, slot, is_good)
        if left:
            self.remote.drop(self._key(cluster, left))
        return generation, self._key(cluster, generation)

    def store(self, cluster: int, slot: int, image: bytes) -> None:
        self.submit(cluster, slot, image).result()

    def hand_over(self, packer: Packer, cluster: int, slot: int) -> "Handed | None":
        """Let the process that compresses store an image, if it can; what came of it must be told to the result."""
        generation, key = self._new(cluster, slot)
        line = self.remote.writes.line(packer, key)
        if line is None:
            self.generations.forget(cluster, slot, generation)
            return None
        self.remote.use(CLUSTER // PAGE)  # at most
        return Handed(self, cluster, slot, generation, key, line)

    def fetch(self, cluster: int, slot: int, length: int, wait_s: float | None = None) -> "Future[bytes]":
        """An image of `length` bytes; errors as `ask` has them."""
        fetching: Future[bytes] = Future()
        self.ask(cluster, slot, length, lambda image, error: _settle(fetching, image, error), wait_s)
        return fetching

    def ask(
        self,
        cluster: int,
        slot: int,
        length: int,
        told: "Told[bytes]",
        wait_s: float | None = None,
        *,
        on_loop: bool = False,
    ) -> None:
        """`told` gets an image of `length` bytes, by whatever thread.

        OSError if the remote is away for too long, IntegrityError if it is not there, or not what was stored.
        `on_loop`: the event loop asks, which may do it without the help of a thread.
        """
        generation = self.generations.at(cluster, slot)

        def finish(sealed: bytes | memoryview | None, error: OSError | None) -> None:
            image = b""
            if error is None:
                try:
                    image = self._open(sealed, cluster, generation, length)
                except OSError as damage:
                    error = damage
            told(image, error)

        wait_s = self.remote.settings.wait_s if wait_s is None else wait_s
        self.remote.fetch(image_key(self._identity, cluster, generation), wait_s, finish, on_loop=on_loop)

    def _open(self, sealed: bytes | memoryview | None, cluster: int, generation: int, length: int) -> bytes:
        if sealed is None:
            raise MissingImage("an image is missing in the remote")
        image = self.remote.open_sealed(sealed, image_label(self._identity, cluster, generation))
        if len(image) != length:
            raise IntegrityError("an image in the remote is not what was stored")
        self.remote.fetched_images += 1
        return image

    def load(self, cluster: int, slot: int, length: int) -> bytes:
        """For reclaim, which must not wait long."""
        return self.fetch(cluster, slot, length, _RECLAIM_WAIT_S).result()

    def drop(self, cluster: int, slot: int, length: int) -> None:
        """Give the memory of an image back to the remote, some time soon."""
        generation = self.generations.at(cluster, slot)
        if generation:
            self.discard(cluster, slot, generation, image_pages(length))

    def drop_leftover(self, cluster: int, slot: int, generation: int) -> None:
        """Drop an image that counts as gone already."""
        self.discard(cluster, slot, generation, 0)

    def discard(self, cluster: int, slot: int, generation: int, pages: int) -> None:
        """Drop an image that counts as so many pages, wherever its cluster lives."""
        self.remote.use(-pages)

        def finish(_: Any, error: OSError | None) -> None:
            if error is None:
                self.generations.forget(cluster, slot, generation)

        if not self.remote.drop(self._key(cluster, generation), finish):
            self.put_off = True

    def key(self, cluster: int, slot: int) -> bytes:
        """Of the image in a slot."""
        return self._key(cluster, self.generations.at(cluster, slot))

    def _key(self, cluster: int, generation: int) -> bytes:
        return image_key(self._identity, cluster, generation)

    def _label(self, cluster: int, generation: int) -> bytes:
        return image_label(self._identity, cluster, generation)


class Handed:
    """An image that the process that compresses stores."""

    def __init__(self, tier: RemoteTier, cluster: int, slot: int, generation: int, key: bytes, line: int) -> None:
        self.identity = tier.identity.bytes
        self.generation = generation
        self.line = line
        self.tier = tier
        self._cluster = cluster
        self._slot = slot
        self._key = key

    def stored(self, length: int) -> None:
        self.tier.remote.use(image_pages(length) - CLUSTER // PAGE)
        self.tier.remote.stored(self._key, length)

    def not_needed(self) -> None:
        """It was stored in RAM, if it is not all zeros."""
        self.tier.remote.use(-(CLUSTER // PAGE))
        self.tier.generations.forget(self._cluster, self._slot, self.generation)

    def failed(self) -> None:
        """It may be there all the same."""
        self.tier.discard(self._cluster, self._slot, self.generation, CLUSTER // PAGE)


def _settle(future: "Future[Any]", result: Any, error: OSError | None) -> None:
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def anonymous_generations(name: str) -> int:
    """A file for the generations of a device that ends with the process."""
    fd = os.memfd_create(f"nbdram:{name}:remote"[:249], os.MFD_CLOEXEC)
    os.ftruncate(fd, GENERATIONS_BYTES)
    return fd
