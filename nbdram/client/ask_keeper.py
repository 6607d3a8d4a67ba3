"""Ask the keeper for something, and start it if there is none. Imports little: every command goes this way.

Who asks holds the *door*, a lock that many can share; a keeper that has nothing left to keep ends only while it has
the door for itself. So none ends between our finding it and its answer. It takes the files with it that a keeper has
while it runs; who waited for one of them notices, and takes the new one.
"""

import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from nbdram.errors import NbdramError

SOCKET_NAME: Final = "keeper.sock"
DOOR_NAME: Final = "keeper.door"
LOG_NAME: Final = "keeper.log"
_START_TIMEOUT_S: Final = 90.0  # a machine that boots may be busy
_ANSWER_TIMEOUT_S: Final = 120.0
_ROOTS: Final = "the keeper's socket is root's: run it as root, or with sudo"


def ask(directory: Path, what: str, **details: Any) -> dict[str, Any]:
    """The keeper's answer; a keeper is started if there is none. NbdramError with what it says is wrong."""
    with _door(directory, os.O_CREAT):
        sock = _connect(directory)
        if sock is None:
            _start(directory)
            sock = _await(directory)
        return _converse(sock, {"do": what, **details})


def ask_if_running(directory: Path, what: str, **details: Any) -> dict[str, Any] | None:
    """The same, but None if there is no keeper."""
    try:
        with _door(directory, os.O_CREAT if os.path.exists(directory / SOCKET_NAME) else 0):
            sock = _connect(directory)
            return _converse(sock, {"do": what, **details}) if sock else None
    except FileNotFoundError:
        return None


def lock_file(path: Path, how: int, create: int = os.O_CREAT) -> int:
    """Open a file and lock it, BlockingIOError if `how` says not to wait. It is none that was removed meanwhile."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | create, 0o600)
        try:
            fcntl.flock(descriptor, how)
            if os.fstat(descriptor).st_nlink:
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


@contextmanager
def _door(directory: Path, create: int) -> Iterator[None]:
    """FileNotFoundError if there is none, and none is to be made."""
    try:
        if create:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = lock_file(directory / DOOR_NAME, fcntl.LOCK_SH, create)
    except PermissionError:
        raise NbdramError(_ROOTS) from None
    try:
        yield
    finally:
        os.close(descriptor)


def _converse(sock: socket.socket, question: dict[str, Any]) -> dict[str, Any]:
    with sock, sock.makefile("rb") as answers:
        sock.settimeout(_ANSWER_TIMEOUT_S)
        try:
            sock.sendall(json.dumps(question).encode() + b"\n")
            answer = json.loads(answers.readline() or b'{"error": "the keeper ended before it answered: try again"}')
        except OSError as error:
            raise NbdramError(f"the keeper does not answer ({error.strerror or error}): see its log") from error
    if "error" in answer:
        raise NbdramError(answer["error"])
    return dict(answer)


def _connect(directory: Path) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(str(directory / SOCKET_NAME))
    except PermissionError:
        sock.close()
        raise NbdramError(_ROOTS) from None
    except OSError:
        sock.close()
        return None
    return sock


def _start(directory: Path) -> None:
    """Start a keeper that ends when it has nothing left to keep; another one may win the race, which is fine."""
    argv = [sys.executable, "-P", "-m", "nbdram", "keeper", "--until-idle", "--directory", str(directory)]
    with (directory / LOG_NAME).open("ab") as log:
        subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,
            env=dict(os.environ),
        )


def _await(directory: Path) -> socket.socket:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while (sock := _connect(directory)) is None:
        if time.monotonic() > deadline:
            raise NbdramError(f"the keeper does not start: see {directory / LOG_NAME}")
        time.sleep(0.02)
    return sock
