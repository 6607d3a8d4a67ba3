"""Makes the cold image of a cluster: what is resident, over what its old image holds, compressed into the free slot.

Done by worker threads, or by a process of its own (`serve`, which `packer.py` starts), while the event loop may change
the cluster. Files are read, not looked at through maps: that allocates nothing where a page has gone away meanwhile.

The process remembers nothing. A message is a batch: the descriptors of the files that it is about, two for each device
(`hot`, `cold`), and a record for each cluster; its answer has a number for each. It ends when its socket does.
"""

import errno
import os
import signal
import socket
from collections.abc import Container
from contextlib import suppress
from functools import cache
from struct import Struct
from typing import Final

from nbdram.memory.codec import INCOMPRESSIBLE_BYTES, Codec
from nbdram.memory.layout import (
    CLUSTER,
    CLUSTER_SHIFT,
    LENGTH_MASK,
    LENGTH_SHIFT,
    PAGE,
    RESIDENT,
    SLOT_SHIFT,
    TIER_MASK,
    TIER_SHIFT,
    Tier,
    cold_word,
    page_runs,
)
from nbdram.memory.tiers.ram import RamTier

# What there may be instead of the word of an image, which is positive.
ZEROS: Final = 0  # the cluster is all zeros
STUCK: Final = -1  # there is none: it would not compress, or there is no room
FAILED: Final = -2  # there is none, for a reason that may pass
INCOMPRESSIBLE: Final = -3  # there is none in RAM

# Of a batch, for each cluster: whose it is (the device's number in the message), how its images are made (bytes of
# a block, level), the cluster, its word. And of the answer: what `pack` returns.
REQUEST: Final = Struct("<HIBQQ")
ANSWER: Final = Struct("<q")
READY: Final = b"ready"
MOST: Final = 64  # clusters in a batch


def pack(hot: int, ram: RamTier, codec: Codec, cluster: int, word: int, old: bytes | None = None) -> int:
    """Store the image of a cluster whose word is `word` in its free slot in RAM; the word that describes it.

    `hot` is the descriptor of the device's file. `old` is the image that it has, if that is not in RAM. OSError if
    something can't be read, or there is no room; IntegrityError if the old image is damaged, or gone. Blocks of the old
    image of which no page is resident are taken as they are.
    """
    image = _old_image(ram, cluster, word, old)
    kept: list[int] = []
    if image and len(image) != CLUSTER:
        kept = [number for number, pages in enumerate(codec.pages_of_blocks) if not word & pages]
    content = _content(hot, codec, cluster, word, image, kept)
    parts = codec.encode(memoryview(content), image if kept else b"", kept)
    if parts is None:
        return ZEROS
    length = sum(map(len, parts))
    if length > INCOMPRESSIBLE_BYTES:
        return INCOMPRESSIBLE
    slot = free_slot(word, Tier.RAM)
    ram.store(cluster, slot, parts)
    return cold_word(length, slot, Tier.RAM)


def content_of(hot: int, ram: RamTier, codec: Codec, cluster: int, word: int, old: bytes | None = None) -> bytearray:
    """A cluster's 64 KiB; arguments and errors as for `pack`."""
    return _content(hot, codec, cluster, word, _old_image(ram, cluster, word, old))


def _old_image(ram: RamTier, cluster: int, word: int, old: bytes | None) -> bytes:
    """The image that has what is not resident; nothing if all is, or the rest is zeros."""
    length = word >> LENGTH_SHIFT & LENGTH_MASK
    if word & RESIDENT == RESIDENT or not length:
        return b""
    return old or ram.fetch(cluster, word >> SLOT_SHIFT & 1, length)


def _content(hot: int, codec: Codec, cluster: int, word: int, image: bytes, unseen: Container[int] = ()) -> bytearray:
    """A cluster's 64 KiB; zeros where blocks are `unseen`."""
    content = bytearray(CLUSTER)
    view = memoryview(content)
    size = codec.block_bytes
    for number, pages in enumerate(codec.pages_of_blocks):
        if image and number not in unseen and word & pages != pages:
            at = number * size
            for piece in codec.content(image, at, at + size):
                view[at : at + size] = piece
    for first, after in page_runs(word & RESIDENT):
        part = view[first * PAGE : after * PAGE]
        if os.preadv(hot, [part], (cluster << CLUSTER_SHIFT) + first * PAGE) != len(part):
            raise OSError(errno.EIO, "a memory file is shorter than its device")
    return content


def free_slot(word: int, tier: Tier) -> int:
    """The slot of a tier that the cluster's present image is not in."""
    return 1 - (word >> SLOT_SHIFT & 1) if word >> TIER_SHIFT & TIER_MASK == tier else 0


def serve(fd: int) -> None:
    """The process: answer batches until the other end of the socket `fd` is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # whole groups of processes are told: our server will end us
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError), open("/proc/self/comm", "w") as name:
        name.write("nbdram-compress")
    with socket.socket(fileno=fd) as server:
        server.send(READY)
        while True:
            batch, files, _, _ = socket.recv_fds(server, MOST * REQUEST.size, 2 * MOST)
            try:
                if not batch:
                    return
                server.send(b"".join(ANSWER.pack(number) for number in _pack_all(batch, files)))
            except (BrokenPipeError, ConnectionResetError):
                return
            finally:
                for file in files:
                    os.close(file)


def _pack_all(batch: bytes, files: list[int]) -> list[int]:
    done = []
    for device, block_bytes, level, cluster, word in REQUEST.iter_unpack(batch):
        try:
            hot, cold = files[2 * device : 2 * device + 2]
            done.append(pack(hot, RamTier(cold), _codec(block_bytes, level), cluster, word))
        except Exception:  # a thread of the server's tries again, and tells why
            done.append(FAILED)
    return done


_codec = cache(Codec)
