"""Processes that make images for reclaim: they share no interpreter lock with the event loop.

With a thread each call of the compressor, and there are a dozen for a cluster, is a wake-up and a wait for the loop.
All state is in files and words, so that a process needs to know nothing but what each batch tells (`packing.py`), and
for images that go to a remote, its own connections to the nodes.

One costs about 5 MiB, twice that with a remote, which count as the server's. All are started when memory is going so
fast that there will soon be something to compress; else the first when there is, others when those that there are
can't keep up. They end when they have nothing to do.
They go last, so that they take nothing from who serves. Until there is one, when there can be none, when it was lost,
and when others leave it no time, threads do its work.
"""

import asyncio
import itertools
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from struct import Struct
from typing import Final, NamedTuple

import nbdram
from nbdram.memory.device import Device
from nbdram.memory.layout import RESIDENT
from nbdram.memory.packing import ANSWER, FAILED, HEAD, READY, REQUEST, REQUEST_TO_SEND

log = logging.getLogger("nbdram.reclaim")

_AGAIN_S: Final = 10.0  # after this a lost process is replaced
_IDLE_S: Final = 10.0  # after this a process that nobody needs is ended
_MOST: Final = 4
_ENOUGH: Final = 2  # batches: while one is compressed, the next is there already
# For a batch. After that others leave the process no time, and threads had better help: at the expense of the event
# loop, which has to share its interpreter with them.
LATE_S: Final = 0.1
# The memory for data, besides what the server itself takes, that has room for a process which compresses.
_MEMORY_EACH: Final = 128 << 20
_PATIENCE_S: Final = 5.0  # for a batch, which takes milliseconds: somebody has stopped the process
_DENSE_PATIENCE_S: Final = 60.0  # for what has time
_SEND_LATE_S: Final = 0.3  # with what goes to a remote, and waits for that
_SEND_PATIENCE_S: Final = 30.0  # to a remote: the process itself gives up a node that is silent
# Each MiB that it does without is one for data. `site` (-S) would take up to 2, by what .pth files load: it is told
# where modules are. `typing` takes 0.9 with what that loads, and is of use to those who check types.
_OURS: Final = str(Path(nbdram.__file__).parents[1])
_PROGRAM: Final = """if True:
    import sys, types
    sys.modules["typing"] = types.SimpleNamespace(Final=list, Self=None, TYPE_CHECKING=False)
    from nbdram.memory.packing import serve
    del sys.modules["typing"]  # the libraries for a remote may want it
    serve(int(sys.argv[1]))
"""

Wanted = tuple[Device, int, int]  # a device, one of its clusters, and its word


class WantedToSend(NamedTuple):
    """An image that is to be stored in a remote."""

    device: Device
    cluster: int
    word: int
    line: int  # the number of the connection
    identity: bytes  # of the device
    generation: int


