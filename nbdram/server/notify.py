"""Tells the service manager how it goes (sd_notify): ready, stopping, and still alive."""

import asyncio
import os
import socket
from contextlib import suppress


def tell(state: str) -> None:
    """One message, such as READY=1. Nothing happens if nobody asked for any, or nobody listens any more."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.sendto(state.encode(), address)


async def feed_watchdog() -> None:
    """As often as the service manager wants to hear of us, as long as the event loop runs."""
    interval = os.environ.get("WATCHDOG_USEC", "")
    if not interval.isdigit() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        tell("WATCHDOG=1")
        await asyncio.sleep(int(interval) / 1e6 / 3)
