"""Exports: the names under which devices are served, and what a client is told of them.

With a state directory, exports and what is changed of them while the server runs are remembered there. A device is
in its manifest from when it is complete until it is removed; see `memory/statedir.py` for the order of things.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from nbdram.access import OPEN, Client, Rules
from nbdram.config import ExportSettings, format_size
from nbdram.errors import Conflict, NbdramError, NoSuchExport, UsageError
from nbdram.memory.budget import Budget
from nbdram.memory.codec import Codec
from nbdram.memory.device import Device
from nbdram.memory.layout import CLUSTER, PAGE
from nbdram.memory.recovery import punch_stray_pages, recount
from nbdram.memory.tiers.disk import DiskTier, SwapArea, swap_file
from nbdram.protocol.handshake import ExportInfo
from nbdram.protocol.wire import TransmissionFlag as Flag
from nbdram.server.counters import ExportCounters
from nbdram.server.pace import Pace

if TYPE_CHECKING:
    from nbdram.memory.statedir import StateDirectory, StoredDevice
    from nbdram.memory.tiers.remote import Remote

log = logging.getLogger("nbdram.exports")

# The same on every start: a client that reconnects must find what it had.
_FLAGS = (
    Flag.HAS_FLAGS
    | Flag.SEND_FLUSH
    | Flag.SEND_FUA
    | Flag.SEND_TRIM
    | Flag.SEND_WRITE_ZEROES
    | Flag.SEND_DF
    | Flag.CAN_MULTI_CONN
    | Flag.SEND_CACHE
    | Flag.SEND_FAST_ZERO
)


class Export:
    """A device under a name. Reads and writes of all its connections see the same bytes at once.

    `identity` is the device's UUID: clients that come back tell by it whether they find their data.
    """

    def __init__(
        self,
        name: str,
        device: Device,
        identity: UUID,
        *,
        read_only: bool = False,
        description: str = "",
        dense: bool = False,
        rules: Rules = OPEN,
    ) -> None:
        self.name = name
        self.device = device
        self.identity = identity
        self.read_only = read_only
        self.description = description
        self.dense = dense
        self.connections = 0
        self.counters = ExportCounters()
        self.rules = rules
        self.pace: Pace | None = None
        self.set_rules(rules)

    def set_rules(self, rules: Rules) -> None:
        """Connections that are open already are the Service's to look after."""
        if rules != self.rules or self.pace is None:
            self.rules = rules
            self.pace = Pace(rules) if rules.iops or rules.bandwidth else None

    def info(self) -> ExportInfo:
        flags = _FLAGS | (Flag.READ_ONLY if self.read_only else 0)
        return ExportInfo(self.name, self.device.size, int(flags), self.description, str(self.identity))

    def held_bytes(self) -> dict[str, int]:
        """What it takes in each tier."""
        device = self.device
        return {
            "resident": device.resident_pages * PAGE,
            "compressed": device.cold_pages * PAGE,
            "disk": device.disk_pages * PAGE,
            "remote": device.remote_pages * PAGE,
        }

    def stored(self) -> "StoredDevice":
        from nbdram.memory.statedir import StoredDevice  # for whoever asks, who has loaded it already

        return StoredDevice(
            self.identity,
            self.name,
            self.device.size,
            self.read_only,
            self.description,
            self.dense,
            self.rules.plain(),
        )


