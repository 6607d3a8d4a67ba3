"""The control socket: HTTP with JSON over a Unix socket that only its owner may open.

    GET /v1/stats      everything of `snapshot.take`

It runs in a thread of its own, so that looking costs the event loop nothing: all that is read are plain numbers.
"""

import http.client
import json
import logging
import os
import socket
import socketserver
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from nbdram.config import Endpoint, runtime_directory
from nbdram.errors import NbdramError
from nbdram.server.listeners import open_listeners, unlink_if_ours

log = logging.getLogger("nbdram.control")

_TIMEOUT_S = 5.0


def default_path() -> Path:
    return runtime_directory() / "nbdram.control"


class ControlServer(socketserver.ThreadingMixIn, socketserver.BaseServer):
    """Answers questions about a server; `snapshot` gives the answer to /v1/stats."""

    daemon_threads = True

    def __init__(self, path: Path, snapshot: Callable[[], dict[str, Any]]) -> None:
        self.socket = open_listeners(Endpoint(path=str(path)))[0]
        self.socket.listen()
        self._path, self._inode = path, os.lstat(path).st_ino
        self.snapshot = snapshot
        super().__init__(str(path), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, name="nbdram-control", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread, which would look for the end twice a second
        self.shutdown()
        self._thread.join()
        self.socket.close()
        unlink_if_ours(str(self._path), self._inode)

    def fileno(self) -> int:
        return self.socket.fileno()

    def get_request(self) -> tuple[socket.socket, str]:
        connection, _ = self.socket.accept()
        connection.settimeout(_TIMEOUT_S)
        return connection, "local"

    def shutdown_request(self, request: Any) -> None:
        request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a control client went away", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: ControlServer

    def do_GET(self) -> None:
        if self.path != "/v1/stats":
            self.send_error(404)
            return
        body = json.dumps(self.server.snapshot()).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "local"

    def log_message(self, format: str, *arguments: Any) -> None:
        log.debug(format, *arguments)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(str(self._path))


def ask(path: Path, what: str) -> dict[str, Any]:
    """GET /v1/`what` from the server that listens at `path`."""
    connection = _UnixConnection(path)
    try:
        connection.request("GET", f"/v1/{what}")
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or error
        raise NbdramError(f"no server answers at {path} ({reason}): is it running, with --control {path}?") from error
    finally:
        connection.close()
    if response.status != 200:
        raise NbdramError(f"the server at {path} answered {response.status} {response.reason}")
    answer: dict[str, Any] = json.loads(body)
    return answer
