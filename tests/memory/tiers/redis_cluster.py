"""Redis servers of our own: one alone, or a cluster of masters and replicas, on free ports of loopback."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import redis

from nbdram.memory.tiers.remote_settings import RemoteSettings

SLOTS: Final = 16384
_PATIENCE_S: Final = 60.0
# A busy machine may well stop a server for some seconds, which is no failure yet.
_CALM_MS: Final = 30_000
HASTY_MS: Final = 1500


@dataclass
class Node:
    """One redis-server, and what it was started with."""

    port: int
    directory: Path
    arguments: tuple[str, ...]
    process: "subprocess.Popen[bytes]"
    client: redis.Redis = field(repr=False)

    def call(self, *words: Any) -> Any:
        """What it answers; waited for while the cluster is not whole."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return self.client.execute_command(*words)
            except redis.exceptions.ClusterDownError:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def kill(self) -> None:
        """As power cuts do."""
        self.process.kill()
        self.process.wait()
        self.client.connection_pool.disconnect()

    def stop(self) -> None:
        """It is there, and does not answer."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def start_again(self) -> None:
        """With the port, the name in the cluster, and nothing of the data."""
        self.process = _launch(self.directory, self.arguments)
        until(self._answers, "a restarted redis-server does not answer")

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except (redis.ConnectionError, redis.TimeoutError):
            return False

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


@dataclass
class Cluster:
    """`masters` have the slots in equal parts; `replicas[i]` follows `masters[i]`."""

    masters: list[Node]
    replicas: list[Node]

    @property
    def nodes(self) -> list[Node]:
        return self.masters + self.replicas

    @property
    def settings(self) -> RemoteSettings:
        return RemoteSettings(tuple(("127.0.0.1", node.port) for node in self.nodes))

    def living(self) -> list[Node]:
        return [node for node in self.nodes if node.process.poll() is None]

    def wait_until_whole(self, slots: int = SLOTS) -> None:
        """Every living node sees a cluster that works."""
        until(lambda: all(_is_whole(node, slots) for node in self.living()), "the cluster does not become whole")

    def keys(self, pattern: str = "*") -> list[bytes]:
        return [key for node in self.living() if is_master(node) for key in node.client.scan_iter(pattern, count=1000)]

    def owner(self, key: bytes) -> Node:
        """The master that has a key."""
        for node in self.living():
            if is_master(node):
                try:
                    node.call("EXISTS", key)
                except redis.exceptions.MovedError:
                    continue
                return node
        raise AssertionError("nobody has the key's slot")

    def owner_of(self, slot: int) -> Node:
        """The master that has a slot."""
        for first, last, master, *_ in self.masters[0].call("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(node for node in self.nodes if node.port == master[1])
        raise AssertionError("nobody has the slot")

    def move(self, slot: int, source: Node, target: Node) -> None:
        """Give a slot to another master, key by key, as resharding does."""
        with self.moving(slot, source, target):
            time.sleep(0.05)  # for those who ask meanwhile
            while keys := source.call("CLUSTER", "GETKEYSINSLOT", slot, 1):
                source.call("MIGRATE", "127.0.0.1", target.port, "", 0, 10000, "KEYS", *keys)
                time.sleep(0.02)

    @contextmanager
    def moving(self, slot: int, source: Node, target: Node) -> Iterator[None]:
        """A slot is on its way to another master, and has arrived at the end."""
        names = {node.port: node.call("CLUSTER", "MYID") for node in (source, target)}
        target.call("CLUSTER", "SETSLOT", slot, "IMPORTING", names[source.port])
        source.call("CLUSTER", "SETSLOT", slot, "MIGRATING", names[target.port])
        yield
        for node in (target, source, *self.masters):
            node.call("CLUSTER", "SETSLOT", slot, "NODE", names[target.port])

    def empty(self) -> None:
        for node in self.living():
            if is_master(node):
                node.call("FLUSHALL")


def is_master(node: Node) -> bool:
    return bool(node.call("ROLE")[0] == b"master")


@contextmanager
def server(directory: Path, *arguments: str, port: int = 0) -> Iterator[Node]:
    """One server that is no cluster."""
    node = _start(directory, port or free_ports(1)[0], arguments)
    try:
        yield node
    finally:
        _end([node])


@contextmanager
def cluster(
    directory: Path, masters: int = 3, replicas: int = 0, *arguments: str, failover_ms: int = _CALM_MS
) -> Iterator[Cluster]:
    """A cluster; `replicas` of the masters (the first ones) get a replica each. A node that is away counts as lost
    after `failover_ms`.
    """
    count = masters + replicas
    ports = free_ports(2 * count)
    nodes: list[Node] = []
    try:
        for port, bus in zip(ports[:count], ports[count:], strict=True):
            options: tuple[str, ...] = ("--cluster-enabled", "yes", "--cluster-port", str(bus))
            options += ("--cluster-node-timeout", str(failover_ms), "--cluster-replica-validity-factor", "0")
            nodes.append(_start(directory / str(port), port, (*options, *arguments)))
        for number, node in enumerate(nodes[:masters]):
            node.call("CLUSTER", "ADDSLOTSRANGE", SLOTS * number // masters, SLOTS * (number + 1) // masters - 1)
            node.call("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node, bus in zip(nodes[1:], ports[count + 1 :], strict=True):
            nodes[0].call("CLUSTER", "MEET", "127.0.0.1", node.port, bus)
        made = Cluster(nodes[:masters], nodes[masters:])
        made.wait_until_whole()
        until(lambda: all(_knows(node) == count for node in nodes), "the nodes do not all know each other")
        for replica, master in zip(made.replicas, made.masters, strict=False):
            replica.call("CLUSTER", "REPLICATE", master.call("CLUSTER", "MYID"))
        until(lambda: all(_follows(replica) for replica in made.replicas), "a replica does not follow its master")
        yield made
    finally:
        _end(nodes)


def _start(directory: Path, port: int, arguments: Sequence[str]) -> Node:
    assert shutil.which("redis-server"), "it takes Debian's package redis-server"
    directory.mkdir(parents=True, exist_ok=True)
    line = (
        *("--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory), "--logfile", str(directory / "log")),
        *("--save", "", "--appendonly", "no", "--repl-diskless-sync-delay", "0", *arguments),
    )
    client = redis.Redis(port=port, socket_timeout=10, socket_connect_timeout=10)
    node = Node(port, directory, line, _launch(directory, line), client)
    until(node._answers, "a redis-server does not answer")
    return node


def _launch(directory: Path, arguments: Sequence[str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(["redis-server", *arguments], stdout=subprocess.DEVNULL, cwd=directory)


def _end(nodes: Sequence[Node]) -> None:
    for node in nodes:
        node.client.close()
        node.process.kill()
    for node in nodes:
        node.process.wait()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; a cluster's must be below 55536."""
    sockets: list[socket.socket] = []
    try:
        while len(sockets) < count:
            sockets.append(socket.create_server(("127.0.0.1", 0)))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def _is_whole(node: Node, slots: int) -> bool:
    lines = dict(line.split(":") for line in node.call("CLUSTER", "INFO").decode().split())
    return lines["cluster_state"] == "ok" and int(lines["cluster_slots_assigned"]) == slots


def _knows(node: Node) -> int:
    return len(node.call("CLUSTER", "NODES").splitlines())


def _follows(node: Node) -> bool:
    role = node.call("ROLE")
    return bool(role[0] == b"slave" and role[3] == b"connected")


def until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.01)
