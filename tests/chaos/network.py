"""Faults of the network: packets that are lost, late, doubled or out of order, and none at all for a while.

Server and clients are in network namespaces of their own, each with a tun device, and we are the wire between them:
this loses real packets of the kernel's TCP, and needs no queueing discipline that a kernel may lack.
"""

import asyncio
import ctypes
import fcntl
import os
import random
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from .world import Setting, World

_TUNSETIFF: Final = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 1, 0x1000
_CLONE_NEWNET: Final = 0x40000000
_MTU: Final = 9000
_SERVER, _CLIENT, _PORT = "10.99.77.1", "10.99.77.2", 10809

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Wire:
    """Passes packets on both ways, as well as it should."""

    loss: float = 0.0
    delay_s: float = 0.0
    jitter_s: float = 0.0
    doubled: float = 0.0
    cut: bool = False
    passed: int = 0
    lost: int = 0
    _random: random.Random = field(default_factory=lambda: random.Random(5))

    def attach(self, one: int, other: int) -> None:
        loop = asyncio.get_running_loop()
        for source, target in ((one, other), (other, one)):
            loop.add_reader(source, self._pass_on, source, target)

    def detach(self, *ends: int) -> None:
        for end in ends:
            asyncio.get_running_loop().remove_reader(end)

    def _pass_on(self, source: int, target: int) -> None:
        for _ in range(64):
            try:
                packet = os.read(source, _MTU + 100)
            except BlockingIOError:
                return
            chance = self._random.random
            if self.cut or chance() < self.loss:
                self.lost += 1
                continue
            self.passed += 1
            for _ in range(2 if chance() < self.doubled else 1):
                self._deliver(target, packet)

    def _deliver(self, target: int, packet: bytes) -> None:
        delay = self.delay_s + self.jitter_s * self._random.random()
        if delay:
            asyncio.get_running_loop().call_later(delay, _write, target, packet)
        else:
            _write(target, packet)


def _write(target: int, packet: bytes) -> None:
    try:
        os.write(target, packet)
    except OSError:  # its queue is full, or it is gone: a network may do that
        return


def _tun(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return fd


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


@contextmanager
def _namespace(name: str, device: str, address: str) -> Iterator[int]:
    """A namespace with a tun device that has an address; our end of the device."""
    fd = _tun(device)
    try:
        _ip("netns", "add", name)
        try:
            _ip("link", "set", device, "netns", name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            _ip("-n", name, "link", "set", device, "mtu", str(_MTU), "up")
            _ip("-n", name, "link", "set", "lo", "up")
            yield fd
        finally:
            _ip("netns", "del", name)
    finally:
        os.close(fd)


def _socket_in(namespace: str) -> Callable[[], socket.socket]:
    """Makes sockets that belong to another namespace, in a thread that has entered it."""

    def enter() -> None:
        fd = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
        try:
            if _libc.setns(fd, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            os.close(fd)

    def make() -> socket.socket:
        assert threading.current_thread() is not threading.main_thread()
        sock = socket.socket()
        sock.setblocking(False)
        return sock

    inside = ThreadPoolExecutor(1, initializer=enter)
    return lambda: inside.submit(make).result(60)


@contextmanager
def across_a_wire(directory: Path) -> Iterator[Setting]:
    names = [f"nbdram-chaos-{os.getpid()}-{side}" for side in ("s", "c")]
    devices = [f"chaos{os.getpid() % 100000}{side}" for side in ("s", "c")]
    wire = Wire()
    with ExitStack() as stack:
        sides = zip(names, devices, (_SERVER, _CLIENT), strict=True)
        ends = [stack.enter_context(_namespace(*side)) for side in sides]
        make_socket = _socket_in(names[1])

        async def dial() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            sock = make_socket()
            async with asyncio.timeout(30):
                await asyncio.get_running_loop().sock_connect(sock, (_SERVER, _PORT))
            return await asyncio.open_connection(sock=sock)

        options = ("--listen", f"tcp://{_SERVER}:{_PORT}", "--allow-plaintext")
        wire.attach(*ends)
        try:
            yield WiredSetting(
                directory / "swap", prefix=("ip", "netns", "exec", names[0]), options=options, dial=dial, wire=wire
            )
        finally:
            wire.detach(*ends)


@dataclass
class WiredSetting(Setting):
    wire: Wire = field(default_factory=Wire)


def _wire(world: World) -> Wire:
    assert isinstance(world.setting, WiredSetting)
    return world.setting.wire


async def lossy(world: World, seconds: float) -> str:
    wire = _wire(world)
    wire.loss, wire.doubled, wire.delay_s, wire.jitter_s = 0.02, 0.02, 0.001, 0.004
    passed, lost = wire.passed, wire.lost
    await asyncio.sleep(seconds)
    passed, lost = wire.passed - passed, wire.lost - lost
    wire.loss = wire.doubled = wire.delay_s = wire.jitter_s = 0.0
    return f"2 % of packets lost, 2 % doubled, 1 to 5 ms late and out of order: {lost} lost, {passed} passed"


async def cut_off(world: World, seconds: float) -> str:
    """No packet for a while, longer each time; and in the last silence all clients give up and come back."""
    wire, began = _wire(world), time.monotonic()
    silences = [seconds * part for part in (0.02, 0.05, 0.1, 0.25)]
    for number, silence in enumerate(silences, 1):
        wire.cut = True
        await asyncio.sleep(silence)
        if number == len(silences):
            for client in list(world.clients):
                # What it has sent and nobody has got is forgotten: it would come in after what its successor writes.
                # Its RST gets lost: the server has a connection whose client is gone.
                sock = client.writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.kill()
        wire.cut = False
        await world.everybody_gets_on(10)
    told = ", ".join(f"{silence:.1f}" for silence in silences)
    return f"no packets for {told} s (in {time.monotonic() - began:.0f} s); clients gave up in the last one"
