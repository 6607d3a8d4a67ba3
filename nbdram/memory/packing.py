"""Makes the cold image of a cluster: what is resident, over what its old image holds, compressed into the free slot.

Done by worker threads, or by a process of its own (`serve`, which `packer.py` starts), while the event loop may change
the cluster. Files are read, not looked at through maps: that allocates nothing where a page has gone away meanwhile.

A message to the process has a kind, a number, and descriptors:

    P  a batch of clusters, their images to be stored in RAM; the files that it is about, two for each device
    M  likewise, stored through maps (`tiers/ram.py` has the reason)
    D  likewise, of clusters that have images, which are to be made smaller
    S  a batch of clusters, their images to be stored in a remote (`tiers/sending.py`), unless they are not there yet,
       and compress; files as before
    C  a connection to a node of the remote; its socket
    L  (from the process) that connection is lost

A batch has a record for each cluster; the answer to it, with its kind and number, a word for each. There may be several
batches under way, whose answers come in any order. Of what it is told the process remembers the connections only. It
ends when its socket does.
"""

import errno
import os
import signal
import socket
from collections.abc import Container, Sequence
from contextlib import suppress
from functools import cache
from struct import Struct
from typing import TYPE_CHECKING, Final

from nbdram.memory.codec import DENSE_LEVEL, INCOMPRESSIBLE_BYTES, Codec
from nbdram.memory.layout import (
    CLUSTER,
    CLUSTER_SHIFT,
    DENSE,
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
from nbdram.memory.malloc import give_back_what_is_free, keep_what_is_freed
from nbdram.memory.tiers.ram import MappedRamTier, RamTier, image_pages

if TYPE_CHECKING:
    from nbdram.memory.tiers.sending import Sending

# What there may be instead of the word of an image, which is positive.
ZEROS: Final = 0  # the cluster is all zeros
STUCK: Final = -1  # there is none: it would not compress, or there is no room
FAILED: Final = -2  # there is none, for a reason that may pass
INCOMPRESSIBLE: Final = -3  # there is none in RAM

# What a message begins with: its kind, and the number of the batch or the connection. Then for each cluster: whose it
# is (the device's number in the message), how its images are made (bytes of a block, level), the cluster, its word; and
# if the image is to be sent, on which connection, for which device (its UUID), as which generation. The answer has what
# `pack` returns. Of a connection it is said how many replicas are wanted (a byte), and what images are sealed with.
HEAD: Final = Struct("<cI")
REQUEST: Final = Struct("<HIBQQ")
REQUEST_TO_SEND: Final = Struct("<HIBQQI16sQ")
ANSWER: Final = Struct("<q")
READY: Final = b"ready"
MOST: Final = 64  # clusters in a batch
_NICE: Final = 19  # serving goes first: a client that waits for memory leaves the processor to us
_KEPT_BYTES: Final = 4 << 20  # by who has images on their way to a remote


def pack(hot: int, ram: RamTier, codec: Codec, cluster: int, word: int, old: bytes | None = None) -> int:
    """Store the image of a cluster whose word is `word` in its free slot in RAM; the word that describes it.

    `hot` is the descriptor of the device's file. `old` is the image that it has, if that is not in RAM. OSError if
    something can't be read, or there is no room; IntegrityError if the old image is damaged, or gone. Blocks of the old
    image of which no page is resident are taken as they are.
    """
    return pack_or_read(hot, ram, codec, cluster, word, old)[0]


def pack_or_read(
    hot: int,
    ram: RamTier,
    codec: Codec,
    cluster: int,
    word: int,
    old: bytes | None = None,
    *,
    is_unlikely: bool = False,
) -> tuple[int, bytes | bytearray]:
    """As `pack`; and the cluster's 64 KiB, if it is INCOMPRESSIBLE. `is_unlikely`: it probably is."""
    image = _old_image(ram, cluster, word, old)
    kept: list[int] = []
    if image and len(image) != CLUSTER:
        kept = [number for number, pages in enumerate(codec.pages_of_blocks) if not word & pages]
    content = _content(hot, codec, cluster, word, image, kept)
    if is_unlikely and not kept and codec.looks_incompressible(content):
        return INCOMPRESSIBLE, content
    parts = codec.encode(memoryview(content), image if kept else b"", kept)
    if parts is None:
        return ZEROS, b""
    length = sum(map(len, parts))
    if length > INCOMPRESSIBLE_BYTES:
        return INCOMPRESSIBLE, _content(hot, codec, cluster, word, image) if kept else content
    slot = free_slot(word, Tier.RAM)
    ram.store(cluster, slot, parts)
    return cold_word(length, slot, Tier.RAM), b""


def make_denser(ram: RamTier, codec: Codec, cluster: int, word: int) -> int:
    """Store a smaller image of a cluster of which all is in an image in RAM; the word that describes it.

    STUCK if it would take no page less; else as `pack`.
    """
    image = _old_image(ram, cluster, word, None)
    parts = codec.encode(memoryview(b"".join(codec.decode(image, 0, CLUSTER))))
    length = sum(map(len, parts or ()))
    if parts is None or image_pages(length) >= image_pages(len(image)):
        return STUCK
    slot = free_slot(word, Tier.RAM)
    ram.store(cluster, slot, parts)
    return cold_word(length, slot, Tier.RAM) | DENSE


def content_of(
    hot: int, ram: RamTier, codec: Codec, cluster: int, word: int, old: bytes | None = None
) -> bytes | bytearray:
    """A cluster's 64 KiB; arguments and errors as for `pack`."""
    return _content(hot, codec, cluster, word, _old_image(ram, cluster, word, old))


def _old_image(ram: RamTier, cluster: int, word: int, old: bytes | None) -> bytes:
    """The image that has what is not resident; nothing if all is, or the rest is zeros."""
    length = word >> LENGTH_SHIFT & LENGTH_MASK
    if word & RESIDENT == RESIDENT or not length:
        return b""
    return old or ram.fetch(cluster, word >> SLOT_SHIFT & 1, length)


def _content(
    hot: int, codec: Codec, cluster: int, word: int, image: bytes, unseen: Container[int] = ()
) -> bytes | bytearray:
    """A cluster's 64 KiB; zeros where blocks are `unseen`."""
    base = cluster << CLUSTER_SHIFT
    if word & RESIDENT == RESIDENT:
        whole = os.pread(hot, CLUSTER, base)
        _check_length(len(whole), CLUSTER)
        return whole
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
        _check_length(os.preadv(hot, [part], base + first * PAGE), len(part))
    return content


def _check_length(length: int, wanted: int) -> None:
    if length != wanted:
        raise OSError(errno.EIO, "a memory file is shorter than its device")


def free_slot(word: int, tier: Tier) -> int:
    """The slot of a tier that the cluster's present image is not in."""
    return 1 - (word >> SLOT_SHIFT & 1) if word >> TIER_SHIFT & TIER_MASK == tier else 0


Places = Sequence[tuple[int, RamTier]]  # of each device in a message: the descriptor of `hot`, and its images


def serve(fd: int) -> None:
    """The process: answer batches until the other end of the socket `fd` is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # whole groups of processes are told: our server will end us
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICE)
    # Where a session is scheduled as a whole, a nice value counts within it only, and we have one of our own.
    for name, ours in (("autogroup", str(_NICE)), ("comm", "nbdram-compress")):
        with suppress(OSError), open(f"/proc/self/{name}", "w") as own:
            own.write(ours)
    give_back_what_is_free()
    with socket.socket(fileno=fd) as server, suppress(BrokenPipeError, ConnectionResetError):
        server.send(READY)
        sending: Sending | None = None
        while True:
            if sending:
                sending.until_told()
            message, files, _, _ = socket.recv_fds(server, HEAD.size + MOST * REQUEST_TO_SEND.size, 2 * MOST)
            if not message:
                return
            (kind, number), records = HEAD.unpack_from(message), message[HEAD.size :]
            if kind == b"C":
                sending = sending or _sending(server)
                sending.open(number, records[0], records[1:], files[0])
                continue
            tier = RamTier if kind == b"P" else MappedRamTier
            places = [(hot, tier(cold)) for hot, cold in zip(files[::2], files[1::2], strict=True)]
            try:
                if kind != b"S":
                    words = _pack_all(records, places, denser=kind == b"D")
                    server.send(message[: HEAD.size] + b"".join(map(ANSWER.pack, words)))
                else:
                    assert sending  # a connection came first
                    _send_all(sending, message[: HEAD.size], records, places)
            finally:
                for _, ram in places:
                    ram.close()
                for file in files:
                    os.close(file)


def _sending(server: socket.socket) -> "Sending":
    from nbdram.memory.tiers.sending import Sending  # where there is no remote, no memory is taken for it

    keep_what_is_freed(_KEPT_BYTES)
    return Sending(server)


def _pack_all(records: bytes, places: Places, *, denser: bool) -> list[int]:
    done = []
    for device, block_bytes, level, cluster, word in REQUEST.iter_unpack(records):
        try:
            hot, ram = places[device]
            if denser:
                done.append(make_denser(ram, _codec(block_bytes, DENSE_LEVEL), cluster, word))
            else:
                done.append(pack(hot, ram, _codec(block_bytes, level), cluster, word))
        except Exception:  # a thread of the server's tries again, and tells why
            done.append(FAILED)
    return done


def _send_all(sending: "Sending", head: bytes, records: bytes, places: Places) -> None:
    """Images as they are: in RAM already, or of what does not compress; what does goes to RAM."""
    from nbdram.memory.tiers.sending import Batch

    batch = Batch(head, len(records) // REQUEST_TO_SEND.size)
    for at, record in enumerate(REQUEST_TO_SEND.iter_unpack(records)):
        device, block_bytes, level, cluster, word, line, identity, generation = record
        try:
            hot, ram = places[device]
            image: bytes | bytearray
            if word & RESIDENT:
                packed, image = pack_or_read(hot, ram, _codec(block_bytes, level), cluster, word, is_unlikely=True)
                if packed != INCOMPRESSIBLE:
                    sending.settle([((batch, at, packed), True)])
                    continue
            else:
                image = ram.fetch(cluster, word >> SLOT_SHIFT & 1, word >> LENGTH_SHIFT & LENGTH_MASK)
            stored = cold_word(len(image), free_slot(word, Tier.REMOTE), Tier.REMOTE)
        except Exception:  # as above
            sending.settle([((batch, at, FAILED), False)])
        else:
            sending.store((batch, at, stored), line, (identity, cluster, generation), image)
    sending.flush()


_codec = cache(Codec)
