"""A process that makes images for reclaim: it shares no interpreter lock with the event loop.

With a thread each call of the compressor, and there are a dozen for a cluster, is a wake-up and a wait for the loop.
All state is in files and words, so that the process needs to know nothing but what each batch tells (`packing.py`), and
for images that go to a remote, the connections to its nodes.

It costs about 6 MiB, twice that with a remote, which count as the server's, and is started when there is first
something to compress. Until it is there, when there can be none, and when it was lost, threads do its work.
"""

import asyncio
import itertools
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from struct import Struct
from typing import Final, NamedTuple

from nbdram.memory.device import Device
from nbdram.memory.packing import ANSWER, FAILED, HEAD, READY, REQUEST, REQUEST_TO_SEND

log = logging.getLogger("nbdram.reclaim")

_DYING_S: Final = 0.1  # between a process's last file and its end
_AGAIN_S: Final = 10.0  # after this a lost process is replaced
_PATIENCE_S: Final = 5.0  # for a batch, which takes milliseconds: somebody has stopped the process
_SEND_PATIENCE_S: Final = 30.0  # to a remote: the process itself gives up a node that is silent
_PROGRAM: Final = "import sys; from nbdram.memory.packing import serve; serve(int(sys.argv[1]))"

Wanted = tuple[Device, int, int]  # a device, one of its clusters, and its word


class WantedToSend(NamedTuple):
    """An image that is to be stored in a remote."""

    device: Device
    cluster: int
    word: int
    line: int  # the number of the connection
    identity: bytes  # of the device
    generation: int


class Packer:
    """The process, or the place where it will be. For one event loop."""

    def __init__(self, keep_open: Sequence[int] = ()) -> None:
        """`keep_open`: descriptors that the process has too: locks of what it writes to, should it outlive us."""
        self.is_ready = False
        self._keep_open = tuple(keep_open)
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._waiting: dict[int, asyncio.Future[list[int]]] = {}  # by the batch's number
        self._numbers = itertools.count(1)
        self.lost_lines: set[int] = set()
        self._not_before = 0.0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process, unless it is there or was lost just now. It is of use when it says that it is ready."""
        if self._process or time.monotonic() < self._not_before:
            return
        self._not_before = time.monotonic() + _AGAIN_S
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            ours.setblocking(False)
            self._process = subprocess.Popen(
                [sys.executable, "-Pc", _PROGRAM, str(its.fileno())],
                pass_fds=(its.fileno(), *self._keep_open),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
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
        return await self._ask(b"P", REQUEST, wanted, _PATIENCE_S)

    async def send(self, wanted: Sequence[WantedToSend]) -> list[int]:
        """Have images stored in a remote; the word of each, or FAILED if it is not known to be there."""
        return await self._ask(b"S", REQUEST_TO_SEND, wanted, _SEND_PATIENCE_S)

    def give_line(self, number: int, replicas: int, secret: bytes, fd: int) -> None:
        """The process has a socket to a node of the remote from now on. OSError if it can't be told."""
        assert self._socket
        socket.send_fds(self._socket, [HEAD.pack(b"C", number) + bytes((replicas,)) + secret], [fd])

    async def _ask(
        self, kind: bytes, layout: Struct, wanted: "Sequence[Wanted] | Sequence[WantedToSend]", patience_s: float
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
        patience = loop.call_later(patience_s, self._lose, f"has not answered for {patience_s:g} s")
        try:
            return await waiting or [FAILED] * len(wanted)
        finally:
            patience.cancel()

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
        log.warning("the process that compresses %s: a thread goes on, and there will be another one", how)
        self._forget()

    def _forget(self) -> None:
        """See to it that the process is gone: it must not write any more when others do its work. Tell who waits."""
        self.is_ready = False
        if self._socket:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
        if self._process:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_DYING_S)
            self._process = None
        self.lost_lines.clear()
        while self._waiting:
            _, waiting = self._waiting.popitem()
            if not waiting.done():
                waiting.set_result([])

    async def stop(self) -> None:
        """End the process. It is seen to its end, because it writes to files that others may want to have."""
        process = self._process
        self._forget()
        if process:
            await asyncio.to_thread(process.wait)
