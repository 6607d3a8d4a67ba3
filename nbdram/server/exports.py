"""Exports: the names under which devices are served, and what a client is told of them."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID, uuid4

from nbdram.errors import UsageError
from nbdram.memory.budget import Budget
from nbdram.memory.codec import Codec
from nbdram.memory.device import Device
from nbdram.memory.layout import CLUSTER
from nbdram.memory.tiers.disk import DiskTier, SwapArea
from nbdram.protocol.handshake import ExportInfo
from nbdram.protocol.wire import TransmissionFlag as Flag
from nbdram.server.counters import ExportCounters

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

    def __init__(self, name: str, device: Device, identity: UUID, *, read_only: bool, description: str) -> None:
        self.name = name
        self.device = device
        self.identity = identity
        self.read_only = read_only
        self.description = description
        self.connections = 0
        self.counters = ExportCounters()

    def info(self) -> ExportInfo:
        flags = _FLAGS | (Flag.READ_ONLY if self.read_only else 0)
        return ExportInfo(self.name, self.device.size, int(flags), self.description, str(self.identity))


class Exports:
    """All exports of a server, in the order in which they were made; a handshake's Catalogue."""

    def __init__(self, budget: Budget, areas: Sequence[SwapArea] = ()) -> None:
        self.budget = budget
        self._areas = list(areas)
        self._disk_writer = ThreadPoolExecutor(1, thread_name_prefix="nbdram-disk")
        self._by_name: dict[str, Export] = {}

    def create(
        self, name: str, size: int, *, read_only: bool = False, description: str = "", dense: bool = False
    ) -> Export:
        """Add an empty export of at most `size` bytes."""
        if name in self._by_name:
            raise UsageError(f"there are two exports called {name!r}: give each a name of its own")
        for area in self._areas:
            area.check_size(size)
        device = Device(name, size, self.budget, Codec(CLUSTER) if dense else None)
        if self._areas:
            device.disk = DiskTier(self._areas, self._disk_writer)
        export = Export(name, device, uuid4(), read_only=read_only, description=description)
        self._by_name[name] = export
        return export

    def get(self, name: str) -> Export | None:
        """The export called `name`; "" is the first one."""
        if name == "" and name not in self._by_name:
            return next(iter(self._by_name.values()), None)
        return self._by_name.get(name)

    def find(self, name: str) -> ExportInfo | None:
        export = self.get(name)
        return export.info() if export else None

    def listed(self) -> Iterable[ExportInfo]:
        return [export.info() for export in self]

    def devices(self) -> list[Device]:
        return [export.device for export in self]

    def __iter__(self) -> Iterator[Export]:
        return iter(self._by_name.values())

    def close(self) -> None:
        """Give the memory of all exports back."""
        self._disk_writer.shutdown()
        for export in self:
            export.device.close()
        self._by_name.clear()
