"""Administration of a running server: what the control socket can ask for, done on the event loop."""

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from nbdram.access import OPEN, Rules
from nbdram.access import PARSERS as RULES
from nbdram.config import check_description, check_name, check_size, parse_size
from nbdram.errors import Conflict, UsageError

if TYPE_CHECKING:
    from nbdram.server.exports import Export
    from nbdram.server.server import Server

log = logging.getLogger("nbdram.admin")

_ANSWER_TIMEOUT_S: Final = 15.0
_DISPOSE_TIMEOUT_S: Final = 5.0

Facts = dict[str, Any]  # ready for JSON
T = TypeVar("T")


class Admin:
    """Called from any thread but the event loop's. Errors: UsageError, NoSuchExport, Conflict, NbdramError."""

    def __init__(self, server: "Server") -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()

    def list(self) -> Facts:
        return self._on_loop(self._list())

    def create(self, wanted: Facts) -> Facts:
        """`wanted`: name, size (bytes, or text as in 16G), and if wanted read_only, description, density, and rules."""
        rules = dict.fromkeys(RULES, (list, int, str))
        required = {"name": str, "size": (int, str)}
        fields = _fields(wanted, required, read_only=bool, description=str, density=bool, **rules)
        return self._on_loop(self._create(fields))

    def remove(self, name: str, *, force: bool) -> Facts:
        """Its data is gone. With `force` connections are hung up on, else they are a Conflict."""
        return self._on_loop(self.remove_now(name, force=force))

    def reload(self, wanted: Facts) -> Facts:
        """`wanted`: if wanted remove, for exports that have left the settings though they have data."""
        fields = _fields(wanted, {}, remove=bool)
        return asdict(self._on_loop(self._server.reloader.reload(remove=fields.get("remove", False))))

    def resize(self, name: str, wanted: Facts) -> Facts:
        """`wanted`: size, and if wanted shrink."""
        fields = _fields(wanted, {"size": (int, str)}, shrink=bool)
        return self._on_loop(self._resize(name, fields))

    def _on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_ANSWER_TIMEOUT_S)

    # -- on the event loop -------------------------------------------------------------------------

    async def _list(self) -> Facts:
        return {"exports": [facts(export) for export in self._server.exports]}

    async def _create(self, fields: Facts) -> Facts:
        name = check_name(fields["name"])
        if not name:
            raise UsageError("an export needs a name")
        export = self._server.exports.create(
            name,
            _size(fields["size"]),
            read_only=fields.get("read_only", False),
            description=check_description(fields.get("description", "")),
            dense=fields.get("density", False),
            rules=_rules(fields, self._server.settings.default_rules),
        )
        log.info("%r was made", name)
        return facts(export)

    async def _resize(self, name: str, fields: Facts) -> Facts:
        exports = self._server.exports
        exports.resize(name, _size(fields["size"]), shrink=fields.get("shrink", False))
        log.info("%r has %d bytes now", name, exports.at(name).device.size)
        return facts(exports.at(name))

    async def remove_now(self, name: str, *, force: bool = False) -> Facts:
        exports, connections = self._server.exports, self._server.service.connections
        export = exports.at(name)
        if export.connections and not force:
            raise Conflict(f"{name!r} has {export.connections} connections: close them, or use force")
        exports.detach(name)
        for connection in list(connections):
            if connection.export is export:
                self._server.service.counters.hung_up["removed"] += 1
                connection.abort()
        await self._dispose(export)
        log.info("%r was removed", name)
        return {"removed": name}

    async def _dispose(self, export: "Export") -> None:
        """Give its memory back once nothing looks at it any more: connections, reclaim, readers of swap."""
        device, fetcher = export.device, self._server.service.fetcher
        async with asyncio.timeout(_DISPOSE_TIMEOUT_S):
            while True:
                await asyncio.sleep(0.005)
                if export.connections or device.reclaiming or fetcher.is_reading(device):
                    continue
                try:
                    self._server.exports.dispose(export)
                    return
                except BufferError:  # a view in a frame that is about to end
                    continue


def facts(export: "Export") -> Facts:
    """What is told of an export; sizes in bytes."""
    return {
        "name": export.name,
        "identity": str(export.identity),
        "size": export.device.size,
        "read_only": export.read_only,
        "description": export.description,
        "density": export.dense,
        **export.rules.plain(),
        "connections": export.connections,
        **export.held_bytes(),
    }


def _rules(fields: Facts, default: Rules) -> Rules:
    """Those of the request; who may use the export is as the settings have it, if the request says nothing of that."""
    rules = Rules.parse({key: fields[key] for key in RULES if key in fields})
    if replace(rules, iops=0, bandwidth=0) != OPEN:
        return rules
    return replace(default, iops=rules.iops, bandwidth=rules.bandwidth)


def _size(wanted: int | str) -> int:
    return check_size(parse_size(wanted) if isinstance(wanted, str) else wanted)


def _fields(given: Facts, required: dict[str, Any], **optional: Any) -> Facts:
    """`given`, if it has all that is required, nothing unknown, and the types are right."""
    known = required | optional
    for name, value in given.items():
        if name not in known:
            raise UsageError(f"there is no field {name!r}; known are {', '.join(known)}")
        kinds = known[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise UsageError(f"the field {name!r} has a value of the wrong type")
    for name in required:
        if name not in given:
            raise UsageError(f"the field {name!r} is missing")
    return given
