"""The control socket: HTTP with JSON over a Unix socket that only its owner may open.

    GET    /v1/stats                  everything of `snapshot.take`
    GET    /v1/status                 everything of the status page
    GET    /v1/exports                what `server/admin.py` does; docs/control.md has all of it
    POST   /v1/exports
    DELETE /v1/exports/NAME[?force]
    POST   /v1/exports/NAME/resize
    POST   /v1/reload

It runs in a thread of its own, so that looking costs the event loop nothing: all that is read are plain numbers.
What changes anything is handed to the loop. Errors are {"error": a sentence}.
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
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

from nbdram.config import Endpoint, runtime_directory
from nbdram.errors import Conflict, NbdramError, NoSuchExport, UsageError
from nbdram.server.listeners import open_listeners, unlink_if_ours

if TYPE_CHECKING:
    from nbdram.server.admin import Admin

log = logging.getLogger("nbdram.control")

Facts = Callable[[], dict[str, Any]]

_TIMEOUT_S: Final = 20.0
_ROOTS: Final = Path("/run/nbdram.control")
_MAX_BODY_BYTES: Final = 64 * 1024


def default_path() -> Path:
    return runtime_directory() / "nbdram.control"


class ControlServer(socketserver.ThreadingMixIn, socketserver.BaseServer):
    """Answers questions about a server, and changes it; `snapshot` and `status` answer /v1/stats and /v1/status."""

    daemon_threads = True

    def __init__(self, path: Path, snapshot: Facts, status: Facts, admin: "Admin") -> None:
        self.socket = open_listeners(Endpoint(path=str(path)))[0]
        self.socket.listen()
        self._path, self._inode = path, os.lstat(path).st_ino
        self.snapshot = snapshot
        self.status = status
        self.admin = admin
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
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def _answer(self, method: str) -> None:
        try:
            status, answer = self._act(method)
        except UsageError as error:
            status, answer = 400, {"error": str(error)}
        except NoSuchExport as error:
            status, answer = 404, {"error": str(error)}
        except Conflict as error:
            status, answer = 409, {"error": str(error)}
        except NbdramError as error:
            status, answer = 500, {"error": str(error)}
        except TimeoutError:
            status, answer = 500, {"error": "the server did not get it done in time"}
        except Exception:
            log.exception("%s %s failed unexpectedly", method, self.path)
            status, answer = 500, {"error": "the server failed; its log says more"}
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _act(self, method: str) -> tuple[int, dict[str, Any]]:
        """Do what is asked; the status and the answer."""
        admin = self.server.admin
        parts = urlsplit(self.path)
        received = self._received()  # also by who does not want it: a client that still sends would hear nothing
        match method, *[unquote(part) for part in parts.path.split("/")[1:]]:
            case ["GET", "v1", "stats"]:
                return 200, self.server.snapshot()
            case ["GET", "v1", "status"]:
                return 200, self.server.status()
            case ["GET", "v1", "exports"]:
                return 200, admin.list()
            case ["POST", "v1", "exports"]:
                return 201, admin.create(_object(received))
            case ["DELETE", "v1", "exports", name]:
                return 200, admin.remove(name, force=parts.query == "force")
            case ["POST", "v1", "exports", name, "resize"]:
                return 200, admin.resize(name, _object(received))
            case ["POST", "v1", "reload"]:
                return 200, admin.reload(_object(received))
        return 404, {"error": f"there is no {method} {parts.path}"}

    def _received(self) -> bytes:
        length = self.headers.get("Content-Length", "0")
        if not length.isdigit() or int(length) > _MAX_BODY_BYTES:
            raise UsageError(f"a request may have at most {_MAX_BODY_BYTES} bytes, and must say how many")
        return self.rfile.read(int(length))

    def address_string(self) -> str:
        return "local"

    def log_message(self, format: str, *arguments: Any) -> None:
        log.debug(format, *arguments)


def _object(received: bytes) -> dict[str, Any]:
    try:
        body = json.loads(received)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise UsageError("a request must be an object in JSON")
    return body


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(str(self._path))


def ask(path: Path, what: str, method: str = "GET", body: dict[str, Any] | None = None) -> dict[str, Any]:
    """`method` /v1/`what` at the server that listens at `path`; its refusal is raised, as UsageError if it is one."""
    connection = _UnixConnection(path)
    try:
        connection.request(method, f"/v1/{what}", None if body is None else json.dumps(body))
        response = connection.getresponse()
        answer: dict[str, Any] = json.loads(response.read())
    except PermissionError as error:
        raise NbdramError(f"the server at {path} answers its owner only: use sudo, or be that user") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        theirs = path == default_path() != _ROOTS and _ROOTS.exists()
        advice = f"for the one at {_ROOTS}, use sudo" if theirs else f"is it running, with --control {path}?"
        raise NbdramError(f"no server answers at {path} ({reason}): {advice}") from error
    finally:
        connection.close()
    if response.status == 400:
        raise UsageError(answer["error"])
    if response.status >= 300:
        raise NbdramError(answer.get("error", f"the server at {path} answered {response.status}"))
    return answer
