"""The life of a server: open, announce, serve, drain, close."""

import asyncio
import ctypes
import logging
import os
import resource
import shlex
import signal
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from nbdram.config import (
    DEFAULT_EXPORT_NAME,
    DEFAULT_EXPORT_SIZE,
    MIN_MEMORY,
    Endpoint,
    ExportSettings,
    ServeSettings,
    format_size,
)
from nbdram.errors import NbdramError
from nbdram.memory.budget import Budget
from nbdram.memory.densifying import Densifier
from nbdram.memory.layout import PAGE
from nbdram.memory.malloc import give_back_what_is_free
from nbdram.memory.moving import Mover
from nbdram.memory.packer import Packers
from nbdram.memory.pressure import INTERVAL_S, AutoBudget, pressure_file
from nbdram.memory.reclaim import Reclaimer
from nbdram.memory.recovery import sweep, sweep_remote
from nbdram.memory.tiers.disk import SwapArea, filesystem
from nbdram.observe import snapshot
from nbdram.observe.control import ControlServer, default_path
from nbdram.observe.history import History
from nbdram.observe.lag import LoopLag
from nbdram.observe.status import facts, status_pages
from nbdram.observe.web import WebServer, pages
from nbdram.protocol.handshake import TlsPolicy
from nbdram.server import notify
from nbdram.server.admin import Admin
from nbdram.server.connection import Connection
from nbdram.server.doors import Door
from nbdram.server.exports import Exports
from nbdram.server.listeners import open_listeners, unlink_if_ours
from nbdram.server.quiet import hang_up_on_the_quiet
from nbdram.server.reload import ReadSettings, Reloader
from nbdram.server.service import Service

if TYPE_CHECKING:
    from nbdram.memory.statedir import StateDirectory
    from nbdram.memory.tiers.remote import Remote

log = logging.getLogger("nbdram.server")

DRAIN_TIMEOUT_S: Final = 5.0
_SWEEP_REMOTE_S: Final = 1.0
_SPARE_FILES: Final = 16  # for those who look at the server
# What a state directory's file system keeps free besides the budget, for what reclaim stores before it gives back.
_HEADROOM_BYTES: Final = 16 << 20
_PR_SET_TIMERSLACK: Final = 29  # nanoseconds


