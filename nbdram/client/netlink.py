"""The kernel's NBD client over generic netlink (include/uapi/linux/nbd-netlink.h): attach, repair, grow, detach.

Facts of the kernel that the calls below are shaped by:
- Any attribute that the kernel does not know is ignored, so nothing here depends on its age but what it can do.
- RECONFIGURE applies the size before it looks at the sockets; with both in one message it can wait for I/O that
  only the new socket could carry. So each is a message of its own, and callers send sockets first.
- RECONFIGURE fills the first dead slot and says success also if no slot was dead: the socket is then dropped.
  LINK_DEAD is sent once for each slot that dies; `DeathWatch` counts it.
- The timeout of a device of one connection says what becomes of a request whose time is up. Without one it goes on
  waiting, unless its socket was replaced. With one it is sent again, as it always is where there are several
  connections; before Linux 5.10 it fails with EIO instead. Setting it also sets for how long requests may take from
  then on: 30 s for a timeout of 0.
"""

import errno
import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, Final

from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST, genlmsg, nla
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.generic import GenericNetlinkSocket

from nbdram.errors import NbdramError

_FAMILY: Final = "nbd"
_GROUP: Final = "nbd_mc_group"
_CONNECT, _DISCONNECT, _RECONFIGURE, _LINK_DEAD, _STATUS = 1, 2, 3, 4, 5
_NETLINK_GENERIC: Final = 16
_SOL_NETLINK: Final = 270
_ADD_MEMBERSHIP: Final = 1


class _Message(genlmsg):  # type: ignore[misc]
    """All attributes, in the order of their numbers."""

    prefix = "NBD_ATTR_"
    nla_map = (
        ("NBD_ATTR_UNSPEC", "none"),
        ("NBD_ATTR_INDEX", "uint32"),
        ("NBD_ATTR_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_BLOCK_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_TIMEOUT", "uint64"),
        ("NBD_ATTR_SERVER_FLAGS", "uint64"),
        ("NBD_ATTR_CLIENT_FLAGS", "uint64"),
        ("NBD_ATTR_SOCKETS", "sockets"),
        ("NBD_ATTR_DEAD_CONN_TIMEOUT", "uint64"),
        ("NBD_ATTR_DEVICE_LIST", "devices"),
        ("NBD_ATTR_BACKEND_IDENTIFIER", "asciiz"),
    )

    class sockets(nla):  # type: ignore[misc]
        nla_map = (("NBD_SOCK_ITEM_UNSPEC", "none"), ("NBD_SOCK_ITEM", "item"))

        class item(nla):  # type: ignore[misc]
            nla_map = (("NBD_SOCK_UNSPEC", "none"), ("NBD_SOCK_FD", "uint32"))

    class devices(nla):  # type: ignore[misc]
        nla_map = (("NBD_DEVICE_ITEM_UNSPEC", "none"), ("NBD_DEVICE_ITEM", "item"))

        class item(nla):  # type: ignore[misc]
            nla_map = (
                ("NBD_DEVICE_UNSPEC", "none"),
                ("NBD_DEVICE_INDEX", "uint32"),
                ("NBD_DEVICE_CONNECTED", "uint8"),
            )


