"""Looks through a state directory that no server uses, and changes nothing: are all words and images whole?"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from nbdram.errors import NbdramError
from nbdram.memory.backing import allocated_bytes
from nbdram.memory.budget import Budget
from nbdram.memory.codec import Codec, IntegrityError
from nbdram.memory.device import Device
from nbdram.memory.layout import (
    CLUSTER,
    CLUSTER_SHIFT,
    LENGTH_MASK,
    LENGTH_SHIFT,
    PAGE,
    SLOT_SHIFT,
    TIER_MASK,
    TIER_SHIFT,
    Tier,
)
from nbdram.memory.recovery import recount
from nbdram.memory.statedir import StateDirectory, StoredDevice
from nbdram.memory.tiers.disk import DiskTier, SwapArea, swap_file
from nbdram.memory.tiers.remote_settings import RemoteSettings

if TYPE_CHECKING:
    from nbdram.memory.tiers.remote import Remote

_FETCHED_AT_ONCE: Final = 64


@dataclass
class Findings:
    """What is in one device; sizes in bytes. `problems` are sentences.

    `unchecked`: so many images in a remote, that could not be asked, and `why`.
    """

    device: StoredDevice
    resident: int = 0
    compressed: int = 0
    disk: int = 0
    remote: int = 0
    images: int = 0
    leftover: int = 0  # allocated, but nothing points at it: given back at the next start
    unchecked: int = 0
    why: str = ""
    problems: list[str] = field(default_factory=list)


def check(state: StateDirectory, remote: RemoteSettings | None = None) -> list[Findings]:
    """Every device of a directory; `remote` is asked if one has images there.

    NbdramError if the directory as such can't be used.
    """
    with ExitStack() as stack:
        areas: list[SwapArea] = []
        for path in state.manifest.swap:
            if path.is_dir():
                areas.append(SwapArea(path, 0, state.manifest.secret))
                stack.callback(areas[-1].close)
        writer = stack.enter_context(ThreadPoolExecutor(1))
        far = _Far(state, remote)
        stack.callback(far.close)
        return [_check_device(state, stored, areas, writer, far) for stored in state.manifest.devices.values()]


class _Far:
    """The remote of a directory, connected to for the first device that has images there."""

    def __init__(self, state: StateDirectory, settings: RemoteSettings | None) -> None:
        self._state = state
        self._settings = settings
        self._remote: Remote | None = None
        self._why = "the directory does not say where it is: name it with --swap"

    def attach(self, device: Device, found: Findings) -> None:
        """Give a device its images, or `found` the reason why there are none. NbdramError: something is missing."""
        identity = found.device.identity
        self._state.check_generations(identity)
        self._connect()
        if self._remote is None:
            found.why = self._why
            return
        try:
            known = self._remote.knows(identity)
        except OSError as error:
            found.why = str(error.strerror)
            return
        if not known:
            raise NbdramError(f"{self._settings} has nothing of it, and {device.remote_clusters} clusters need it")
        from nbdram.memory.tiers.remote import RemoteTier

        device.remote = RemoteTier(self._remote, identity, self._state.open_generations(identity), kept=True)

    def _connect(self) -> None:
        if self._settings is None or self._remote:
            return
        from nbdram.memory.tiers.remote import Remote  # the library takes its time

        try:
            self._remote = Remote(self._settings, self._state.manifest.secret)
        except NbdramError as error:
            self._why, self._settings = str(error), None

    def close(self) -> None:
        if self._remote:
            self._remote.close()


def _check_device(
    state: StateDirectory, stored: StoredDevice, areas: list[SwapArea], writer: ThreadPoolExecutor, far: _Far
) -> Findings:
    found = Findings(stored)
    codec = Codec.dense() if stored.dense else None
    device = Device(stored.name, stored.size, Budget(0), codec, state.opener(stored.identity))
    try:
        recount(device, str(state.file(stored.identity, "index")))
        found.resident, found.compressed, found.disk, found.remote = (
            pages * PAGE for pages in (device.resident_pages, device.cold_pages, device.disk_pages, device.remote_pages)
        )
        counted = (device.resident_pages + device.cold_pages + device.index_pages) * PAGE
        files = (device.backing.hot_fd, device.backing.cold_fd, device.backing.index_fd)
        found.leftover = max(0, sum(map(allocated_bytes, files)) - counted)
        swap_files = [swap_file(path, stored.identity) for path in state.manifest.swap]
        missing = [path for path in swap_files if not path.exists()]
        if missing and device.disk_clusters:
            found.problems.append(f"{missing[0]} is missing, and {device.disk_clusters} clusters may need it")
        elif device.disk_clusters:
            device.disk = DiskTier(areas, writer, stored.identity, kept=True)
        if device.remote_clusters:
            _attach_remote(device, found, far)
        _check_images(device, found)
    except NbdramError as error:
        found.problems.append(str(error))
    finally:
        device.close()
    return found


def _attach_remote(device: Device, found: Findings, far: _Far) -> None:
    try:
        far.attach(device, found)
    except NbdramError as error:
        found.problems.append(str(error))


def _check_images(device: Device, found: Findings) -> None:
    fetching: list[tuple[int, int, Future[bytes]]] = []
    for cluster, word in _images(device):
        tier = word >> TIER_SHIFT & TIER_MASK
        if tier == Tier.REMOTE:
            if found.why:
                found.unchecked += 1
            elif device.remote:
                slot, length = word >> SLOT_SHIFT & 1, word >> LENGTH_SHIFT & LENGTH_MASK
                fetching.append((cluster, word, device.remote.fetch(cluster, slot, length)))
                if len(fetching) == _FETCHED_AT_ONCE:
                    _check_fetched(device, found, fetching)
        elif tier == Tier.RAM or device.disk:
            found.images += 1
            try:
                device.decode_quietly(cluster, word, 0, CLUSTER, device.load_image(cluster, word))
            except OSError as error:
                _note_lost(found, cluster, error)
    _check_fetched(device, found, fetching)


def _images(device: Device) -> Iterator[tuple[int, int]]:
    """All clusters that have an image, and their words."""
    at = 0
    while (span := device.next_span(at, 1 << 16)) is not None:
        first, at = span
        for cluster in range(first, at):
            word = device.word(cluster)
            if word >> LENGTH_SHIFT:
                yield cluster, word


def _check_fetched(device: Device, found: Findings, fetching: list[tuple[int, int, Future[bytes]]]) -> None:
    """Look at what has been asked for. A remote that is away is not asked for more."""
    for cluster, word, future in fetching:
        try:
            device.decode_quietly(cluster, word, 0, CLUSTER, future.result())
            found.images += 1
        except IntegrityError as error:
            found.images += 1
            _note_lost(found, cluster, error)
        except OSError as error:
            found.unchecked += 1
            found.why = str(error.strerror)
    fetching.clear()


def _note_lost(found: Findings, cluster: int, error: OSError) -> None:
    found.problems.append(f"the data at offset {cluster << CLUSTER_SHIFT} is lost: {error.strerror}")
