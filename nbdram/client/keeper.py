"""The keeper: one process on a host that keeps all its devices attached, and a socket to ask it for things.

A question is one line of JSON, {"do": "attach", ...}, and so is the answer, {"error": "..."} if there is one. A lock
makes sure that there is one keeper; a new one goes on with the devices of one that was killed. When a keeper ends, it
removes its socket, its door (see `ask_keeper`) and at last its lock; its log stays, for those who want to know.
"""

import fcntl
import json
import logging
import os
import socketserver
import threading
import time
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from nbdram.client import sysfs
from nbdram.client.ask_keeper import DOOR_NAME, SOCKET_NAME, lock_file
from nbdram.client.attachment import Attachment, Notes
from nbdram.client.kept import KeptDevice
from nbdram.client.mount_watch import MountWatch
from nbdram.errors import NbdramError

log = logging.getLogger("nbdram.keeper")

_LOCK_NAME: Final = "keeper.lock"
_LONGEST_PATH: Final = 107  # of a Unix socket
_LINGER_S: Final = 2.0
_PATIENCE_S: Final = 3.0  # with a keeper that is about to end
_REQUEST_TIMEOUT_S: Final = 5.0
_THREAD_STACK_BYTES: Final = 512 << 10  # all of it is locked in memory


class Keeper:
    """Keeps devices, and answers at its socket in `directory` until it is told to stop.

    Stopping leaves the devices as they are. NbdramError if there is a keeper already.
    """

    def __init__(self, directory: Path) -> None:
        if len(os.fsencode(directory / SOCKET_NAME)) > _LONGEST_PATH:
            raise NbdramError(f"{directory} is too long a path for a keeper's socket: name another --directory")
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        self._lock_file = _lock(directory / _LOCK_NAME)
        self._door = os.open(directory / DOOR_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.notes = Notes(directory)
        self._devices: dict[int, KeptDevice] = {}
        self._guard = threading.Lock()
        self._busy = 0
        threading.stack_size(_THREAD_STACK_BYTES)
        self._listener = _Listener(directory / SOCKET_NAME, self)

    def run(self, *, until_idle: bool) -> None:
        """Go on with what is attached, then answer; `until_idle`: until there is nothing left to keep."""
        for attachment in self.notes.find():
            self._devices[attachment.index] = KeptDevice.adopt(attachment, self.notes)
        MountWatch().start()
        if until_idle:
            threading.Thread(target=self._stop_when_idle, daemon=True).start()
        self._listener.serve_forever(poll_interval=0.2)
        self._listener.server_close()
        self._clear_up()

    def stop(self) -> None:
        """May be called from any thread, or from a signal's handler."""
        threading.Thread(target=self._listener.shutdown, daemon=True).start()

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        with self._guard:
            self._busy += 1
        try:
            match question.get("do"):
                case "attach":
                    return self._attach(question)
                case "detach":
                    return self._detach(int(question["index"]))
                case "look":
                    for device in self._kept():
                        device.look()
                    return {}
                case "status":
                    return {"pid": os.getpid(), "devices": [device.status() for device in self._kept()]}
                case other:
                    return {"error": f"the keeper does not know how to {other}: is it of another version?"}
        except NbdramError as error:
            return {"error": str(error)}
        finally:
            with self._guard:
                self._busy -= 1

    def _attach(self, question: dict[str, Any]) -> dict[str, Any]:
        known = {item.name for item in fields(Attachment)}
        wanted = Attachment(**{name: value for name, value in question.items() if name in known})
        kept = KeptDevice.attach(wanted, self.notes)
        with self._guard:
            self._devices[kept.attachment.index] = kept
        return kept.status()

    def _detach(self, index: int) -> dict[str, Any]:
        with self._guard:
            kept = self._devices.get(index)
        if kept is None or kept.is_gone:
            raise NbdramError(f"{sysfs.path_of(index)} is not attached by nbdram: see `nbdram attach --status`")
        kept.detach()
        with self._guard:
            self._devices.pop(index, None)
        return {}

    def _kept(self) -> list[KeptDevice]:
        with self._guard:
            for index in [index for index, kept in self._devices.items() if kept.is_gone]:
                del self._devices[index]
            return [kept for _, kept in sorted(self._devices.items())]

    def _stop_when_idle(self) -> None:
        idle = 0.0
        while idle < _LINGER_S or not self._shut_door():
            threading.Event().wait(0.25)
            idle = 0.0 if self._busy or self._kept() else idle + 0.25
        log.info("nothing left to keep")
        self._listener.shutdown()

    def _clear_up(self) -> None:
        """Remove the files of this process; who has the lock owns them, so it goes last."""
        (self._directory / SOCKET_NAME).unlink(missing_ok=True)
        if self._shut_door():
            (self._directory / DOOR_NAME).unlink(missing_ok=True)
        (self._directory / _LOCK_NAME).unlink(missing_ok=True)
        os.close(self._door)
        os.close(self._lock_file)

    def _shut_door(self) -> bool:
        """Until this process is gone nobody comes in to ask; False if somebody is in."""
        try:
            fcntl.flock(self._door, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


class _Listener(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, path: Path, keeper: Keeper) -> None:
        self.keeper = keeper
        path.unlink(missing_ok=True)  # the lock says that nobody listens there
        old = os.umask(0o177)
        try:
            super().__init__(str(path), _Handler)
        finally:
            os.umask(old)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.warning("a question could not be answered", exc_info=True)


class _Handler(socketserver.StreamRequestHandler):
    server: _Listener
    timeout = _REQUEST_TIMEOUT_S

    def handle(self) -> None:
        line = self.rfile.readline(1 << 16)
        if line:
            answer = self.server.keeper.answer(json.loads(line))
            with suppress(OSError):  # who asked may be gone
                self.wfile.write(json.dumps(answer).encode() + b"\n")


def _lock(path: Path) -> int:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return lock_file(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise NbdramError(f"there is a keeper already, for {path.parent}") from None
        time.sleep(0.01)
