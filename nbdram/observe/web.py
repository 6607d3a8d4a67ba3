"""Metrics, health and the status page, over HTTP.

    GET /metrics    for Prometheus
    GET /healthz    200 while the event loop runs
    GET /readyz     200 while the server serves; 503 while it starts or drains

Requests are served by threads of their own. They only read plain numbers, and rest between small pieces of work, so
that being looked at does not hold up the event loop. Nothing can be changed here.
"""

import ipaddress
import logging
import socket
import socketserver
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, urlsplit

from nbdram.config import Endpoint
from nbdram.server.listeners import open_listeners

if TYPE_CHECKING:
    from nbdram.server.server import Server

log = logging.getLogger("nbdram.web")

_TIMEOUT_S: Final = 5.0
_MAX_REQUESTS: Final = 16  # at a time; more are turned away
_UNHEALTHY_AFTER_S: Final = 5.0
_HEADERS: Final = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


@dataclass(frozen=True)
class Answer:
    """What is sent for a request."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK


Page = Callable[[dict[str, str]], Answer]  # takes the query's parameters


class WebServer(socketserver.ThreadingMixIn, socketserver.BaseServer):
    """Listens at an endpoint, and answers from `pages`, by path, until it is stopped."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, endpoint: Endpoint, pages: dict[str, Page]) -> None:
        self.sockets = open_listeners(endpoint)
        self.socket = self.sockets[0]
        self.pages = pages
        self.only_loopback = endpoint.is_loopback
        self._slots = threading.BoundedSemaphore(_MAX_REQUESTS)
        host, port = self.socket.getsockname()[:2]
        super().__init__((host, port), _Handler)
        self.endpoint = Endpoint(host=host, port=port)
        self._thread = threading.Thread(target=self.serve_forever, name="nbdram-web", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        for sock in self.sockets:
            sock.close()

    def fileno(self) -> int:
        return self.socket.fileno()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = self.socket.accept()
        connection.settimeout(_TIMEOUT_S)
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            request.close()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def shutdown_request(self, request: Any) -> None:
        request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a web client went away", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: WebServer

    def do_GET(self) -> None:
        self._send(self._answer())

    do_HEAD = do_GET

    def _answer(self) -> Answer:
        if self.server.only_loopback and not _names_loopback(self.headers.get("Host", "")):
            # Else any web site could read this through its visitors' browsers, by giving its name our address.
            return Answer(b"this server is only known as localhost\n", status=HTTPStatus.FORBIDDEN)
        url = urlsplit(self.path)
        page = self.server.pages.get(url.path)
        if page is None:
            return Answer(b"there is nothing here\n", status=HTTPStatus.NOT_FOUND)
        return page(dict(parse_qsl(url.query)))

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def version_string(self) -> str:
        return "nbdram"

    def log_message(self, format: str, *arguments: Any) -> None:
        log.debug(format, *arguments)


def _names_loopback(host: str) -> bool:
    """Whether a Host header (HTTP/1.0 may go without) is localhost or an address of the loopback interface."""
    name = urlsplit(f"//{host}").hostname
    if name is None or name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def pages(server: "Server") -> dict[str, Page]:
    """All that there is to see of a server."""
    from nbdram.observe.exposition import CONTENT_TYPE, Exposition  # its library is only for those with metrics

    exposition = Exposition(server)

    def metrics(_: dict[str, str]) -> Answer:
        return Answer(exposition.text(), CONTENT_TYPE)

    def healthz(_: dict[str, str]) -> Answer:
        late_s = server.lag.late_s
        if late_s < _UNHEALTHY_AFTER_S:
            return Answer(b"ok\n")
        text = f"the event loop has not run for {late_s:.0f} s\n"
        return Answer(text.encode(), status=HTTPStatus.SERVICE_UNAVAILABLE)

    def readyz(_: dict[str, str]) -> Answer:
        if server.ready:
            return Answer(b"ready\n")
        return Answer(b"starting or draining\n", status=HTTPStatus.SERVICE_UNAVAILABLE)

    return {"/metrics": metrics, "/healthz": healthz, "/readyz": readyz}