class Exports:
    """All exports of a server, in the order in which they were made."""

    def __init__(
        self,
        budget: Budget,
        areas: Sequence[SwapArea] = (),
        state: "StateDirectory | None" = None,
        remote: "Remote | None" = None,
        *,
        remote_first: bool = False,
    ) -> None:
        """`remote_first`: what leaves RAM goes there, and on to the swap areas."""
        self.budget = budget
        self._areas = list(areas)
        self._state = state
        self._remote = remote
        self._remote_first = remote_first
        self._disk_writer = ThreadPoolExecutor(1, thread_name_prefix="nbdram-disk")
        self._by_name: dict[str, Export] = {}

    # -- making, changing, removing ----------------------------------------------------------------

    def restore(self) -> None:
        """Take up all devices of the state directory. NbdramError if one can't be, and then nothing has changed."""
        state = self._state
        assert state
        for stored in state.manifest.devices.values():
            rules = Rules.parse(stored.rules)
            opener = state.opener(stored.identity)
            device = Device(stored.name, stored.size, self.budget, _codec(stored.dense), opener)
            self._by_name[stored.name] = Export(
                stored.name,
                device,
                stored.identity,
                read_only=stored.read_only,
                description=stored.description,
                dense=stored.dense,
                rules=rules,
            )
            recount(device, str(state.file(stored.identity, "index")))
        self._match_swap(state)
        self._match_remote(state)
        for export in self:
            punch_stray_pages(export.device)
            self._attach_tiers(export.device, export.identity)
        state.use_swap([area.path.resolve() for area in self._areas])
        if self._remote:
            state.use_remote(str(self._remote.settings))
        state.sweep()

    def _match_swap(self, state: "StateDirectory") -> None:
        """The swap areas must be those that images are in: which of them has a cluster depends on all."""
        recorded = state.manifest.swap
        given = {area.path.resolve(): area for area in self._areas}
        swapped = [export for export in self if export.device.disk_clusters]
        if recorded and given.keys() == set(recorded):
            self._areas = [given[path] for path in recorded]
        elif swapped:
            options = " ".join(f"--swap disk:{path}" for path in recorded)
            raise NbdramError(f"{state.path} has data in swap: start the server with {options} and no other swap")
        for export in swapped:
            for path in recorded:
                file = swap_file(path, export.identity)
                if not file.exists():
                    raise NbdramError(f"{file} is missing, and {export.name!r} has data in it: put it back")

    def _match_remote(self, state: "StateDirectory") -> None:
        """A remote that images are in must be there, and the one that has them."""
        for export in self:
            if not export.device.remote_clusters:
                continue
            state.check_generations(export.identity)
            where = state.manifest.remote
            if not self._remote:
                raise NbdramError(f"{state.path} has data in a remote: start the server with --swap {where}")
            try:
                known = self._remote.knows(export.identity)
            except OSError as error:
                raise NbdramError(f"can't use {self._remote.settings} for swap: {error.strerror}") from error
            if not known:
                raise NbdramError(
                    f"{self._remote.settings} has nothing of {export.name!r}: its data was put in {where}"
                )

    def create(
        self,
        name: str,
        size: int,
        *,
        read_only: bool = False,
        description: str = "",
        dense: bool = False,
        rules: Rules = OPEN,
    ) -> Export:
        """Add an empty export of at most `size` bytes."""
        if name in self._by_name:
            raise Conflict(f"there is an export called {name!r} already")
        self._check_swap_files(size)
        identity = uuid4()
        state = self._state
        if state:
            state.begin(identity)
        opener = state.opener(identity, new=True) if state else None
        device: Device | None = None
        try:
            device = Device(name, size, self.budget, _codec(dense), opener)
            self._attach_tiers(device, identity)
            export = Export(
                name, device, identity, read_only=read_only, description=description, dense=dense, rules=rules
            )
            if state:
                state.put(export.stored())
        except BaseException:
            if device:
                device.close()
            if state:
                state.forget(identity)
                state.sweep()
            raise
        self._by_name[name] = export
        return export

    def _attach_tiers(self, device: Device, identity: UUID) -> None:
        kept = self._state is not None
        if self._areas:
            device.disk = DiskTier(self._areas, self._disk_writer, identity, kept=kept)
        if self._remote:
            from nbdram.memory.tiers.remote import RemoteTier, anonymous_generations

            state = self._state
            file = state.open_generations(identity) if state else anonymous_generations(device.name)
            device.remote = RemoteTier(self._remote, identity, file, kept=kept)
            device.remote.register(device.name)
            device.remote_first = self._remote_first
            self._remote.use(device.remote_pages)

    def _check_swap_files(self, size: int) -> None:
        for area in self._areas:
            area.check_size(size)

    def configure(self, wanted: ExportSettings) -> None:
        """Make an export as the command line has it; one that is there keeps its data, and a larger size."""
        name = wanted.name
        export = self._by_name.get(name)
        if export is None:
            self.create(
                name,
                wanted.size,
                read_only=wanted.read_only,
                description=wanted.description,
                dense=wanted.dense,
                rules=wanted.rules,
            )
            return
        size = export.device.size
        if wanted.size > size:
            self.resize(name, wanted.size)
        elif wanted.size < size:
            log.warning("%r keeps its %s: --export asks for %s", name, format_size(size), format_size(wanted.size))
        if wanted.dense != export.dense:
            log.warning("%r keeps its way to compress: density can't be changed", name)
        self.describe(wanted)

    def describe(self, wanted: ExportSettings) -> None:
        """Change what is said of an export, and what clients may do."""
        export = self.at(wanted.name)
        export.read_only, export.description = wanted.read_only, wanted.description
        export.set_rules(wanted.rules)
        if self._state:
            self._state.put(export.stored())

    def resize(self, name: str, size: int, *, shrink: bool = False) -> None:
        """Set an export's maximum, while clients use it. Less only with `shrink`, and above all data."""
        export = self.at(name)
        device = export.device
        old = device.size
        if size < old:
            if not shrink:
                raise UsageError(
                    f"{name!r} has {format_size(old)}: to make it smaller, add --shrink (in a request, shrink)"
                )
            end = min(old, (device.last_cluster() + 1) * CLUSTER)
            if size < end:
                raise Conflict(f"{name!r} has data up to {format_size(end)}: trim it first, or choose at least that")
            if any(incoming.remaining[1] > size for incoming in device.incoming):
                raise Conflict(f"{name!r} is being written to above {format_size(size)}: try again")
        self._check_swap_files(size)
        try:
            device.resize(size)
            if self._state:
                self._state.put(export.stored())
        except OSError as error:
            raise NbdramError(f"can't give {name!r} {format_size(size)}: {error.strerror}") from error
        except NbdramError:
            device.resize(old)
            raise

    def detach(self, name: str) -> Export:
        """Take an export out, so that nobody finds it any more; `dispose` of it when nobody uses it any more."""
        export = self.at(name)
        if self._state:
            self._state.forget(export.identity)
        del self._by_name[name]
        return export

    def dispose(self, export: Export) -> None:
        """Give back all that a detached export has. BufferError if somebody still looks at its memory."""
        self._close(export.device, forget=True)
        if self._state:
            self._state.sweep()

    # -- finding -------------------------------------------------------------------------------------

    def at(self, name: str) -> Export:
        """The export that has exactly this name."""
        export = self._by_name.get(name)
        if export is None:
            raise NoSuchExport(name)
        return export

    def named(self, name: str) -> Iterable[Export]:
        """The export called `name`; "" is the first one that its asker may use."""
        export = self._by_name.get(name)
        return [export] if export else self if name == "" else []

    def get(self, name: str) -> Export | None:
        return next(iter(self.named(name)), None)

    def devices(self) -> list[Device]:
        return [export.device for export in self]

    def __iter__(self) -> Iterator[Export]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def close(self) -> None:
        """Give the memory of all exports back; what is in a state directory stays there."""
        self._disk_writer.shutdown()
        for export in self:
            self._close(export.device, forget=self._state is None)
        self._by_name.clear()

    def _close(self, device: Device, *, forget: bool) -> None:
        """Close a device; what it has in a remote stays there unless nobody could ever read it again."""
        tier = device.remote
        if forget:
            device.remote = None
        device.close()
        if forget and tier and self._remote:
            self._remote.forget(tier)


class Visible:
    """The exports that one client may use, its handshake's Catalogue; the others do not exist."""

    def __init__(self, exports: Exports, client: Callable[[], Client]) -> None:
        self._exports = exports
        self._client = client

    def find(self, name: str) -> ExportInfo | None:
        client = self._client()
        for export in self._exports.named(name):
            if export.rules.allow(client):
                return export.info()
        return None

    def listed(self) -> Iterable[ExportInfo]:
        client = self._client()
        return [export.info() for export in self._exports if export.rules.allow(client)]


def _codec(dense: bool) -> Codec | None:
    return Codec.dense() if dense else None
