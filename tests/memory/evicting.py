"""Make a cluster cold, as reclaim does it, but at once and without asking whether anybody needs it."""

from nbdram.memory.codec import INCOMPRESSIBLE_BYTES
from nbdram.memory.device import Device
from nbdram.memory.layout import DIRTY_SHIFT, LENGTH_SHIFT, RESIDENT, SLOT_SHIFT, Tier, cold_word
from tests.helpers import CLUSTER


def evict(device: Device, cluster: int) -> bool:
    """Whether the cluster lives from its image now (or is a hole, if it was all zeros)."""
    word = device.word(cluster)
    if not word & RESIDENT:
        return bool(word)
    if not word >> DIRTY_SHIFT & RESIDENT:
        device.drop_resident(cluster)
        return True
    image = device.codec.encode(memoryview(_content(device, cluster)))
    if image is None:
        device.clear(cluster)
        return True
    length = sum(map(len, image))
    if length > INCOMPRESSIBLE_BYTES:
        return False
    slot = 1 - (word >> SLOT_SHIFT & 1) if word >> LENGTH_SHIFT else 0
    device.ram.store(cluster, slot, image)
    device.take_images(cluster, [cold_word(length, slot, Tier.RAM)])
    return True


def _content(device: Device, cluster: int) -> bytes:
    """The cluster's bytes, without touching it."""
    base = cluster * CLUSTER
    content = bytearray(CLUSTER)
    word = device.word(cluster)
    if word >> LENGTH_SHIFT:
        content[:] = b"".join(device.decode(cluster, word, 0, CLUSTER))
    for page in range(16):
        if word >> page & 1:
            at = page * 4096
            content[at : at + 4096] = device.hot_view[base + at : base + at + 4096]
    return bytes(content)
