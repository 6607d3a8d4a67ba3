"""Cold images: whatever becomes of one, its cluster is what was stored, or an error; never zeros, never rubbish."""

import random
import struct
import tracemalloc

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from nbdram.memory.codec import INCOMPRESSIBLE_BYTES, Codec, IntegrityError
from tests.helpers import CLUSTER

KIB = 1024
TEXT = b"All work and no play makes Jack a dull boy. " * 3000
# A block that compresses, one of zeros, one that does not compress, one that compresses a little.
MIXED = TEXT[: 16 * KIB] + bytes(16 * KIB) + random.Random(1).randbytes(24 * KIB) + TEXT[: 8 * KIB]


def encoded(codec: Codec, content: bytes = MIXED) -> bytes:
    parts = codec.encode(memoryview(content))
    assert parts
    return b"".join(parts)


@pytest.mark.parametrize("codec", [Codec(), Codec.dense()], ids=["default", "dense"])
@given(start=st.integers(0, CLUSTER - 1), length=st.integers(1, CLUSTER))
def test_any_part_of_a_cluster_comes_back(codec: Codec, start: int, length: int) -> None:
    end = min(CLUSTER, start + length)
    assert b"".join(codec.decode(encoded(codec), start, end)) == MIXED[start:end]


def test_a_cluster_of_zeros_has_no_image() -> None:
    assert Codec().encode(memoryview(bytes(CLUSTER))) is None


@pytest.mark.parametrize("block_bytes", [16 * KIB, CLUSTER])
def test_a_flipped_bit_is_an_error_or_changes_nothing(block_bytes: int) -> None:
    codec = Codec(block_bytes)
    image = encoded(codec)
    header_bits = 8 * 8 * (CLUSTER // block_bytes)
    for bit in [*range(header_bits), *random.Random(2).sample(range(header_bits, 8 * len(image)), 300)]:
        damaged = bytearray(image)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError):
            codec.decode(bytes(damaged), 0, CLUSTER)
        with pytest.raises(IntegrityError):
            codec.check(bytes(damaged))
        for start in range(0, CLUSTER, block_bytes):  # blocks one by one: what is not damaged can still be read
            try:
                content = b"".join(codec.decode(bytes(damaged), start, start + block_bytes))
            except IntegrityError:
                continue
            assert content == MIXED[start : start + block_bytes], f"bit {bit}"


@pytest.mark.parametrize("block_bytes", [16 * KIB, CLUSTER])
def test_an_image_that_is_gone_is_no_cluster_of_zeros(block_bytes: int) -> None:
    with pytest.raises(IntegrityError):
        Codec(block_bytes).decode(bytes(40 * KIB), 0, 4 * KIB)


def test_a_block_whose_length_became_zero_is_no_block_of_zeros() -> None:
    codec = Codec()
    image = bytearray(encoded(codec))
    struct.pack_into("<I", image, 0, 0)
    with pytest.raises(IntegrityError):
        codec.decode(bytes(image), 0, 4 * KIB)


@pytest.mark.parametrize("end", [4 * KIB, 16 * KIB])
@pytest.mark.parametrize("block", [b"\xff" * 100, b"\x10a"], ids=["rubbish", "short"])
def test_a_block_that_is_not_lz4_is_an_error_whatever_its_checksum_says(block: bytes, end: int) -> None:
    sums = [xxhash.xxh3_64_intdigest(part) & 0xFFFFFFFF for part in (block, b"", b"", b"")]
    image = struct.pack("<8I", len(block), 0, 0, 0, *sums) + block
    with pytest.raises(IntegrityError, match="can't be decompressed"):
        Codec().decode(image, 0, end)


@pytest.mark.parametrize("length", [0, 5, 40, 10 * KIB])
def test_an_image_that_was_cut_off_is_an_error(length: int) -> None:
    codec = Codec()
    with pytest.raises(IntegrityError):
        codec.decode(encoded(codec)[:length], 0, CLUSTER)


@pytest.mark.parametrize("noise", [0, 7, 13, 15, 16])
def test_what_looks_incompressible_is(noise: int) -> None:
    mark = b"%063d\n" % noise
    cluster = random.Random(3).randbytes(noise * 4 * KIB) + mark * ((16 - noise) * 64)
    parts = Codec().encode(memoryview(cluster))
    assert parts
    assert Codec().looks_incompressible(cluster) == (sum(map(len, parts)) > INCOMPRESSIBLE_BYTES) == (noise > 14)


def test_who_wants_density_looks_longer() -> None:
    assert not Codec.dense().looks_incompressible(random.Random(3).randbytes(CLUSTER))


def test_each_of_many_devices_has_one_for_next_to_nothing() -> None:
    tracemalloc.start()
    try:
        codecs = [Codec() for _ in range(100)]
        assert tracemalloc.get_traced_memory()[0] < 2 * KIB * len(codecs)
    finally:
        tracemalloc.stop()
