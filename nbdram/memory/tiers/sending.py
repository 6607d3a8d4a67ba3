"""Images on their way to a remote, sealed and sent by the process that compresses: a connection for each node.

An image is copied once on its way from the cold file to the socket, and nothing else has to wait for it: the server
only gets the word of what is stored. What goes out is written by hand, because it is always the same:

    SET key value                after each image: +OK, or an error
    WAIT replicas milliseconds   after each batch, if replicas are wanted: how many have all of it

Nobody is woken for an answer that does not complete a batch: the kernel is told how many bytes to wait for
(SO_RCVLOWAT). Each wake-up is for some five images then, and that saved a tenth of the process's CPU.

The server makes the connections (`writes.py`) and hands their sockets over. All that is done about errors is to say so:
the image stays where it is, and the server sends it in its own way (`engine.py`), which knows what is to be done.
"""

import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from struct import Struct
from typing import Final

from nbdram.memory.packing import ANSWER, FAILED, HEAD
from nbdram.memory.tiers.seal import Seal

ANSWER_S: Final = 3.0  # a node that is silent for so long is given up
WAIT_MS: Final = 1000  # for replicas
IMAGE_PREFIX: Final = b"nbdram:image:"
SEAL_PURPOSE: Final = b"nbdram remote"
_MOST_BUFFERS: Final = 512  # in one call
_RECEIVE_BYTES: Final = 1 << 16
_OK: Final = b"+OK"
_OK_BYTES: Final = len(b"+OK\r\n")  # no answer to SET is shorter
_HAVE_BYTES: Final = len(b":0\r\n")  # nor one to WAIT

_LABEL: Final = Struct(">16sQQ")

Buffer = bytes | memoryview


def image_key(device: bytes, cluster: int, generation: int) -> bytes:
    """Where an image of the device, whose UUID has these 16 bytes, is kept."""
    return b"%s%x:%016x" % (_prefix(device), cluster, generation)


@lru_cache(64)
def _prefix(device: bytes) -> bytes:
    return IMAGE_PREFIX + device.hex().encode() + b":"


def image_label(device: bytes, cluster: int, generation: int) -> bytes:
    """What is authenticated with an image."""
    return _LABEL.pack(device, cluster, generation)


class Batch:
    """Images that are answered for together."""

    def __init__(self, head: bytes, count: int) -> None:
        self.answers = [FAILED] * count
        self.left = count
        self._head = head

    def message(self) -> bytes:
        return self._head + b"".join(map(ANSWER.pack, self.answers))


Stored = tuple[Batch, int, int]  # the image's number in its batch, and its word


class Line:
    """The connection to one node."""

    def __init__(self, number: int, replicas: int, fd: int) -> None:
        self.number = number
        self.replicas = replicas
        self.socket = socket.socket(fileno=fd)
        self.socket.setblocking(False)
        self.unsent: list[Buffer] = []
        self.is_blocked = False  # and sends on when the socket has room
        self.waiting: deque[Stored | None] = deque()  # in the order of the answers; None: that to WAIT
        self.unconfirmed: list[Stored] = []  # the master has them, nobody knows whether the replicas do
        self.heard_at = 0.0
        self._received = b""
        self._wakes_at = 1  # so many bytes

    def set(self, key: bytes, sealed: Sequence[bytes], stored: Stored) -> None:
        length = sum(map(len, sealed))
        self.unsent.append(b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n%s" % (len(key), key, length, sealed[0]))
        self.unsent += sealed[1:]
        self.unsent.append(b"\r\n")
        self._expect(stored)

    def wait(self) -> None:
        if self.replicas and self.waiting and self.waiting[-1] is not None:
            words = b"%d" % self.replicas, b"%d" % WAIT_MS
            self.unsent.append(b"*3\r\n$4\r\nWAIT\r\n" + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words))
            self._expect(None)

    def doze(self) -> None:
        """Be woken when all is there that the first batch waits for."""
        least = -len(self._received)
        for stored in self.waiting:
            if stored is None:
                least += _HAVE_BYTES
                break
            first = self.waiting[0]
            if not self.replicas and first and stored[0] is not first[0]:
                break
            least += _OK_BYTES
        if least != self._wakes_at:
            self._wakes_at = least
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, max(1, least))

    def _expect(self, stored: Stored | None) -> None:
        if not self.waiting:
            self.heard_at = time.monotonic()
        self.waiting.append(stored)

    def send(self) -> None:
        """As much as the socket takes. OSError if it is lost."""
        while self.unsent:
            try:
                sent = self.socket.sendmsg(self.unsent[:_MOST_BUFFERS])
            except BlockingIOError:
                return
            whole = 0
            while whole < len(self.unsent) and sent >= len(self.unsent[whole]):
                sent -= len(self.unsent[whole])
                whole += 1
            del self.unsent[:whole]
            if sent:
                self.unsent[0] = memoryview(self.unsent[0])[sent:]

    def receive(self) -> list[tuple[Stored, bool]]:
        """What became of images, of which by now it is known. OSError if the connection is lost."""
        try:
            received = self.socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return []
        if not received:
            raise ConnectionResetError
        self.heard_at = time.monotonic()
        *replies, self._received = (self._received + received).split(b"\r\n")
        if len(replies) > len(self.waiting):
            raise ConnectionAbortedError
        known: list[tuple[Stored, bool]] = []
        for reply in replies:
            stored = self.waiting.popleft()
            if stored is None:
                enough = reply[:1] == b":" and reply[1:].isdigit() and int(reply[1:]) >= self.replicas
                known += [(one, enough) for one in self.unconfirmed]
                self.unconfirmed.clear()
            elif reply == _OK and self.replicas:
                self.unconfirmed.append(stored)
            else:
                known.append((stored, reply == _OK))
        return known

    def unknown(self) -> list[Stored]:
        """The images of which it is not known what became of them."""
        return self.unconfirmed + [stored for stored in self.waiting if stored]


