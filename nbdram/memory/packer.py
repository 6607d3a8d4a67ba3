"""A process that makes images for reclaim: it shares no interpreter lock with the event loop.

With a thread each call of the compressor, and there are a dozen for a cluster, is a wake-up and a wait for the loop.
All state is in files and words, so that the process needs to know nothing but what each batch tells (`packing.py`).

It costs about 6 MiB, which count as the server's, and is started when there is first something to compress. Until it is
there, when there can be none, and when it was lost, threads do its work.
"""

import asyncio
import logging
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from nbdram.memory.device import Device
from nbdram.memory.packing import ANSWER, FAILED, READY, REQUEST

log = logging.getLogger("nbdram.reclaim")

_DYING_S: Final = 0.1  # between a process's last file and its end
_AGAIN_S: Final = 10.0  # after this a lost process is replaced
_PROGRAM: Final = "import sys; from nbdram.memory.packing import serve; serve(int(sys.argv[1]))"

Wanted = tuple[Device, int, int]  # a device, one of its clusters, and its word


class Packer:
    """The process, or the place where it will be. For one event loop."""

    def __init__(self, keep_open: Sequence[int] = ()) -> None:
        """`keep_open`: descriptors that the process has too: locks of what it writes to, should it outlive us."""
        self.is_ready = False
        self._keep_open = tuple(keep_open)
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._waiting: deque[asyncio.Future[list[int]]] = deque()
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
        try:
            self._send(wanted)
        except OSError:
            return [FAILED] * len(wanted)
        waiting: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        return await waiting or [FAILED] * len(wanted)

    def _send(self, wanted: Sequence[Wanted]) -> None:
        assert self._socket
        devices = list(dict.fromkeys(device for device, _, _ in wanted))
        numbers = {device: number for number, device in enumerate(devices)}
        files = [file for device in devices for file in (device.backing.hot_fd, device.backing.cold_fd)]
        batch = b"".join(
            REQUEST.pack(numbers[device], device.codec.block_bytes, device.codec.level, cluster, word)
            for device, cluster, word in wanted
        )
        socket.send_fds(self._socket, [batch], files)

    def _answered(self) -> None:
        assert self._socket
        try:
            answer = self._socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            answer = b""
        if not answer:
            log.warning("the process that compresses has gone: a thread goes on, and there will be another one")
            self._forget()
        elif answer == READY:
            self.is_ready = True
        else:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result([number for (number,) in ANSWER.iter_unpack(answer)])

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
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result([])

    async def stop(self) -> None:
        """End the process. It is seen to its end, because it writes to files that others may want to have."""
        process = self._process
        self._forget()
        if process:
            await asyncio.to_thread(process.wait)
