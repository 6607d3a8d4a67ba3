"""What may be in the way of a server's sockets, and what becomes of it."""

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from nbdram.config import Endpoint
from nbdram.errors import NbdramError, UsageError
from nbdram.server.listeners import open_listeners, unlink_if_ours

HERE = Endpoint(host="127.0.0.1", port=0)


@contextmanager
def listening(endpoint: Endpoint, **settings: bool) -> Iterator[list[socket.socket]]:
    sockets = open_listeners(endpoint, **settings)
    try:
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


# -- Unix sockets ------------------------------------------------------------------------------------


def test_a_unix_socket_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    with listening(Endpoint(path=str(path))):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    with listening(Endpoint(path=str(path))):
        pass
    assert path.is_socket()
    with listening(Endpoint(path=str(path))), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


@pytest.mark.parametrize("waiting", [0, 4])
def test_a_live_socket_is_left_to_its_server(tmp_path: Path, waiting: int) -> None:
    """Also to one that is too busy to let anybody in."""
    path = tmp_path / "nbd.sock"
    with closing(socket.socket(socket.AF_UNIX)) as other:
        other.bind(str(path))
        other.listen(1)
        clients = [socket.socket(socket.AF_UNIX) for _ in range(waiting)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(str(path))
        with pytest.raises(NbdramError, match=f"another server listens on unix:{path}: stop it or choose another path"):
            open_listeners(Endpoint(path=str(path)))
        assert path.is_socket()
        for client in clients:
            client.close()


@pytest.mark.parametrize("kind", ["file", "directory", "symlink", "pipe"])
def test_what_is_no_socket_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "nbd.sock"
    match kind:
        case "file":
            path.write_text("precious")
        case "directory":
            path.mkdir()
        case "symlink":
            path.symlink_to(tmp_path / "elsewhere")
        case "pipe":
            os.mkfifo(path)
    before = path.lstat()
    with pytest.raises(NbdramError, match=f"{path} exists and is not a socket: choose another path or move it away"):
        open_listeners(Endpoint(path=str(path)))
    assert path.lstat() == before


def test_a_socket_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        with pytest.raises(NbdramError, match="can't listen on unix:"):
            open_listeners(Endpoint(path=str(path)))
        assert path.is_socket()


@pytest.mark.parametrize(
    ("path", "reason"), [("missing/nbd.sock", "No such file or directory"), ("x" * 120, "AF_UNIX path too long")]
)
def test_a_path_that_can_not_be_is_told_with_its_reason(tmp_path: Path, path: str, reason: str) -> None:
    with pytest.raises(NbdramError, match=f"can't listen on unix:.*: {reason}"):
        open_listeners(Endpoint(path=str(tmp_path / path)))


def test_only_ones_own_socket_file_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    with listening(Endpoint(path=str(path))):
        inode = path.stat().st_ino
        unlink_if_ours(str(path), inode + 1)
        assert path.exists()
        unlink_if_ours(str(path), inode)
        assert not path.exists()
        unlink_if_ours(str(path), inode)


# -- TCP ---------------------------------------------------------------------------------------------


def test_a_port_in_use_is_told_so() -> None:
    with listening(HERE) as (first,):
        port = first.getsockname()[1]
        told = f"can't listen on tcp://127.0.0.1:{port}: Address already in use; stop what uses the port or choose"
        with pytest.raises(NbdramError, match=told):
            open_listeners(Endpoint(host="127.0.0.1", port=port))


def test_a_port_in_use_on_one_of_a_names_addresses_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """And those that were opened already are closed."""
    with listening(HERE) as (first,):
        port = first.getsockname()[1]
        addresses = [
            (socket.AF_INET6, socket.SOCK_STREAM, 0, "", ("::1", port, 0, 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port)),
        ]
        with monkeypatch.context() as patched:
            patched.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
            with pytest.raises(NbdramError, match="Address already in use"):
                open_listeners(Endpoint(host="localhost", port=port))
        with listening(Endpoint(host="::1", port=port)):
            pass


def test_ipv6_is_served_and_leaves_the_ipv4_port_free() -> None:
    with listening(Endpoint(host="::1", port=0)) as (sock,):
        assert sock.family == socket.AF_INET6
        assert sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
        with socket.create_connection(("::1", sock.getsockname()[1])):
            pass


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_an_address_that_is_not_ours_is_told_so(host: str) -> None:
    with pytest.raises(NbdramError, match=f"can't listen on tcp://{host}:10809: .+; name an address of this host"):
        open_listeners(Endpoint(host=host))


# -- sockets that are handed over --------------------------------------------------------------------

HANDED_OVER = """
import os, socket, sys
kind, host, permission = sys.argv[1:]
sock = socket.socket(getattr(socket, kind.split()[0]), getattr(socket, kind.split()[1]))
sock.bind((host, 0) if host else "handed.sock")
if "listen" in kind:
    sock.listen()
os.dup2(sock.fileno(), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
from nbdram.config import Endpoint
from nbdram.errors import NbdramError
from nbdram.server.listeners import open_listeners
try:
    (got,) = open_listeners(Endpoint(inherited=True), allow_plaintext=permission == "yes")
    print("ok", got.fileno())
except NbdramError as error:
    print(type(error).__name__, error)
"""


def hand_over(directory: Path, kind: str, host: str = "", permission: str = "no") -> str:
    command = [sys.executable, "-c", HANDED_OVER, kind, host, permission]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.parametrize(
    ("kind", "host"),
    [
        ("AF_UNIX SOCK_STREAM listen", ""),
        ("AF_INET SOCK_STREAM listen", "127.0.0.1"),
        ("AF_INET6 SOCK_STREAM listen", "::1"),
    ],
)
def test_a_socket_that_listens_is_taken_over(tmp_path: Path, kind: str, host: str) -> None:
    assert hand_over(tmp_path, kind, host) == "ok 3\n"


@pytest.mark.parametrize(
    ("kind", "host"),
    [
        ("AF_UNIX SOCK_STREAM", ""),
        ("AF_UNIX SOCK_SEQPACKET listen", ""),
        ("AF_INET SOCK_DGRAM", "127.0.0.1"),
        ("AF_INET SOCK_STREAM", "127.0.0.1"),
    ],
)
def test_another_kind_of_socket_is_refused(tmp_path: Path, kind: str, host: str) -> None:
    told = hand_over(tmp_path, kind, host)
    assert told == "NbdramError --listen fd: what was handed over is no TCP or Unix socket that listens\n"


def test_a_socket_for_others_needs_permission_however_it_came(tmp_path: Path) -> None:
    told = hand_over(tmp_path, "AF_INET SOCK_STREAM listen", "0.0.0.0")
    assert told.startswith("UsageError tcp://0.0.0.0:")
    assert hand_over(tmp_path, "AF_INET SOCK_STREAM listen", "0.0.0.0", "yes") == "ok 3\n"


@pytest.mark.parametrize(
    ("count", "pid"), [("", "ours"), ("0", "ours"), ("x", "ours"), ("1", "1"), ("1", ""), ("-1", "ours")]
)
def test_what_was_meant_for_others_or_for_nobody_is_no_socket(
    monkeypatch: pytest.MonkeyPatch, count: str, pid: str
) -> None:
    monkeypatch.setenv("LISTEN_FDS", count)
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()) if pid == "ours" else pid)
    with pytest.raises(NbdramError, match="--listen fd: no socket was handed over"):
        open_listeners(Endpoint(inherited=True))


def test_what_is_no_socket_can_not_be_handed_over(tmp_path: Path) -> None:
    script = HANDED_OVER.replace("os.dup2(sock.fileno(), 3)", "os.dup2(os.open('/dev/null', 0), 3)")
    command = [sys.executable, "-c", script, "AF_UNIX SOCK_STREAM", "", "no"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60).stdout
    assert told.startswith("NbdramError --listen fd: what was handed over is no socket (")


def test_refusal_of_plaintext_is_a_mistake_in_what_was_asked() -> None:
    with pytest.raises(UsageError):
        Endpoint(host="0.0.0.0").check_plaintext(False)