class Sending:
    """All connections of the process, and what is under way on them. `server`: the socket to the server."""

    def __init__(self, server: socket.socket) -> None:
        self._server = server
        self._lines: dict[int, Line] = {}
        self._by_fd: dict[int, Line] = {}
        self._seal: Seal | None = None
        self._poll = select.poll()
        self._poll.register(server, select.POLLIN)

    def open(self, number: int, replicas: int, secret: bytes, fd: int) -> None:
        """A connection to a node; `secret` is what images are sealed with."""
        if self._seal is None:
            self._seal = Seal(secret, SEAL_PURPOSE, "in the remote")
        self._lines[number] = self._by_fd[fd] = Line(number, replicas, fd)
        self._poll.register(fd, select.POLLIN)

    def store(self, stored: Stored, number: int, sealed_as: tuple[bytes, int, int], image: bytes | bytearray) -> None:
        """An image for connection `number`, on its way after `flush`; `sealed_as`: device, cluster, generation."""
        line = self._lines.get(number)
        if line is None or self._seal is None:
            self.settle([(stored, False)])
        else:
            line.set(image_key(*sealed_as), self._seal.parts(image, image_label(*sealed_as)), stored)

    def flush(self) -> None:
        """What there is of a batch is complete."""
        for line in list(self._lines.values()):
            line.wait()
            line.doze()
            self._send(line)

    def until_told(self) -> None:
        """See to the connections until there is a message from the server."""
        while True:
            is_busy = any(line.waiting for line in self._lines.values())
            told = False
            for fd, event in self._poll.poll(1000 * ANSWER_S / 3 if is_busy else None):
                line = self._by_fd.get(fd)
                if line is None:
                    told = told or fd == self._server.fileno()
                elif event & ~select.POLLOUT:
                    self._receive(line)
                else:
                    self._send(line)
            if is_busy:
                silent = time.monotonic() - ANSWER_S
                for line in [one for one in self._lines.values() if one.waiting and one.heard_at < silent]:
                    self._receive(line)  # it may have said something
                    if line.heard_at < silent and line.number in self._lines:
                        self._lose(line)
            if told:
                return

    def _send(self, line: Line) -> None:
        try:
            line.send()
        except OSError:
            self._lose(line)
            return
        if line.is_blocked != bool(line.unsent):
            line.is_blocked = bool(line.unsent)
            self._poll.modify(line.socket, select.POLLIN | select.POLLOUT if line.is_blocked else select.POLLIN)

    def _receive(self, line: Line) -> None:
        try:
            known = line.receive()
        except OSError:  # it is closed, or says what nobody has asked for
            self._lose(line)
        else:
            self.settle(known)
            line.doze()

    def _lose(self, line: Line) -> None:
        """What was under way may or may not be stored."""
        del self._lines[line.number], self._by_fd[line.socket.fileno()]
        self._poll.unregister(line.socket)
        line.socket.close()
        self._server.send(HEAD.pack(b"L", line.number))
        self.settle([(stored, False) for stored in line.unknown()])

    def settle(self, known: list[tuple[Stored, bool]]) -> None:
        """Of these images it is known whether they are stored. Who waits for a batch is told when that is so of all."""
        for (batch, at, word), is_stored in known:
            if is_stored:
                batch.answers[at] = word
            batch.left -= 1
            if not batch.left:
                self._server.send(batch.message())

    def close(self) -> None:
        for line in self._lines.values():
            with suppress(OSError):
                line.socket.close()
