"""Cold images: a cluster as lz4 blocks behind a header of their lengths and checksums.

Four blocks of 16 KiB by default, so that a fault of one page decompresses 16 KiB at most, and not 64: it ends where the
page does, after 10 on average. Exports that want density have one block of 64 KiB, which lz4 looks at longer: images of
a tar of files take 0.43 of it instead of 0.53, in whole pages; it compresses at a fifth of the speed, and decompresses
at the same. A block that does not compress is stored as it is, a block of zeros not at all.

    header: per block a length (0: zeros; block size: stored raw), then per block a checksum
            (the low 32 bits of its XXH3), all 32-bit little-endian
    blocks: back to back

The checksum of no bytes is not zero: an image that was lost, and reads as zeros itself, is no cluster of zeros.
"""

import ctypes
import errno
from collections.abc import Container, Sequence
from struct import Struct
from struct import error as TooShort
from typing import Final, Self

import lz4.block
import xxhash

from nbdram.memory.layout import CLUSTER, PAGE

# Above this, an image saves too little to be worth its decompression: the cluster stays as it is.
INCOMPRESSIBLE_BYTES: Final = CLUSTER * 7 // 8
# lz4 makes at most this of a block of zeros; only such blocks are compared with zeros.
_ZERO_BLOCK_BYTES: Final = 300

# Where time matters less than memory: more than this was measured to gain 1 % for twice the time.
DENSE_LEVEL: Final = 3

_compress = lz4.block.compress
_decompress = lz4.block.decompress
# The library's own function, which the Python package has no name for. It keeps the interpreter's lock.
_decompress_start = ctypes.PyDLL(lz4.block._block.__file__).LZ4_decompress_safe_partial
# What it makes lies here until it is copied: one for all devices, because it is the event loop's alone.
_start = ctypes.create_string_buffer(CLUSTER)
_start_view = memoryview(_start)
_ZEROS: Final = bytes(CLUSTER)
_checksum = xxhash.xxh3_64_intdigest
_NO_MATCH: Final = "the checksum of a cold image does not match"
_NOT_LZ4: Final = "a cold image can't be decompressed"
Parts = Sequence[bytes | memoryview]


class IntegrityError(OSError):
    """A cold image is not what was stored. Its errno is EIO."""

    def __init__(self, what: str) -> None:
        super().__init__(errno.EIO, what)


class MissingImage(IntegrityError):
    """A cold image is not there any more."""


