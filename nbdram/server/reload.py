"""SIGHUP and `nbdram reload`: the settings are read and checked anew, and what can change while running does.

Rules:
1. If anything in them is wrong, nothing changes: a certificate that can't be used, or one typing error, keeps all of
   the old settings, and is counted.
2. Connections go on, but for those whose client may not use its export any more.
3. An export that has left the settings is removed only if it is empty, or if that was asked for (`remove`), and never
   while clients are connected. What could not be done is tried again by the next reload.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from nbdram.config import ExportSettings, ServeSettings, format_size
from nbdram.errors import NbdramError, UsageError

if TYPE_CHECKING:
    from nbdram.server.server import Server

log = logging.getLogger("nbdram.reload")

ReadSettings = Callable[[ServeSettings | None], ServeSettings]

# By the setting's name in ServeSettings, as in the file.
_AT_START: Final = {
    "listen": "listen",
    "swap": "swap",
    "remote": "swap",
    "remote_first": "swap",
    "state_dir": "state_dir",
    "control": "control",
    "metrics": "metrics",
    "follow_pressure": "memory (to or from auto)",
    "same_host": "same_host",
    "log_format": "log_format",
}


@dataclass
class Changes:
    """What a reload did, as sentences; what it could not do; and the keys that need a restart."""

    applied: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    restart: list[str] = field(default_factory=list)


class Reloader:
    """Changes the settings of a running server; on its event loop."""

    def __init__(self, server: "Server", read: ReadSettings | None) -> None:
        self._server = server
        self._read = read
        self._one_at_a_time = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self.failures: int = 0
        self.succeeded_at: float = time.time()

    def begin(self) -> None:
        """For a signal: what comes of it is in the log."""
        self._task = asyncio.get_running_loop().create_task(self._log_outcome())

    async def _log_outcome(self) -> None:
        try:
            await self.reload()
        except NbdramError as error:
            log.error("nothing was reloaded: %s", error)

    async def reload(self, *, remove: bool = False) -> Changes:
        """Read, check, apply. UsageError with all mistakes, and then nothing has changed."""
        if self._read is None:
            raise UsageError("this server was not started with settings that can be read again")
        async with self._one_at_a_time:
            try:
                # Names of users may be looked up in a directory service: not on the event loop.
                new = await asyncio.to_thread(self._read, self._server.settings)
                changes = await self.apply(new, remove=remove)
            except NbdramError:
                self.failures += 1
                raise
            self.succeeded_at = time.time()
        for told in changes.applied:
            log.info("reloaded: %s", told)
        for told in changes.kept:
            log.warning("not changed: %s", told)
        if changes.restart:
            log.warning("these settings need a restart: %s", ", ".join(changes.restart))
        return changes

    async def apply(self, new: ServeSettings, *, remove: bool = False) -> Changes:
        """Change what can change; the server's `settings` are afterwards what is in force."""
        server, old, changes = self._server, self._server.settings, Changes()
        self._use_certificates(new, changes)
        stay = {name: getattr(old, name) for name in _AT_START}
        for name, told in _AT_START.items():
            if getattr(new, name) != stay[name] and told not in changes.restart:
                changes.restart.append(told)
        if new.asked_memory != old.asked_memory and new.follow_pressure == old.follow_pressure:
            self._set_memory(new, changes)
        else:
            new = replace(new, memory=old.memory, asked_memory=old.asked_memory)
        if new.limits != old.limits or new.write_wait_s != old.write_wait_s:
            changes.applied.append("limits")
        server.service.limits, server.service.write_wait_s = new.limits, new.write_wait_s
        if new.verbose != old.verbose:
            logging.getLogger().setLevel(logging.INFO if new.verbose else logging.WARNING)
            changes.applied.append("verbose")
        exports = await self._change_exports(old, new, changes, remove)
        if new.default_rules != old.default_rules:
            changes.applied.append("access")
        server.settings = replace(new, exports=exports, **stay)
        server.limit_connections()
        self.enforce_rules()
        return changes

    def _use_certificates(self, new: ServeSettings, changes: Changes) -> None:
        service, old = self._server.service, self._server.settings.tls
        if new.tls is None:
            if old is not None:
                changes.applied.append("TLS is not offered any more")
            return
        if service.tls is None:
            from nbdram.server.tls import Tls  # who checked the certificate has loaded it already

            service.tls = Tls(new.tls)
            changes.applied.append("TLS is offered")
        else:
            before = service.tls.credentials
            service.tls.reload(new.tls)
            if service.tls.credentials.fingerprint != before.fingerprint:
                changes.applied.append("the certificate")
            elif new.tls != old:
                changes.applied.append("TLS")

    def _set_memory(self, new: ServeSettings, changes: Changes) -> None:
        self._server.limit_memory(new.memory)
        changes.applied.append(f"memory: {format_size(self._server.exports.budget.limit_pages * 4096)}")

    # -- exports -----------------------------------------------------------------------------------

    async def _change_exports(
        self, old: ServeSettings, new: ServeSettings, changes: Changes, remove: bool
    ) -> tuple[ExportSettings, ...]:
        """The exports of the settings as they are in force now: what failed is as before, to be tried again."""
        before = {export.name: export for export in old.exports}
        in_force: dict[str, ExportSettings] = {}
        for wanted in new.exports:
            had = before.pop(wanted.name, None)
            if wanted == had:
                in_force[wanted.name] = wanted
                continue
            try:
                self._make_or_change(had, wanted, changes)
                in_force[wanted.name] = wanted
            except NbdramError as error:
                changes.kept.append(f"{wanted.name}: {error}")
                if had:
                    in_force[wanted.name] = had
        for left in before.values():
            if not await self._remove(left.name, remove, changes):
                in_force[left.name] = left
        return tuple(in_force.values())

    def _make_or_change(self, had: ExportSettings | None, wanted: ExportSettings, changes: Changes) -> None:
        exports = self._server.exports
        export = exports.get(wanted.name)
        if export is None:
            exports.configure(wanted)
            changes.applied.append(f"{wanted.name} was made")
            return
        if wanted.dense != export.dense:
            changes.kept.append(f"{wanted.name}: density can't be changed")
        if wanted.size != export.device.size and (had is None or wanted.size != had.size):
            exports.resize(wanted.name, wanted.size, shrink=True)
            changes.applied.append(f"{wanted.name} has {format_size(wanted.size)}")
        if replace(wanted, size=0) != (replace(had, size=0) if had else None):
            exports.describe(wanted)
            changes.applied.append(f"{wanted.name}: what clients may do")

    async def _remove(self, name: str, remove: bool, changes: Changes) -> bool:
        """Whether it is gone."""
        export = self._server.exports.get(name)
        if export is None:
            return True
        if export.device.last_cluster() >= 0 and not remove:
            changes.kept.append(f"{name} has left the settings but has data: nbdram rm {name} removes it")
            return False
        try:
            await self._server.admin.remove_now(name)
        except NbdramError as error:
            changes.kept.append(str(error))
            return False
        changes.applied.append(f"{name} was removed")
        return True

    def enforce_rules(self) -> None:
        """Hang up on those who may not be here any more, and have the others heed new caps."""
        service = self._server.service
        for connection in list(service.connections):
            export = connection.export
            if export is None:  # it haggles, and asks for the rules when it chooses one
                continue
            if not export.rules.allow(connection.client):
                service.counters.hung_up["forbidden"] += 1
                log.info("%s may not use %r any more: hung up on", connection.peer, export.name)
                connection.abort()
            else:
                connection.follow_pace()