class Packers:
    """The processes of one server, or the places where they will be. For one event loop."""

    def __init__(self, keep_open: Sequence[int] = (), most: int | None = None) -> None:
        """`keep_open`: descriptors that they have too: locks of what they write to, should they outlive us.

        `most`: how many there may be, if not one for each core.
        """
        self._all = [Packer(keep_open) for _ in range(most or min(_MOST, len(os.sched_getaffinity(0))))]
        self.first = self._all[0]

    def __iter__(self) -> "Iterator[Packer]":
        return iter(self._all)

    def batches(self, memory: int) -> int:
        """How many batches may be at work, where there are `memory` bytes for data: so that all who are there have
        enough to do, one who is not is called for, and threads have something when all who are there are late.
        """
        ready = sum(packer.is_ready for packer in self._all)
        late = ready > 0 and all(packer.is_late for packer in self._all if packer.is_ready)
        return _ENOUGH * (max(1, min(ready + 1, len(self._allowed(memory)))) + late)

    @property
    def late_batches(self) -> int:
        return sum(packer.batches for packer in self._all if packer.is_late)

    def least_busy(self, memory: int) -> "Packer | None":
        """Who should have the next batch; None if nobody can yet."""
        best: Packer | None = None
        for packer in self._allowed(memory):
            packer.start()
            if not packer.is_ready:
                break
            if packer.is_late:
                continue
            if best is None or packer.batches < best.batches:
                best = packer
            if best.batches < _ENOUGH:
                break
        return best

    def call_another(self, memory: int) -> None:
        """Start the next process: it will be wanted soon."""
        for packer in self._allowed(memory):
            if not packer.pid:
                packer.start()
                return

    def _allowed(self, memory: int) -> "list[Packer]":
        return self._all[: max(0, memory // _MEMORY_EACH)]

    async def end_idle(self) -> None:
        for packer in self._all:
            await packer.end_if_idle(stays_to_send=packer is self.first)

    async def stop(self) -> None:
        for packer in self._all:
            await packer.stop()


class Packer:
    """A process, or the place where it will be."""

    def __init__(self, keep_open: Sequence[int] = ()) -> None:
        """`keep_open`: as for all of them."""
        self.is_ready = False
        self._keep_open = tuple(keep_open)
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None  # until it is lost, or told to end
        self._end: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Future[list[int]]] = {}  # by the batch's number
        self._due: list[float] = []  # when the batches of which images are being made should be there
        self._numbers = itertools.count(1)
        self._has_sent = False  # to a remote
        self.lost_lines: set[int] = set()
        self._not_before = 0.0
        self._used_at = 0.0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def batches(self) -> int:
        """That are under way."""
        return len(self._waiting)

    @property
    def is_late(self) -> bool:
        """Whether it can't get on: it goes last (`packing.serve`), and others leave it nothing."""
        return bool(self._due) and time.monotonic() > min(self._due)

    def start(self) -> None:
        """Start the process, unless it is there or was lost just now. It is of use when it says that it is ready."""
        if self._process or time.monotonic() < self._not_before:
            return
        self._used_at = time.monotonic()
        self._not_before = self._used_at + _AGAIN_S
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            ours.setblocking(False)
            self._process = subprocess.Popen(
                [sys.executable, "-SPc", _PROGRAM, str(its.fileno())],
                pass_fds=(its.fileno(), *self._keep_open),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [*sys.path, _OURS]))},
                start_new_session=True,
            )
            asyncio.get_running_loop().add_reader(ours, self._answered)
            self._socket = ours
        except OSError as error:
            log.warning("no process can be started to compress in, a thread does it: %s", error.strerror)
            ours.close()
        finally:
            its.close()

    async def pack(self, wanted: Sequence[Wanted]) -> list[int]:
        """What `packing.pack` returns for each, FAILED for all if the process can't be asked."""
        kind = b"M" if any(device.has_dropped for device, _, _ in wanted) else b"P"
        return await self._ask(kind, REQUEST, wanted, LATE_S, _PATIENCE_S)

    async def make_denser(self, wanted: Sequence[Wanted]) -> list[int]:
        """What `packing.make_denser` returns for each, FAILED for all if the process can't be asked."""
        return await self._ask(b"D", REQUEST, wanted, LATE_S, _DENSE_PATIENCE_S)

    async def send(self, wanted: Sequence[WantedToSend]) -> list[int]:
        """Have images stored in a remote, or in RAM if they had to be made and compress; the word of each, or FAILED if
        it is not known to be there.
        """
        self._has_sent = True
        late_s = _SEND_LATE_S if any(one.word & RESIDENT for one in wanted) else _SEND_PATIENCE_S
        return await self._ask(b"S", REQUEST_TO_SEND, wanted, late_s, _SEND_PATIENCE_S)

    def give_line(self, number: int, replicas: int, secret: bytes, fd: int) -> None:
        """The process has a socket to a node of the remote from now on. OSError if it can't be told."""
        assert self._socket
        socket.send_fds(self._socket, [HEAD.pack(b"C", number) + bytes((replicas,)) + secret], [fd])

    async def _ask(
        self,
        kind: bytes,
        layout: Struct,
        wanted: "Sequence[Wanted] | Sequence[WantedToSend]",
        late_s: float,
        patience_s: float,
    ) -> list[int]:
        assert self._socket
        number = next(self._numbers)
        devices = list(dict.fromkeys(one[0] for one in wanted))
        places = {device: place for place, device in enumerate(devices)}
        files = [file for device in devices for file in (device.backing.hot_fd, device.backing.cold_fd)]
        batch = b"".join(
            layout.pack(places[device], device.codec.block_bytes, device.codec.level, *rest) for device, *rest in wanted
        )
        try:
            socket.send_fds(self._socket, [HEAD.pack(kind, number) + batch], files)
        except OSError:
            return [FAILED] * len(wanted)
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[list[int]] = loop.create_future()
        self._waiting[number] = waiting
        due = time.monotonic() + late_s
        self._due.append(due)
        patience = loop.call_later(patience_s, self._lose, f"has not answered for {patience_s:g} s")
        try:
            return await waiting or [FAILED] * len(wanted)
        finally:
            patience.cancel()
            self._due.remove(due)
            self._used_at = time.monotonic()

    def _answered(self) -> None:
        assert self._socket
        try:
            answer = self._socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            answer = b""
        if not answer:
            self._lose("has gone")
        elif answer == READY:
            self.is_ready = True
        else:
            kind, number = HEAD.unpack_from(answer)
            if kind == b"L":
                self.lost_lines.add(number)
                return
            waiting = self._waiting.pop(number)
            if not waiting.done():
                waiting.set_result([word for (word,) in ANSWER.iter_unpack(answer[HEAD.size :])])

    def _lose(self, how: str) -> None:
        if not self._socket:  # that is known
            return
        log.warning("the process that compresses %s: a thread goes on, and there will be another one", how)
        self._forget()

    def _forget(self) -> None:
        """End the process, and tell who waits when it is gone: it must not write any more when others do its work."""
        self._hang_up()
        self.lost_lines.clear()
        waiting, self._waiting = self._waiting, {}
        if self._process:
            self._process.kill()
            self._end = asyncio.create_task(self._see_to_its_end(self._process, list(waiting.values())))

    async def _see_to_its_end(
        self, process: subprocess.Popen[bytes], waiting: "list[asyncio.Future[list[int]]]"
    ) -> None:
        await asyncio.to_thread(process.wait)  # it goes last, also in this
        self._process = None
        for one in waiting:
            if not one.done():
                one.set_result([])

    def _hang_up(self) -> None:
        self.is_ready = self._has_sent = False
        if self._socket:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    async def end_if_idle(self, *, stays_to_send: bool = False) -> None:
        """End the process if nobody has needed it for a while; `stays_to_send`: unless it has sent to a remote."""
        process = self._process
        idle = self.is_ready and not self._waiting and time.monotonic() - self._used_at > _IDLE_S
        if process and idle and not (stays_to_send and self._has_sent):
            self._process, self._not_before = None, 0.0
            self._hang_up()
            process.kill()  # it has nothing to do, and may have been stopped
            await asyncio.to_thread(process.wait)

    async def stop(self) -> None:
        """End the process. It is seen to its end, because it writes to files that others may want to have."""
        if self._socket:
            self._forget()
        if self._end:
            await self._end
