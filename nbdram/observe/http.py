"""HTTP as the status page and the control socket need it: one request for each connection.

Ours, because the standard library's server takes 2 MiB: it parses headers as those of e-mails, and knows the names of
all HTML entities and all types of files.
"""

import socketserver
from collections.abc import Iterator
from typing import Final

_MAX_LINE_BYTES: Final = 64 * 1024
_MAX_HEADERS: Final = 100
_REASONS: Final = {
    200: "OK",
    201: "Created",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


class Handler(socketserver.StreamRequestHandler):
    """Reads the head of a request, and has `answer` of a subclass do the rest. Names of headers are in lower case."""

    method: str
    target: str
    headers: dict[str, str]

    def handle(self) -> None:
        try:
            line = self._line()
            if not line:  # nobody asks for anything
                return
            self.method, self.target, version = line.split(" ")
            if not version.startswith("HTTP/1."):
                raise ValueError
            self.headers = dict(self._headers())
        except ValueError:
            self.method = ""
            self.send(400, "text/plain; charset=utf-8", b"this is not understood\n")
        else:
            self.answer()

    def _headers(self) -> Iterator[tuple[str, str]]:
        for _ in range(_MAX_HEADERS + 1):
            line = self._line()
            if not line:
                return
            name, colon, value = line.partition(":")
            if not colon:
                break
            yield name.lower(), value.strip()
        raise ValueError

    def _line(self) -> str:
        """The next line, without its end. ValueError if it is too long."""
        line = self.rfile.readline(_MAX_LINE_BYTES)
        if len(line) == _MAX_LINE_BYTES:
            raise ValueError
        return line.decode("iso-8859-1").rstrip("\r\n")

    def answer(self) -> None:
        raise NotImplementedError

    def send(self, status: int, content_type: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        all_headers = {"Content-Type": content_type, "Content-Length": str(len(body)), **(headers or {})}
        lines = [f"HTTP/1.0 {status} {_REASONS[status]}", *(f"{name}: {text}" for name, text in all_headers.items())]
        head = "\r\n".join([*lines, "", ""]).encode()
        self.wfile.write(head if self.method == "HEAD" else head + body)