class Server:
    """Serves exports on endpoints until it is told to stop."""

    def __init__(self, settings: ServeSettings, read: ReadSettings | None = None) -> None:
        self.settings = settings
        self.reloader: Reloader = Reloader(self, read)
        budget = Budget(settings.memory)
        self.state = _state_directory(settings)
        self.areas: list[SwapArea] = []
        self.remote: Remote | None = None
        try:
            self.areas = _swap_areas(settings, self.state)
            self.remote = _remote(settings, self.state)
        except BaseException:
            for area in self.areas:
                area.close()
            if self.state:
                self.state.close()
            raise
        self.exports: Exports = Exports(budget, self.areas, self.state, self.remote, remote_first=settings.remote_first)
        self.reclaimer: Reclaimer = Reclaimer(
            budget, self.exports.devices, Packers([self.state.lock_fd] if self.state else ())
        )
        self.service: Service = Service(self.exports)
        self.service.limits = settings.limits
        self.service.write_wait_s = settings.write_wait_s
        self.admin: Admin = Admin(self)
        self.endpoints: list[Endpoint] = []
        self._doors: list[Door] = []
        self._control: ControlServer | None = None
        self.lag: LoopLag = LoopLag()
        self.ready: bool = False  # all is set up, and nobody has asked us to stop
        self.started_at = time.monotonic()
        self.loop: asyncio.AbstractEventLoop | None = None  # once it runs
        self.web: WebServer | None = None
        self._history = History(self)
        self.auto_budget: AutoBudget | None = None
        self._pressure: asyncio.Task[None] | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._quiet: asyncio.Task[None] | None = None
        self._remote_sweeper: asyncio.Task[None] | None = None
        self._densifier: Densifier = Densifier(self.reclaimer, self.exports.devices)
        self._mover: Mover | None = None
        self._socket_files: list[tuple[str, int]] = []

    async def start(self) -> None:
        """Make the exports and listen; on any error nothing is left behind."""
        self.loop = asyncio.get_running_loop()
        try:
            if self.settings.tls:
                from nbdram.server.tls import Tls  # as `_remote`

                self.service.tls = Tls(self.settings.tls)
            self.web = self._open_web()
            self.lag.start()
            if self.state:
                self._take_up(self.state)
            for export in self._wanted_exports():
                self.exports.configure(export)
            self.reclaimer.start()
            self._densifier.start()
            self._sweeper = asyncio.create_task(self._sweep())
            if self.remote:
                if self.areas:
                    self._mover = Mover(self.exports.devices, self.reclaimer.counters)
                    self._mover.start()
                self._remote_sweeper = asyncio.create_task(self._sweep_remote(self.remote))
            for endpoint in self.settings.listen:
                self._listen(endpoint)
            self._control = self._open_control()
            self.limit_connections()
            self._quiet = asyncio.create_task(hang_up_on_the_quiet(self.service))
            if self.settings.follow_pressure:
                self._pressure = asyncio.create_task(self._follow_pressure())
            self.ready = True
        except BaseException:
            await self.stop()
            raise

    def limit_connections(self) -> None:
        service, (limit, _) = self.service, resource.getrlimit(resource.RLIMIT_NOFILE)
        service.files_each = 4 if self.settings.tls else 2  # outside and inside TLS
        taken = len(os.listdir("/proc/self/fd")) - service.held
        service.files = limit - taken - _SPARE_FILES + service.files_each * len(service.connections)
        service.max_connections = min(self.settings.limits.connections, max(1, service.files // service.files_each))

    def limit_memory(self, wanted: int) -> None:
        """Set the budget, to less than `wanted` if the state directory has no room for it."""
        limit = wanted
        # A write that finds the file system full would be the end of the process: SIGBUS.
        if self.state and (room := self.state.room_bytes()) < wanted + _HEADROOM_BYTES:
            limit = max(room - _HEADROOM_BYTES, 0)
            path = self.state.path
            if limit < MIN_MEMORY:
                least = format_size(MIN_MEMORY + _HEADROOM_BYTES)
                raise NbdramError(f"{path} has only {format_size(room)} of room: it takes at least {least}")
            log.warning("%s has only %s of room: --memory is %s", path, format_size(room), format_size(limit))
        self.exports.budget.set_limit(limit)

    def _take_up(self, state: "StateDirectory") -> None:
        """Go on where the last server on this state directory ended."""
        kind = filesystem(state.path)
        if kind != "tmpfs":
            log.warning("%s is on %s: devices are as slow as that; use a directory on tmpfs", state.path, kind)
        begun = time.monotonic()
        self.exports.restore()
        for device in self.exports.devices():
            resident, cold = format_size(device.resident_pages * PAGE), format_size(device.cold_pages * PAGE)
            log.info("%s: took up %s resident, %s compressed", device.name, resident, cold)
        log.info("took up %d exports in %.3f s", len(self.exports), time.monotonic() - begun)
        self.limit_memory(self.settings.memory)

    def _wanted_exports(self) -> tuple[ExportSettings, ...]:
        if self.settings.exports or len(self.exports):
            return self.settings.exports
        return (ExportSettings(DEFAULT_EXPORT_NAME, DEFAULT_EXPORT_SIZE),)

    async def _sweep(self) -> None:
        """Give back, little by little, what killed servers have left of images that nobody needs."""
        if self.state is None:
            return
        for export in list(self.exports):
            steps = sweep(export.device)
            while self.exports.get(export.name) is export and next(steps, steps) is not steps:
                await asyncio.sleep(0)

    async def _sweep_remote(self, remote: "Remote") -> None:
        """Drop what could not be dropped from the remote at once, and what killed servers have left there."""
        while True:
            await asyncio.sleep(_SWEEP_REMOTE_S)
            for export in list(self.exports):
                tier = export.device.remote
                if tier is None or not tier.put_off or not remote.refusals.any_takes():
                    continue
                steps = sweep_remote(export.device)
                while self.exports.get(export.name) is export and next(steps, steps) is not steps:
                    await asyncio.sleep(0 if remote.can_drop() else 0.01)

    def _listen(self, endpoint: Endpoint) -> None:
        for sock in open_listeners(endpoint, allow_plaintext=self.settings.plaintext_may_listen):
            if sock.family == socket.AF_UNIX:
                path = sock.getsockname()
                if endpoint.path:
                    self._socket_files.append((path, os.lstat(path).st_ino))
                self.endpoints.append(Endpoint(path=path))
                self._doors.append(Door(sock, self.service, self._connect_local, tls=False))
            else:
                host, port = sock.getsockname()[:2]
                self.endpoints.append(Endpoint(host=host, port=port))
                self._doors.append(Door(sock, self.service, self._connect, tls=bool(self.settings.tls)))

    async def _follow_pressure(self) -> None:
        if path := pressure_file():
            self.auto_budget = auto = AutoBudget(self.exports.budget, path, MIN_MEMORY)
            with suppress(OSError):  # a control group's may be switched off
                while True:
                    auto.step()
                    await asyncio.sleep(INTERVAL_S)
        log.warning("--memory auto: this kernel does not tell memory pressure; the budget stays as it is")

    def _open_control(self) -> ControlServer | None:
        """The control socket; if nobody asked for one, a second server on the same host goes without."""
        try:
            return ControlServer(
                self.settings.control or default_path(), lambda: snapshot.take(self), lambda: facts(self), self.admin
            )
        except NbdramError as error:
            if self.settings.control:
                raise
            log.info("no control socket: %s", error)
            return None

    def _open_web(self) -> WebServer | None:
        endpoint = self.settings.metrics
        if endpoint is None:
            return None
        try:
            web = WebServer(endpoint, {**pages(self), **status_pages(self, self._history)})
        except NbdramError as error:
            if self.settings.metrics_required:
                raise NbdramError(f"no metrics and no status page: {error}") from error
            log.warning("no metrics and no status page: %s", error)
            return None
        self._history.start()
        return web

    def _connect(self) -> Connection:
        tls = self.settings.tls
        policy = TlsPolicy.OFF if tls is None else TlsPolicy.REQUIRED if tls.required else TlsPolicy.OFFERED
        return Connection(self.service, policy)

    def _connect_local(self) -> Connection:
        """Over a Unix socket nobody listens in: TLS is there for who wants to show a certificate."""
        return Connection(self.service, TlsPolicy.OFFERED if self.settings.tls else TlsPolicy.OFF)

    async def stop(self) -> None:
        """No new connections; requests in flight are answered (bounded in time); memory is given back."""
        self.ready = False
        for task in (self._pressure, self._quiet):
            if task:
                task.cancel()
        if self._control:
            self._control.stop()
            self._control = None
        doors, self._doors = self._doors, []
        for door in doors:
            await door.close()
        for path, inode in self._socket_files:
            unlink_if_ours(path, inode)
        for _ in range(2):  # requests that wait in the sockets have been sent before: read them
            await asyncio.sleep(0)
        for connection in list(self.service.connections):
            connection.finish()
        deadline = asyncio.get_running_loop().time() + DRAIN_TIMEOUT_S
        while self.service.connections and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        for connection in list(self.service.connections):
            connection.abort()
        await asyncio.sleep(0)
        if self.service.tls:
            await self.service.tls.stop()
            self.service.tls = None
        await self._densifier.stop()
        await self.reclaimer.stop()
        if self._mover:
            await self._mover.stop()
        for sweeper in (self._sweeper, self._remote_sweeper):
            if sweeper:
                sweeper.cancel()
        self.service.fetcher.close()  # nobody reads from the disks any more
        with suppress(BufferError):  # a view that a dying connection still holds goes with the process
            self.exports.close()
        self.lag.stop()
        self._history.stop()
        if self.web:
            self.web.stop()
            self.web = None
        for area in self.areas:
            area.close()
        if self.remote:
            self.remote.close()
        if self.state:
            self.state.close()
        self.areas, self.state, self.remote = [], None, None


async def serve(settings: ServeSettings, read: ReadSettings | None = None) -> None:
    """`nbdram serve`: until SIGTERM or SIGINT. SIGHUP has `read` tell the settings anew."""
    _raise_file_limit()
    _precise_timers()
    server = Server(settings, read)
    await server.start()
    give_back_what_is_free()
    stopping = asyncio.Event()
    _on_signals(stopping, server.reloader)
    announce(server)
    notify.tell("READY=1")
    watchdog = asyncio.create_task(notify.feed_watchdog())
    await stopping.wait()
    log.info("stopping")
    notify.tell("STOPPING=1")
    await server.stop()
    watchdog.cancel()


def _state_directory(settings: ServeSettings) -> "StateDirectory | None":
    if settings.state_dir is None:
        return None
    from nbdram.memory.statedir import StateDirectory  # as `_remote`

    return StateDirectory(settings.state_dir)


def _swap_areas(settings: ServeSettings, state: "StateDirectory | None") -> list[SwapArea]:
    areas: list[SwapArea] = []
    try:
        for swap in settings.swap:
            areas.append(SwapArea(swap.path, swap.max_bytes, state.manifest.secret if state else None))
    except BaseException:
        for area in areas:
            area.close()
        raise
    return areas


def _remote(settings: ServeSettings, state: "StateDirectory | None") -> "Remote | None":
    if settings.remote is None:
        return None
    from nbdram.memory.tiers.remote import Remote  # the library costs memory, and start-up time

    return Remote(settings.remote, state.manifest.secret if state else None)


def _on_signals(stopping: asyncio.Event, reloader: Reloader) -> None:
    """SIGHUP reloads. The first signal to end drains, a second one ends the process at once."""

    def told() -> None:
        if stopping.is_set():
            os._exit(1)
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told)
    loop.add_signal_handler(signal.SIGHUP, reloader.begin)


def _raise_file_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _precise_timers() -> None:
    """Let short sleeps end on time: by default the kernel rounds them up by 50 us."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1000), 0, 0, 0)


def announce(server: Server) -> None:
    """Print, ready to paste, each export's URI and the command that attaches it."""
    lines = []
    for export in server.exports:
        for endpoint in server.endpoints:
            where = ["-unix", endpoint.path] if endpoint.path else [endpoint.host, str(endpoint.port)]
            tls = bool(endpoint.host and server.settings.tls and server.settings.tls.required)
            lines.append(endpoint.uri(export.name, tls=tls))
            how = ["-enable-tls"] if tls else []
            lines.append("    " + shlex.join(["nbd-client", *where, "/dev/nbd0", "-N", export.name, *how]))
    with suppress(BrokenPipeError):  # whoever started us need not listen
        print("\n".join(lines), flush=True)