class Netlink:
    """A netlink socket to the kernel's nbd driver; a context manager. Stays in the thread that made it."""

    def __init__(self) -> None:
        self._socket = GenericNetlinkSocket()
        try:
            self._socket.bind(_FAMILY, _Message)
        except (NetlinkError, OSError) as error:
            self._socket.close()
            raise NbdramError(
                "this kernel has no network block devices: load the module with `modprobe nbd`"
            ) from error

    def __enter__(self) -> "Netlink":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def connect(
        self,
        sockets: Iterable[int],
        *,
        index: int | None,
        size: int,
        block_size: int,
        flags: int,
        dead_timeout_s: int,
        identifier: str,
    ) -> int:
        """Make a device of connected sockets (file descriptors); returns its index.

        Without an `index` the kernel takes one that is free. OSError EBUSY: that device is in use.
        """
        attributes = [
            ("NBD_ATTR_SIZE_BYTES", size),
            ("NBD_ATTR_BLOCK_SIZE_BYTES", block_size),
            ("NBD_ATTR_SERVER_FLAGS", flags),
            ("NBD_ATTR_DEAD_CONN_TIMEOUT", dead_timeout_s),
            ("NBD_ATTR_BACKEND_IDENTIFIER", identifier),
            _sockets(sockets),
        ]
        if index is not None:
            attributes.append(("NBD_ATTR_INDEX", index))
        for reply in self._request(_CONNECT, attributes):
            made: int | None = reply.get_attr("NBD_ATTR_INDEX")
            if made is not None:
                return made
        raise NbdramError("the kernel did not say which device it made")

    def add_socket(self, index: int, identifier: str, descriptor: int) -> None:
        """Give the device a socket for its first dead slot; if none is dead the kernel drops it, without a word."""
        self._request(_RECONFIGURE, [*_device(index, identifier), _sockets([descriptor])])

    def set_size(self, index: int, identifier: str, size: int) -> None:
        self._request(_RECONFIGURE, [*_device(index, identifier), ("NBD_ATTR_SIZE_BYTES", size)])

    def set_timeout(self, index: int, identifier: str, timeout_s: int) -> None:
        self._request(_RECONFIGURE, [*_device(index, identifier), ("NBD_ATTR_TIMEOUT", timeout_s)])

    def disconnect(self, index: int) -> None:
        """Detach; requests that wait for a connection fail with EIO. Nothing happens if it is detached already."""
        self._request(_DISCONNECT, [("NBD_ATTR_INDEX", index)])

    def in_use(self) -> set[int]:
        """The indices of devices that are connected, or that somebody has open."""
        found = set()
        for reply in self._request(_STATUS, []):
            listed = reply.get_attr("NBD_ATTR_DEVICE_LIST")
            for item in listed.get_attrs("NBD_DEVICE_ITEM") if listed else ():
                if item.get_attr("NBD_DEVICE_CONNECTED"):
                    found.add(item.get_attr("NBD_DEVICE_INDEX"))
        return found

    def watch_deaths(self) -> "DeathWatch":
        return DeathWatch(self._socket.mcast_groups.get(_GROUP))

    def _request(self, command: int, attributes: list[tuple[str, Any]]) -> tuple[Any, ...]:
        message = _Message()
        message["cmd"] = command
        message["version"] = 1
        message["attrs"] = attributes
        try:
            return tuple(self._socket.nlm_request(message, self._socket.prid, NLM_F_REQUEST | NLM_F_ACK))
        except NetlinkError as error:
            raise OSError(error.code, os.strerror(error.code)) from error


class DeathWatch:
    """Hears LINK_DEAD: `deaths` counts slots that died, by device index.

    The kernel sends it in the first network namespace only: elsewhere nothing is heard, which is no error.
    """

    def __init__(self, group: int | None) -> None:
        self.deaths: dict[int, int] = {}
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETLINK_GENERIC)
        self._socket.bind((0, 0))
        if group is not None:
            with suppress(PermissionError):
                self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self) -> None:
        """Take what has arrived; does not wait."""
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENOBUFS:  # some were lost: those who wait for them give up waiting in time
                    continue
                raise
            message = _Message(data)
            message.decode()
            if message["cmd"] == _LINK_DEAD:
                index = message.get_attr("NBD_ATTR_INDEX")
                self.deaths[index] = self.deaths.get(index, 0) + 1

    def close(self) -> None:
        self._socket.close()


def _sockets(descriptors: Iterable[int]) -> tuple[str, Any]:
    items = [("NBD_SOCK_ITEM", {"attrs": [("NBD_SOCK_FD", descriptor)]}) for descriptor in descriptors]
    return "NBD_ATTR_SOCKETS", {"attrs": items}


def _device(index: int, identifier: str) -> list[tuple[str, Any]]:
    attributes: list[tuple[str, Any]] = [("NBD_ATTR_INDEX", index)]
    if identifier:
        attributes.append(("NBD_ATTR_BACKEND_IDENTIFIER", identifier))
    return attributes
