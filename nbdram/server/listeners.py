"""Sockets to listen on: opened with the checks that keep a mistake from hurting anybody."""

import errno
import os
import socket
import stat

from nbdram.config import Endpoint
from nbdram.errors import NbdramError

_FIRST_INHERITED_FD = 3
_ADVICE: dict[int | None, str] = {
    errno.EADDRINUSE: "; stop what uses the port or choose another",
    errno.EADDRNOTAVAIL: "; name an address of this host",
}


def open_listeners(endpoint: Endpoint, *, allow_plaintext: bool = True) -> list[socket.socket]:
    """Bound sockets of one endpoint; one NbdramError says what is in the way."""
    if endpoint.inherited:
        sockets = _inherited()
        try:
            for sock in sockets:
                _check_inherited(sock, allow_plaintext)
        except BaseException:
            for sock in sockets:
                sock.close()
            raise
        return sockets
    if endpoint.path:
        return [_unix(endpoint.path)]
    return _tcp(endpoint)


def _inherited() -> list[socket.socket]:
    """Sockets handed over by a service manager (sd_listen_fds)."""
    count = os.environ.get("LISTEN_FDS", "")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not count.isdigit() or count == "0":
        raise NbdramError("--listen fd: no socket was handed over (LISTEN_FDS, LISTEN_PID), as service managers do")
    try:
        fds = range(_FIRST_INHERITED_FD, _FIRST_INHERITED_FD + int(count))
        return [socket.socket(fileno=fd) for fd in fds]
    except OSError as error:
        raise NbdramError(f"--listen fd: what was handed over is no socket ({error.strerror})") from error


def _check_inherited(sock: socket.socket, allow_plaintext: bool) -> None:
    families = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
    listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.family not in families or sock.type != socket.SOCK_STREAM or not listening:
        raise NbdramError("--listen fd: what was handed over is no TCP or Unix socket that listens")
    if sock.family != socket.AF_UNIX:
        host, port = sock.getsockname()[:2]
        Endpoint(host=host, port=port).check_plaintext(allow_plaintext)


def _unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _clear_stale(path)
        old = os.umask(0o177)
        try:
            sock.bind(path)
        finally:
            os.umask(old)
        sock.listen()  # now: a socket that nobody listens on looks stale to others
    except OSError as error:
        sock.close()
        raise NbdramError(f"can't listen on unix:{path}: {error.strerror or error}") from error
    except BaseException:
        sock.close()
        raise
    return sock


def _clear_stale(path: str) -> None:
    """Remove a socket that nobody listens on any more; anything else at `path` is left alone."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise NbdramError(f"{path} exists and is not a socket: choose another path or move it away")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:  # too many wait to be let in
            pass
    raise NbdramError(f"another server listens on unix:{path}: stop it or choose another path")


def _tcp(endpoint: Endpoint) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    try:
        # Text is turned into IDNA first, whose tables take 0.3 MiB.
        host = endpoint.host.encode() if endpoint.host.isascii() else endpoint.host
        found = socket.getaddrinfo(host, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise NbdramError(f"can't listen on {endpoint}: {error.strerror}; name an address of this host") from error
    last_error: OSError | None = None
    for family, kind, protocol, _, address in found:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)
            sock.listen()
            sockets.append(sock)
        except OSError as error:
            sock.close()
            last_error = error
            if error.errno == errno.EADDRINUSE:
                break
    if last_error is not None and (not sockets or last_error.errno == errno.EADDRINUSE):
        for sock in sockets:
            sock.close()
        raise NbdramError(
            f"can't listen on {endpoint}: {last_error.strerror}{_ADVICE.get(last_error.errno, '')}"
        ) from last_error
    return sockets


def unlink_if_ours(path: str, inode: int) -> None:
    """Remove our socket file, unless another server has put its own in its place."""
    try:
        if os.lstat(path).st_ino == inode:
            os.unlink(path)
    except FileNotFoundError:
        pass
