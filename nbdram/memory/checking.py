"""Looks through a state directory that no server uses, and changes nothing: are all words and images whole?"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

from nbdram.errors import NbdramError
from nbdram.memory.backing import allocated_bytes
from nbdram.memory.budget import Budget
from nbdram.memory.codec import Codec
from nbdram.memory.device import Device
from nbdram.memory.layout import CLUSTER, CLUSTER_SHIFT, LENGTH_SHIFT, PAGE, TIER_MASK, TIER_SHIFT, Tier
from nbdram.memory.recovery import recount
from nbdram.memory.statedir import StateDirectory, StoredDevice
from nbdram.memory.tiers.disk import DiskTier, SwapArea, swap_file


@dataclass
class Findings:
    """What is in one device; sizes in bytes. `problems` are sentences."""

    device: StoredDevice
    resident: int = 0
    compressed: int = 0
    disk: int = 0
    images: int = 0
    leftover: int = 0  # allocated, but nothing points at it: given back at the next start
    problems: list[str] = field(default_factory=list)


def check(state: StateDirectory) -> list[Findings]:
    """Every device of a directory. NbdramError if the directory as such can't be used."""
    with ExitStack() as stack:
        areas: list[SwapArea] = []
        for path in state.manifest.swap:
            if path.is_dir():
                areas.append(SwapArea(path, 0, state.manifest.secret))
                stack.callback(areas[-1].close)
        writer = stack.enter_context(ThreadPoolExecutor(1))
        return [_check_device(state, stored, areas, writer) for stored in state.manifest.devices.values()]


def _check_device(
    state: StateDirectory, stored: StoredDevice, areas: list[SwapArea], writer: ThreadPoolExecutor
) -> Findings:
    found = Findings(stored)
    codec = Codec(CLUSTER) if stored.dense else None
    device = Device(stored.name, stored.size, Budget(0), codec, state.opener(stored.identity))
    try:
        recount(device, str(state.file(stored.identity, "index")))
        found.resident, found.compressed, found.disk = (
            pages * PAGE for pages in (device.resident_pages, device.cold_pages, device.disk_pages)
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
        _check_images(device, found)
    except NbdramError as error:
        found.problems.append(str(error))
    finally:
        device.close()
    return found


def _check_images(device: Device, found: Findings) -> None:
    at = 0
    while (span := device.next_span(at, 1 << 16)) is not None:
        first, at = span
        for cluster in range(first, at):
            word = device.word(cluster)
            if not word >> LENGTH_SHIFT or (word >> TIER_SHIFT & TIER_MASK == Tier.DISK and not device.disk):
                continue
            found.images += 1
            try:
                device.decode_quietly(cluster, word, 0, CLUSTER, device.load_image(cluster, word))
            except OSError as error:
                found.problems.append(f"the data at offset {cluster << CLUSTER_SHIFT} is lost: {error.strerror}")