class Codec:
    """Encodes clusters to images and back. `block_bytes` divides the cluster size; `level` is lz4's, 0 its fast way."""

    def __init__(self, block_bytes: int = 16 * 1024, level: int = 0) -> None:
        self._how = {"mode": "high_compression", "compression": level} if level else {"mode": "default"}
        self.block_bytes = block_bytes
        self.level = level
        self._blocks = CLUSTER // block_bytes
        pages = block_bytes // PAGE
        self.pages_of_blocks = [((1 << pages) - 1) << number * pages for number in range(self._blocks)]  # masks
        self._header = Struct(f"<{2 * self._blocks}I")
        self._unpack = self._header.unpack_from

    @classmethod
    def dense(cls) -> Self:
        """For exports that want density."""
        return cls(CLUSTER, DENSE_LEVEL)

    def encode(self, cluster: memoryview, image: bytes = b"", kept: Container[int] = ()) -> Parts | None:
        """The parts of the image of CLUSTER bytes, for one gathering write; None if all is zeros.

        Of the blocks that are `kept`, the image has what `image` has, unseen: their checksums go with them. Then that
        must be a whole image, else IntegrityError. The result is as long as its parts together; over
        INCOMPRESSIBLE_BYTES it can't be used: it has no checksums then.
        """
        size = self.block_bytes
        fields = self._unpack(image) if image else ()
        if image and self._header.size + sum(fields[: self._blocks]) != len(image):
            raise IntegrityError("a cold image is not as long as it says")
        at = self._header.size
        blocks: list[bytes | memoryview] = []
        for number in range(self._blocks):
            if number in kept:
                blocks.append(image[at : at + fields[number]])
            else:
                blocks.append(self._pack(cluster[number * size : (number + 1) * size]))
            at += fields[number] if image else 0
        if not any(blocks):
            return None
        lengths = [len(block) for block in blocks]
        if self._header.size + sum(lengths) > INCOMPRESSIBLE_BYTES:
            return [bytes(self._header.size), *blocks]
        sums = [
            fields[self._blocks + number] if number in kept else _checksum(block) & 0xFFFFFFFF
            for number, block in enumerate(blocks)
        ]
        return [self._header.pack(*lengths, *sums), *blocks]

    def looks_incompressible(self, cluster: bytes | bytearray) -> bool:
        """Whether `encode` would find a cluster incompressible, most probably: at half the cost.

        In one piece, lz4 takes half the time that it takes for four blocks, and finds more: of 3319 clusters of files
        that compress, 5 were said not to, which would have taken 0.87 of their size. Who wants density looks longer.
        """
        return not self.level and len(_compress(cluster, store_size=False)) > INCOMPRESSIBLE_BYTES

    def _pack(self, block: memoryview) -> bytes | memoryview:
        """What an image has of a block."""
        packed: bytes = _compress(block, store_size=False, **self._how)
        if len(packed) < _ZERO_BLOCK_BYTES and bytes(block) == _ZEROS[: len(block)]:
            return b""
        return packed if len(packed) < self.block_bytes else block

    def content(self, image: memoryview | bytes, start: int, end: int) -> list[memoryview | bytes]:
        """Bytes [start, end) of a cluster, whose image may have been stored raw; IntegrityError as `decode`."""
        if len(image) == CLUSTER:
            return [memoryview(image)[start:end]]
        return self.decode(image, start, end)

    def decode(self, image: memoryview | bytes, start: int, end: int) -> list[memoryview | bytes]:
        """Bytes [start, end) of the cluster, in pieces; IntegrityError if they are not what was stored.

        Less than a block is for the event loop's thread to ask for. Nothing of it is a view of the image, which may be
        dropped while the pieces wait to be sent.
        """
        size = self.block_bytes
        number = start // size
        try:
            fields = self._unpack(image)
        except TooShort as error:
            raise IntegrityError("a cold image was cut off") from error
        at = self._header.size + sum(fields[:number])
        pieces: list[memoryview | bytes] = []
        base = number * size
        while True:
            length = fields[number]
            first = start - base if start > base else 0
            after = end - base if end - base < size else size
            in_part = after - first < size
            packed = image[at : at + length]
            if in_part:
                packed = bytes(packed)  # which ctypes wants
            if _checksum(packed) & 0xFFFFFFFF != fields[self._blocks + number] or len(packed) != length:
                raise IntegrityError(_NO_MATCH)
            if not length or length == size:
                pieces.append(bytes(packed or _ZEROS)[first:after])
            elif in_part:
                if _decompress_start(packed, _start, length, after, size) != after:
                    raise IntegrityError(_NOT_LZ4)
                pieces.append(bytes(_start_view[first:after]))
            else:
                try:
                    block = _decompress(packed, size)
                except lz4.block.LZ4BlockError as error:
                    raise IntegrityError(_NOT_LZ4) from error
                if len(block) != size:
                    raise IntegrityError(_NOT_LZ4)
                pieces.append(block)
            base += size
            if base >= end:
                return pieces
            at += length
            number += 1

    def check(self, image: memoryview | bytes) -> None:
        """IntegrityError if an image is not what was stored; nothing is decompressed."""
        if len(image) < self._header.size:
            raise IntegrityError("a cold image was cut off")
        fields = self._header.unpack_from(image)
        at = self._header.size
        for length, checksum in zip(fields[: self._blocks], fields[self._blocks :], strict=True):
            packed = image[at : at + length]
            if _checksum(packed) & 0xFFFFFFFF != checksum or len(packed) != length:
                raise IntegrityError(_NO_MATCH)
            at += length
